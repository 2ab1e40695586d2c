"""Entry point of the `cinetok` command.

Every subcommand module has `HELP` (one line), `EXAMPLE` (command lines), `add_arguments(parser)` and `run(args) ->
Result`. What a command prints comes from its `Result`: text, or with `--json` one JSON document; everything else
(progress, warnings, what libraries print) goes to standard error. Errors end in one line and exit code 2.
"""

import argparse
import contextlib
import importlib
import json
import sys
import warnings

from .common import CommandError, one_line

COMMANDS = (
    "reconstruct",
    "tokenize",
    "detokenize",
    "reenact",
    "generate",
    "chat",
    "predict",
    "motion",
    "convert",
    "evaluate",
    "compare",
    "train",
    "push",
    "info",
)
_EXPECTED_ERROR = 2
_UNEXPECTED_ERROR = 1
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(_EXPECTED_ERROR, f"error: {message} (see `{self.prog} --help`)\n")


def build_parser():
    """The parser of all subcommands."""
    from .. import __version__

    parser = _Parser(
        prog="cinetok",
        description="Video tokenizers and video language models: compress, reconstruct, generate, ask, convert.",
        epilog="`cinetok COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"cinetok {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"example:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON document for machines")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


def main(argv=None):
    """Runs the command line and exits; `argv` defaults to the process's arguments."""
    sys.exit(run(argv))


def run(argv=None):
    """Runs the command line and returns the exit code (0; 2 for errors of the user's input; 1 for bugs)."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and wrong usage
        return stop.code or 0
    args.stdout = sys.stdout
    try:
        with contextlib.ExitStack() as stack:
            args.cleanup = stack
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if not args.debug:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            result = args.run(args)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, (CommandError, ValueError, TypeError, OSError, ImportError))
        text = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        print(f"error: {text}", file=sys.stderr)
        return _EXPECTED_ERROR if expected else _UNEXPECTED_ERROR
    if args.json:
        print(json.dumps(result.data, indent=2, default=str), file=args.stdout)
    elif result.text:
        print(result.text, file=args.stdout)
    return 0
