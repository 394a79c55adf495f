"""Hooks of kd-lelp."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("Linear Projections of Teacher Embeddings for Few-Class Distillation",
              "Noel Loo, Fotis Iliopoulos, Wei Hu, Erik Vee", "arXiv preprint", 2024, "2409.20449")  # fmt: skip
SUMMARY = "few classes split into pseudo-subclasses by linear projections of the teacher's embedding"
TAGS = ("classification", "few-class", "image", "text", "logits", "embedding")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The cross-entropy over pseudo-subclasses."""
    return [Component("loss", "lelp", "kd_lelp.losses:LELP", "kd_lelp.options:LELPLossOptions", SUMMARY, TAGS,
                      PAPER)]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Projector and distillation."""
    return [Component("method", "lelp", "kd_lelp.method:LELPMethod", "kd_lelp.options:LELPOptions", SUMMARY, TAGS,
                      PAPER)]  # fmt: skip
