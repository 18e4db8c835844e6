"""SIGINT and SIGTERM: finish the step, save, leave. A second signal ends at once."""

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into `requested` (the signal's number, else None)."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: int | None = None
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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum
        log.warning("%s: stopping after this step or evaluation; once more ends at once", signal.Signals(signum).name)
        for s, handler in self._previous.items():
            signal.signal(s, handler)
