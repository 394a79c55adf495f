"""Hooks of kd-diswot."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl
from kdcore.components import Kind

PAPER = Paper("DisWOT: Student Architecture Search for Distillation WithOut Training",
              "Peijie Dong, Lujun Li, Zimian Wei", "CVPR", 2023, "2303.15678",
              "https://github.com/lilujunai/DisWOT-CVPR2023")  # fmt: skip
TAGS = ("image", "classification", "search-space")


@hookimpl
def kd_register_teachers() -> list[Component]:
    return _models("teacher")


@hookimpl
def kd_register_students() -> list[Component]:
    return _models("student")


def _models(kind: Kind) -> list[Component]:
    return [
        Component(kind, "cifar-resnet", "kd_diswot.models:cifar_resnet", "kd_diswot.options:CIFARResNetOptions",
                  "ResNet for small images; a search varies the depth of its stages", TAGS),
        Component(kind, "nasbench201", "kd_diswot.models:nasbench201", "kd_diswot.options:CellOptions",
                  "stacked cells of NAS-Bench-201; a search varies the cell", TAGS),
    ]  # fmt: skip


@hookimpl
def kd_register_losses() -> list[Component]:
    tags = ("image", "classification", "features", "relation")
    return [
        Component("loss", "diswot-semantic", "kd_diswot.losses:Semantic", "kd_diswot.options:LayersOptions",
                  "difference of the correlations between channels", tags, PAPER),
        Component("loss", "diswot-relation", "kd_diswot.losses:Relation", "kd_diswot.options:LayersOptions",
                  "difference of the correlations between samples", tags, PAPER),
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    return [Component("method", "diswot", "kd_diswot.method:DisWOT", "kd_diswot.options:DisWOTOptions",
                      "the student's architecture is searched without training, then distilled",
                      ("image", "classification", "search", "logits", "features"), PAPER)]  # fmt: skip
