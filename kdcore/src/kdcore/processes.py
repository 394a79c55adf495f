"""Processes of one run that work apart for a while, and end together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import gather_object

from kdcore.errors import Interrupted, KDError, RunFailed
from kdcore.folder import disk_problem
from kdcore.signals import Signals


@contextlib.contextmanager
def together(accelerator: Accelerator, watch: Signals) -> Iterator[None]:
    """Inside, processes work apart; afterwards they wait for each other, and what went wrong in one ends all: each
    raises its own error, or else the first of the others'. Signals are for those still at work to obey."""
    wrong: BaseException | None = None
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        wrong = error
    if accelerator.num_processes > 1:
        with watch.collected():
            told = gather_object([_portable(wrong, accelerator.process_index)])
        wrong = wrong or next((error for error in told if error), None)
    if wrong:
        raise wrong


def _portable(error: BaseException | None, process: int) -> KDError | None:
    """An error as other processes are told of it."""
    if isinstance(error, KDError | None):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"process {process} was interrupted")
    return RunFailed(f"process {process} failed: {disk_problem(error) or f'{type(error).__name__}: {error}'}")
