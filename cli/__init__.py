"""The `cinetok` command: `main.py` reads the arguments, every subcommand has a module of its own.

Nothing heavy is imported before a command runs, so that `cinetok --help` answers at once.
"""
