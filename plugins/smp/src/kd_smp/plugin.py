"""Hooks of kd-smp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcore import hookimpl
from kdcore.components import Component

if TYPE_CHECKING:
    from kdcore.runner import Result, Run

TARGET = "kd_smp.models:segmenter"
TAGS = ("image", "segmentation", "logits", "features")


@hookimpl
def kd_register_teachers() -> list[Component]:
    options = "kd_smp.options:SMPTeacherOptions"
    return [Component("teacher", "smp", TARGET, options, "DeepLabV3+, PSPNet, FPN … over backbones of timm", TAGS)]


@hookimpl
def kd_register_students() -> list[Component]:
    options = "kd_smp.options:SMPOptions"
    return [Component("student", "smp", TARGET, options, "DeepLabV3+, PSPNet, FPN … over backbones of timm", TAGS)]


@hookimpl
def kd_run_finished(run: Run, result: Result) -> None:
    """Draw what the students of a segmentation predict, beside labels and teachers, into the run folder."""
    if run.data.task.kind == "segmentation" and run.accelerator.is_main_process:
        from kd_smp.overlays import write_overlays

        write_overlays(run)
