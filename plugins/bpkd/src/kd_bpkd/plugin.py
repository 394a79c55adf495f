"""Hooks of kd-bpkd."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation",
              "Liyang Liu, Zihan Wang, Minh Hieu Phan, Bowen Zhang, Jinchao Ge, Yifan Liu", "WACV", 2024, "2306.08075",
              "https://github.com/AkideLiu/BPKD")  # fmt: skip
SUMMARY = "segmentation logits distilled apart at the contours of the labels and in the bodies between them"
TAGS = ("image", "segmentation", "logits")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The edge and the body term."""
    return [Component("loss", "bpkd", "kd_bpkd.losses:BPKD", "kd_bpkd.options:BPKDLossOptions", SUMMARY, TAGS, PAPER)]


@hookimpl
def kd_register_methods() -> list[Component]:
    """Both terms beside the cross-entropy."""
    return [
        Component("method", "bpkd", "kd_bpkd.method:BPKDMethod", "kd_bpkd.options:BPKDOptions", SUMMARY, TAGS, PAPER)
    ]
