"""What every command-line script shares: the arguments, and how errors reach a person."""

import argparse
import signal
import sys
from collections.abc import Callable

from utils.errors import UserError

EXIT_BAD_INPUT = 2


def config_parser(description: str, examples: str = "") -> argparse.ArgumentParser:
    """Parser of `--config_file FILE KEY VALUE …` and `--debug`."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override keys of the config")
    return parser


def run(main: Callable[[], object], debug: bool = False) -> int:
    """Calls `main`; what a person can mend is shown as one message.

    Returns:
        Exit code: 0, 2 for bad input, 128 + signal after an interruption.
    """
    try:
        main()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
