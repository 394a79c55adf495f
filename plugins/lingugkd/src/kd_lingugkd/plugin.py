"""Hooks of kd-lingugkd."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper(
    "Large Language Model Meets Graph Neural Network in Knowledge Distillation",
    "Shengxiang Hu, Guobing Zou, Song Yang, Shiyi Lin, Yanglan Gan, Bofeng Zhang, Yixin Chen",
    "AAAI", 2025, "2402.05894",
)  # fmt: skip
SUMMARY = "hop-wise contrast of a graph network's layers with a language model's states for prompts about each node"
TAGS = ("graph", "text", "classification", "features", "language-model")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The hop-wise contrast beside the cross-entropy, for data that holds the teacher's states."""
    return [Component("loss", "lingugkd", "kd_lingugkd.losses:LinguGKDLoss", "kd_lingugkd.options:LossOptions",
                      SUMMARY, TAGS, PAPER)]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Tuning, features, distillation."""
    return [Component("method", "lingugkd", "kd_lingugkd.method:LinguGKD", "kd_lingugkd.options:LinguGKDOptions",
                      SUMMARY, TAGS, PAPER)]  # fmt: skip
