"""`--processes N`: the same command in several processes, started through `torch.distributed.run`."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from typing import TYPE_CHECKING

import typer

from kd_cli.errors import LAUNCHED, UNEXPECTED, say
from kdcore.errors import Interrupted, Terminated

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_PR_SET_PDEATHSIG = 1
_TO_END = 5
"""Seconds that a process has to end by itself when its grace period is over, before it is killed."""


def launch(
    ctx: typer.Context, recipe: str, overrides: list[str], arguments: list[str], processes: int, grace: float,
    command: str = "run",
) -> int:  # fmt: skip
    """Validate the recipe here, then run it, or give another command, in as many processes. The exit status of the
    first that failed.

    Raises:
        UserError: if the recipe is not valid.
    """
    import kdcore

    kdcore.plan(recipe, overrides, plugins=ctx.obj)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as start

    if not ctx.find_root().params["verbose"]:
        logging.disable()
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(grace) + _TO_END))
    line = ["-m", "kd_cli", *_global_options(ctx), command, *arguments]
    try:
        start(parse_args(["--standalone", f"--nproc-per-node={processes}", *line]))  # type: ignore[no-untyped-call]
    except SignalException as error:
        return Terminated.exit_code if error.sigval == signal.SIGTERM else Interrupted.exit_code
    except ChildFailedError as error:
        _explain(error.failures)
        return max(error.get_first_failure()[1].exitcode, 1)
    return 0


def follow_launcher() -> None:
    """End with the launcher, even where that was killed: the kernel then sends SIGTERM. (Linux; elsewhere nothing.)"""
    launcher = os.environ.get(LAUNCHED)
    if launcher and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):  # it is gone already
            raise SystemExit(Terminated.exit_code)


def _global_options(ctx: typer.Context) -> list[str]:
    given = ctx.find_root().params
    return [*(["--no-plugins"] if given["no_plugins"] else []), *["--verbose"] * given["verbose"]]


def _explain(failures: dict[int, ProcessFailure]) -> None:
    """Say once what each process that failed by itself says, and in which one where they differ."""
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode > 0} or failures
    named = {rank: failure for rank, failure in own.items() if not failure.message.startswith(UNEXPECTED)}
    own = named or own  # a process that loses another one fails, too
    messages = {failure.message: rank for rank, failure in reversed(own.items())}
    for message, rank in reversed(messages.items()):
        label, _, rest = message.partition(": ")
        say(label if len(messages) == 1 else f"process {rank}: {label}", rest)
