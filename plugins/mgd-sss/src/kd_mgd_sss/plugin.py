"""Hooks of kd-mgd-sss."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation",
              "Jie Qin, Jie Wu, Ming Li, Xuefeng Xiao, Min Zheng, Xingang Wang", "ECCV", 2022, "2208.10169",
              "https://github.com/JayQine/MGD-SSSS")  # fmt: skip
TAGS = ("image", "segmentation", "semi-supervised")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The three granularities, each for itself."""
    return [
        Component("loss", "gap-logit-l1", "kd_mgd_sss.losses:GapLogitL1",
                  summary="L1 distance of logits averaged over the image", tags=("segmentation", "logits"),
                  paper=PAPER),
        Component("loss", "region-cosine-mse", "kd_mgd_sss.losses:RegionCosineMSE",
                  "kd_mgd_sss.options:RegionOptions", "similarities between the regions of a map",
                  ("segmentation", "features", "relations"), PAPER),
        Component("loss", "hard-pseudo-ce", "kd_mgd_sss.losses:HardPseudoCE",
                  summary="cross-entropy with the teacher's class of each pixel", tags=("segmentation", "logits"),
                  paper=PAPER),
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Two semi-supervised teachers, and the student of both."""
    return [
        Component("method", "mgd-sss", "kd_mgd_sss.method:MGDSSS", "kd_mgd_sss.options:MGDSSSOptions",
                  "few labelled and many unlabelled images: a deep and a wide teacher distilled in images, regions and "
                  "pixels", (*TAGS, "multi-teacher", "features", "logits"), PAPER)
    ]  # fmt: skip
