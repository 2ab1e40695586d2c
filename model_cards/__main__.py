"""Renders the card of every release: `python -m cinetok.model_cards [--system NAME] [--check]`."""

import argparse
import sys

from ..conversion import SYSTEMS
from . import rendered_cards


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m cinetok.model_cards", description=__doc__.split(":")[0])
    parser.add_argument("--system", choices=SYSTEMS, help="only this system")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a card is not current")
    arguments = parser.parse_args(argv)
    stale = []
    for path, text in rendered_cards(arguments.system):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'not current' if arguments.check else 'written'}: {path.parent.name}/{path.name}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
