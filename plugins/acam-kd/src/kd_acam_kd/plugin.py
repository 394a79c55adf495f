"""Hooks of kd-acam-kd."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation",
              "Qizhen Lan, Qing Tian", "ICCV", 2025, "2503.06307")  # fmt: skip
SUMMARY = (
    "maps distilled through channel and spatial masks made in each step from attention between teacher and student"
)
TAGS = ("image", "segmentation", "logits", "features")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The masked errors and the diversity of the masks."""
    return [
        Component(
            "loss", "acam-kd", "kd_acam_kd.losses:ACAM", "kd_acam_kd.options:ACAMLossOptions", SUMMARY, TAGS, PAPER
        )
    ]


@hookimpl
def kd_register_methods() -> list[Component]:
    """The same beside the cross-entropy."""
    return [
        Component("method", "acam-kd", "kd_acam_kd.method:ACAMMethod", "kd_acam_kd.options:ACAMOptions", SUMMARY, TAGS,
                  PAPER)
    ]  # fmt: skip
