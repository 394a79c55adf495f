"""Checkpoints of a training stage: complete, digested, the last few kept, damaged ones passed over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdcore import folder
from kdcore.errors import RunFolderError

logger = logging.getLogger(__name__)


def save(accelerator: Accelerator, checkpoints: Path, step: int, keep: int, facts: Mapping[str, Any]) -> Path:
    """Write everything Accelerate holds (modules, optimizers, scaler, random states of every process) after `step`
    steps, with `facts` in the manifest; then remove all but the last `keep` checkpoints. Returns the new folder."""
    final, temporary = checkpoints / f"step-{step:08d}", checkpoints / f"step-{step:08d}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.commit(temporary, final, {"step": step, "processes": accelerator.num_processes, **facts})
        for old in sorted(checkpoints.glob("step-*[0-9]"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def latest(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint that is whole, with its facts; damaged ones are named in a warning and passed over."""
    for path in sorted(checkpoints.glob("step-*[0-9]"), reverse=True):
        try:
            return path, folder.verify(path)
        except RunFolderError as error:
            logger.warning("%s; trying the checkpoint before it", error)
    return None


def restore(accelerator: Accelerator, path: Path) -> None:
    """Bring modules, optimizers, scaler and random states back to a checkpoint."""
    accelerator.load_state(str(path))
