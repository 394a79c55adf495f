"""Checkpoints of a training stage: complete, digested, the last few kept, damaged ones passed over."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.other import load
from torch import nn
from torch.optim import Optimizer

from kdcore import folder, sharding
from kdcore.errors import KDError, RunFolderError
from kdcore.stages import TrainStage

logger = logging.getLogger(__name__)

Divided = tuple[TrainStage, Sequence[Optimizer]]


def save(
    accelerator: Accelerator, checkpoints: Path, step: int, keep: int, facts: Mapping[str, Any], recipe: str,
    divided: Divided | None = None,
) -> Path:  # fmt: skip
    """Write everything Accelerate holds (modules, optimizers, scaler, random states of every process) after `step`
    steps, with `facts` and the recipe's fingerprint in the manifest; then remove all but the last `keep` checkpoints.
    Returns the new folder. What is `divided` over the processes is put together."""
    final = _path(checkpoints, step)
    temporary = final.with_name(f"{final.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    if divided:
        sharding.save(*divided, temporary, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.commit(temporary, final, {"step": step, "processes": accelerator.num_processes, **facts}, recipe)
        for old in sorted(checkpoints.glob("step-*[0-9]"))[:-keep]:
            folder.remove(old)
    accelerator.wait_for_everyone()
    return final


def latest(checkpoints: Path, recipe: str = "", noted: int = 0) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint that is whole, with its facts; damaged ones, and a last one that is gone, are named in a
    warning and passed over.

    Args:
        checkpoints: where they are.
        recipe: fingerprint of the recipe they must belong to; none for any.
        noted: the step of the last one that was written.

    Raises:
        RunFolderError: if there are checkpoints, and none of them can be used.
    """
    problems: list[str] = []
    if noted and not (last := _path(checkpoints, noted)).exists():
        logger.warning("%s, the last checkpoint that was written, is gone", last)
    for path in sorted(checkpoints.glob("step-*[0-9]"), reverse=True):
        try:
            found = path, folder.verify(path, recipe)
            for problem in problems:
                logger.warning("%s; the checkpoint before it is used: %s", problem, path.name)
            return found
        except RunFolderError as error:
            problems.append(str(error))
    if problems:
        raise RunFolderError(f"no checkpoint of this stage can be used: {'; '.join(problems)}. Put one back, or delete "
                             f"{checkpoints} to train the stage from its start")  # fmt: skip
    return None


def restore(accelerator: Accelerator, path: Path, divided: Divided | None = None) -> None:
    """Bring modules, optimizers, scaler and random states back to a checkpoint. Nothing is unpickled but tensors and
    plain containers.

    Raises:
        RunFolderError: if a file of it cannot be read.
    """
    with reading(path):
        if (states := path / f"random_states_{accelerator.process_index}.pkl").exists():  # not of one process more
            load(states)  # Accelerate goes on without those it cannot read
        accelerator.load_state(str(path))
        if divided:
            sharding.restore(*divided, path)


def own_storage(module: nn.Module) -> None:
    """Give every buffer that is a view into a larger tensor (a queue that was sliced, say) memory of its own: the
    safetensors format does not hold views."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.untyped_storage().nbytes() != buffer.nbytes:
                setattr(part, name, buffer.clone())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, what torch, safetensors, Accelerate or a plugin raise over a file that they cannot read becomes a
    `RunFolderError`: they have no class for it in common."""
    try:
        yield
    except (KDError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise folder.unreadable(path, error) from error


def _path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"
