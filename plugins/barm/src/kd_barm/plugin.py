"""Hooks of kd-barm."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic Segmentation",
              "Anqi Zhang, Guangyu Gao", "ECCV", 2024, "2407.09838", "https://github.com/ANDYZAQ/BARM")  # fmt: skip
SUMMARY = "a segmenter learns new classes step by step, its former self the teacher, and keeps the old ones"


@hookimpl
def kd_register_students() -> list[Component]:
    """The backbone of the paper."""
    return [
        Component("student", "timm-features", "kd_barm.backbone:timm_features", "kd_barm.options:TimmFeaturesOptions",
                  "last feature map of a timm network, for a head that the method adds", ("image", "segmentation")),
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """The chain of steps."""
    return [
        Component("method", "barm", "kd_barm.method:BARM", "kd_barm.options:BARMOptions", SUMMARY,
                  ("image", "segmentation", "incremental", "self-distillation"), PAPER),
    ]  # fmt: skip
