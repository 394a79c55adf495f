"""Hooks of kd-mst-distill."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl
from kdcore.components import Kind

PAPER = Paper("MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation",
              "Hui Li, Pengfei Yang, Juanyang Chen, Le Dong, Yanxin Chen, Quan Wang",
              "ACM International Conference on Multimedia", 2025, "2507.07015",
              "https://github.com/Gray-OREO/MST-Distill")  # fmt: skip
TAGS = ("classification", "segmentation", "multimodal", "cross-modal", "multi-teacher", "logits")


@hookimpl
def kd_register_methods() -> list[Component]:
    """Co-training, adaptation of masks, routed distillation."""
    summary = "a mixture of masked multimodal and cross-modal teachers, routed per instance"
    return [Component("method", "mst-distill", "kd_mst_distill.method:MSTDistill",
                      "kd_mst_distill.options:MSTDistillOptions", summary, TAGS, PAPER)]  # fmt: skip


@hookimpl
def kd_register_losses() -> list[Component]:
    """The routed divergence, for any set of teachers."""
    return [Component("loss", "routed-kd", "kd_mst_distill.losses:RoutedKD", "kd_mst_distill.options:RoutedKDOptions",
                      "KD from the teachers that a trained gate chooses for each sample", TAGS, PAPER)]  # fmt: skip


@hookimpl
def kd_register_data() -> list[Component]:
    """Arrays of several modalities."""
    return [Component("data", "paired-arrays", "kd_mst_distill.data:paired_arrays",
                      "kd_mst_distill.options:PairedArraysOptions", "modalities in .npy files, paired by position",
                      ("classification", "multimodal"))]  # fmt: skip


@hookimpl
def kd_register_teachers() -> list[Component]:
    """The paper's networks for AV-MNIST."""
    return [_net("teacher")]


@hookimpl
def kd_register_students() -> list[Component]:
    """The paper's networks for AV-MNIST."""
    return [_net("student")]


def _net(kind: Kind) -> Component:
    return Component(kind, "av-mnist-net", "kd_mst_distill.models:av_mnist_net",
                     "kd_mst_distill.options:AVMNISTNetOptions", "LeNet5, a spectrogram CNN, or both fused",
                     ("image", "audio", "multimodal", "classification"))  # fmt: skip
