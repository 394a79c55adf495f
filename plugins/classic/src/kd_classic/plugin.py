"""Hooks of kd-classic."""

from __future__ import annotations

from typing import Literal

from kdcore import Component, Paper, hookimpl

PAPERS = {
    "kd": Paper("Distilling the Knowledge in a Neural Network", "Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
                "NIPS Deep Learning Workshop", 2014, "1503.02531"),
    "fitnets": Paper("FitNets: Hints for Thin Deep Nets", "Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, "
                     "Antoine Chassang, Carlo Gatta, Yoshua Bengio", "ICLR", 2015, "1412.6550"),
    "at": Paper("Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
                "Attention Transfer", "Sergey Zagoruyko, Nikos Komodakis", "ICLR", 2017, "1612.03928"),
    "dkd": Paper("Decoupled Knowledge Distillation", "Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu, Jiajun Liang",
                 "CVPR", 2022, "2203.08679"),
    "dist": Paper("Knowledge Distillation from A Stronger Teacher", "Tao Huang, Shan You, Fei Wang, Chen Qian, "
                  "Chang Xu", "NeurIPS", 2022, "2205.10536"),
}  # fmt: skip
CLASSES = {"kd": "KD", "fitnets": "FitNets", "at": "AT", "dkd": "DKD", "dist": "DIST"}
SUMMARIES = {
    "kd": "soft targets: KL divergence of tempered logits",
    "fitnets": "hints: regress intermediate features of the teacher",
    "at": "attention transfer between convolutional layers",
    "dkd": "KD decoupled into target class and other classes",
    "dist": "correlation of predictions between and within classes",
}
TAGS = {"kd": ("logits", "any"), "dkd": ("logits", "any"), "dist": ("logits", "any"),
        "fitnets": ("features", "image"), "at": ("features", "image")}  # fmt: skip


@hookimpl
def kd_register_losses() -> list[Component]:
    """Cross-entropy and the distillation losses."""
    target, options = "kd_classic.losses:CrossEntropy", "kd_classic.options:CrossEntropyOptions"
    plain = Component("loss", "cross-entropy", target, options, "cross-entropy with the labels", ("labels", "any"))
    return [plain, *(_component("loss", name) for name in CLASSES)]


@hookimpl
def kd_register_methods() -> list[Component]:
    """The generic method and each baseline."""
    target, summary = "kd_classic.methods:WithLosses", "any list of losses, any teachers"
    generic = Component("method", "distill", target, None, summary, ("generic", "any"), recipes="recipes/distill")
    return [generic, *(_component("method", name) for name in CLASSES)]


def _component(kind: Literal["loss", "method"], name: str) -> Component:
    module, suffix = ("losses", "Options") if kind == "loss" else ("methods", "MethodOptions")
    target, options = f"kd_classic.{module}:{CLASSES[name]}", f"kd_classic.options:{CLASSES[name]}{suffix}"
    return Component(kind, name, target, options, SUMMARIES[name], TAGS[name], PAPERS[name], f"recipes/{name}")
