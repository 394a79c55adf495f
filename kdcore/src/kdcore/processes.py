"""The processes of a run: how they find each other, work apart for a while, end together, and share tensors."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor
from torch.nn import functional as F

from kdcore.errors import Interrupted, KDError, RecipeError, RunFailed
from kdcore.folder import disk_problem
from kdcore.signals import Signals

if TYPE_CHECKING:
    from kdcore.recipe import Recipe


def make_accelerator(recipe: Recipe, path: Path) -> Accelerator:
    """The process's Accelerator, with the recipe's precision and trackers.

    Raises:
        RecipeError: if Accelerate is configured for what divides weights in another way.
    """
    from accelerate.state import AcceleratorState
    from accelerate.tracking import get_available_trackers

    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise RecipeError(f"Accelerate is configured for {name}, which runs do not use: configure plain processes "
                              "(`accelerate config`), and set `train.shard=all` to divide weights")  # fmt: skip
    trackers = recipe.trackers
    if trackers is None:
        trackers = [str(t) for t in get_available_trackers() if str(t) == "tensorboard"]
    AcceleratorState._reset_state()
    precision = {"fp32": "no"}.get(recipe.train.precision, recipe.train.precision)
    cpu = not torch.accelerator.is_available()  # said outright, or several CPU processes would not find each other
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))  # others wait while one searches, say
    return Accelerator(cpu=cpu, mixed_precision=precision, log_with=trackers or None, project_dir=str(path),
                       kwargs_handlers=[patience])  # fmt: skip


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


def gather_with_grad(tensor: Tensor, shares: Sequence[int] = ()) -> Tensor:
    """The tensors of all processes, concatenated along the first dimension, with gradient to each.

    Args:
        tensor: `[B, ...]`.
        shares: B on each process, where they may differ (`Progress.shares`).
    """
    uneven = len(set(shares)) > 1
    if uneven:
        tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, max(shares) - tensor.shape[0]))
    tensor = tensor.contiguous()
    if tensor.is_floating_point():
        parts = torch.distributed.nn.functional.all_gather(tensor)  # type: ignore[no-untyped-call]
    else:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        torch.distributed.all_gather(parts, tensor)
    whole = torch.cat([part[:size] for part, size in zip(parts, shares, strict=True)] if uneven else list(parts))
    if whole.requires_grad:  # gloo's exchange of gradients reads memory in order, whatever the strides say
        whole.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return whole


def world_size() -> int:
    """How many processes this run has."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
