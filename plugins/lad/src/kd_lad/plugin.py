"""Hooks of kd-lad."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach for Semantic "
              "Segmentation", "Shoumeng Qiu et al.", "ECCV", 2024, "2407.13254",
              "https://github.com/skyshoumeng/Label_Assisted_Distillation")  # fmt: skip
SUMMARY = "a teacher as light as the student sees noised labels as a further input channel; its logits are distilled"
TAGS = ("image", "segmentation", "logits", "privileged-information")


@hookimpl
def kd_register_methods() -> list[Component]:
    """The teacher's training with labels, and the distillation."""
    return [Component("method", "lad", "kd_lad.method:LAD", "kd_lad.options:LADOptions", SUMMARY, TAGS, PAPER)]
