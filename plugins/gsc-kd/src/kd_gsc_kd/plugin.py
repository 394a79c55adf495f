"""Hooks of kd-gsc-kd."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for Semantic "
              "Segmentation", "Jinjing Zhu, Yunhao Luo, Xu Zheng, Hao Wang, Lin Wang", "ICCV", 2023,
              "2307.12574")  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Two students that teach each other."""
    summary = "a CNN and a ViT learn to segment together, each teaching where it is nearer to the label; no teacher"
    return [Component("method", "gsc-kd", "kd_gsc_kd.method:GSCKD", "kd_gsc_kd.options:GSCKDOptions", summary,
                      ("image", "segmentation", "online", "features", "logits"), PAPER)]  # fmt: skip
