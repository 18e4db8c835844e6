"""What every command-line script shares: the arguments, and how errors reach a person."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from types import TracebackType

from utils.errors import Interrupted, UserError

EXIT_UNEXPECTED, EXIT_BAD_INPUT = 1, 2
LESS_MEMORY = (
    "To take less of the GPU's memory in training: SOLVER.ACCUMULATION 2 computes a batch in two halves, "
    "SOLVER.GRAD_CHECKPOINT True keeps less of each; SOLVER.CUDA_GRAPH False lets evaluation use what training had. In "
    "evaluation: a lower TEST.IMS_PER_BATCH. `python -m tools.summary` tells what a config needs, nvidia-smi who else "
    "uses the card."
)


def parse_args(description: str, examples: str = "") -> argparse.Namespace:
    """Reads `--config_file FILE [--print_config] [--debug] KEY VALUE …`; the two switches may also stand last."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config_file", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("--print_config", action="store_true", help="print what the YAML resolves to, and end")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override keys of the config")
    args = parser.parse_args()
    for switch in ("print_config", "debug"):
        if f"--{switch}" in args.opts:
            setattr(args, switch, True)
            args.opts.remove(f"--{switch}")
    return args


def tell(text: str) -> None:
    """Shows a message to the person who called the script."""
    print(text, file=sys.stderr)


def tell_interrupts() -> None:
    """Ctrl-C outside of `run`, as while libraries are still being loaded, ends the script with one line, too."""
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        tell("interrupted")
        sys.exit(128 + signal.SIGINT)
    sys.__excepthook__(kind, error, traceback)


def run(main: Callable[[], object], debug: bool = False, tell: Callable[[str], None] = tell) -> int:
    """Calls `main`; what a person can mend is shown as one message, by `tell`.

    Returns:
        Exit code: 0, 2 for bad input and for more than a GPU's memory holds, 128 + signal after an interruption, 1 for
        what should not happen.
    """
    try:
        main()
    except UserError as error:
        if debug:
            raise
        tell(f"error: {error}")
        return EXIT_BAD_INPUT
    except Interrupted as interrupted:
        tell(str(interrupted))
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        tell("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            raise
        logging.getLogger("traceback").warning("unexpected error", exc_info=True)  # into the log file alone
        if type(error).__name__ == "OutOfMemoryError":  # torch's; a script that has not loaded it meets none
            tell(f"error: {str(error).partition(chr(10))[0]}\n{LESS_MEMORY}")
            return EXIT_BAD_INPUT
        tell(f"error: unexpected {type(error).__name__}: {error}\n(--debug shows where)")
        return EXIT_UNEXPECTED
    return 0
