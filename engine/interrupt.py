"""SIGINT and SIGTERM: finish the step, save, leave. A second signal ends at once."""

import logging
import signal
import time
from datetime import timedelta
from types import FrameType

from utils.distributed import LONGEST_WAIT, greatest, is_launched, is_main

log = logging.getLogger(__name__)


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into `requested` (the signal's number, else None).

    Args:
        patience: seconds that ranks wait for one another in `agreed`; the first time, which may compile, longer.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO = 2.0
    """Seconds within which torchrun passes on a signal that its ranks had already, as from a whole group's."""

    def __init__(self, patience: float = LONGEST_WAIT.total_seconds()) -> None:
        self.requested: int | None = None
        self._when = 0.0
        self._later_patience = timedelta(seconds=patience)
        self._patience = LONGEST_WAIT
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        try:
            self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        except ValueError:  # not in the main thread: signals cannot be caught there
            self._previous = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def agreed(self) -> int | None:
        """`requested` on any rank: all of them stop after the same step.

        Raises:
            RuntimeError: a rank did not answer in time, or is gone.
        """
        signum = greatest(self.requested or 0, self._patience)
        self._patience = self._later_patience
        return signum or None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._when = signum, time.monotonic()
            if is_main():
                name = signal.Signals(signum).name
                log.warning("%s: stopping after this step or evaluation; once more ends at once", name)
        elif not (is_launched() and time.monotonic() - self._when < self.ECHO):
            for s, handler in self._previous.items():
                signal.signal(s, handler)
            signal.raise_signal(signum)
