"""Signals of a run: collected where a stage can save what it has, obeyed at once elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from kdcore.errors import Interrupted, Terminated

GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL, unless told otherwise: what Kubernetes and Slurm give by default."""


class Signals:
    """What arrives while a run is under way. SIGINT ends it with 130, SIGTERM with 75.

    Where a stage can save what it has (`collected`), a signal only waits in `received` until the stage looks; a second
    SIGINT ends it nevertheless, and so does the end of the grace period after SIGTERM. Elsewhere a signal ends the run
    at once: what is on disk is whole, and the same command goes on from it.

    Args:
        grace: seconds in which a run has to end after SIGTERM.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self.received: list[int] = []
        self._collecting = 0
        self._handled = False
        self._first = 0.0
        self._late = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Inside, signals are handled as said above. Threads other than the main one leave them alone."""
        if self._handled or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._handled = True
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        alarm = signal.signal(signal.SIGALRM, self._too_late)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, previous in {**old, signal.SIGALRM: alarm}.items():
                signal.signal(number, previous)
            self._handled = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[int]]:
        """Inside, signals wait in the list that this gives."""
        with self.handled():
            self._collecting += 1
            try:
                yield self.received
            finally:
                self._collecting -= 1

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = bool(self.received) and now - self._first > 1  # a launcher hands on what a terminal sent to all
        self._first = self._first or now
        self.received.append(number)
        if not self._collecting or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, self.grace)

    def _too_late(self, number: int, frame: Any) -> None:
        self._late = True
        raise KeyboardInterrupt

    def explain(self, error: KeyboardInterrupt | Interrupted) -> KeyboardInterrupt | Interrupted:
        """What ended the run, as its caller is to see it."""
        if signal.SIGTERM not in self.received:
            return error
        if self._late:
            return Terminated(f"terminated, and not done with saving after {self.grace:g} s; the checkpoint before "
                              "stands, and the same command goes on from there")  # fmt: skip
        return Terminated(str(error) or "terminated; what was saved stands, and the same command goes on from there")
