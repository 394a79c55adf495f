"""Hooks of kd-transkd."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation",
              "Ruiping Liu, Kailun Yang, Alina Roitberg, Jiaming Zhang, Kunyu Peng, Huayao Liu, Yaonan Wang, "
              "Rainer Stiefelhagen", "IEEE Transactions on Intelligent Transportation Systems", 2024, "2202.13393",
              "https://github.com/RuipingL/TransKD")  # fmt: skip
SUMMARY = "stage maps and patch embeddings of a segmentation transformer distilled into one without pretraining"
TAGS = ("image", "segmentation", "features", "transformer")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The two distillation terms."""
    return [
        Component("loss", "transkd", "kd_transkd.losses:TransKD", "kd_transkd.options:TransKDLossOptions", SUMMARY,
                  TAGS, PAPER)
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Both terms beside the cross-entropy."""
    return [
        Component("method", "transkd", "kd_transkd.method:TransKDMethod", "kd_transkd.options:TransKDOptions", SUMMARY,
                  TAGS, PAPER)
    ]  # fmt: skip
