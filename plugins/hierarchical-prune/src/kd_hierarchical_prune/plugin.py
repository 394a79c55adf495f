"""Hooks of kd-hierarchical-prune."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("HierarchicalPrune: Position-Aware Compression for Large-Scale Diffusion Models",
              "Young D. Kwon, Rui Li, Sijia Li, Da Li, Sourav Bhattacharya, Stylianos I. Venieris", "AAAI", 2026,
              "2508.04663", "https://github.com/SamsungLabs/HierarchicalPrune")  # fmt: skip
SUMMARY = "late blocks of a diffusion transformer pruned by what they contribute, the rest distilled and quantised"
TAGS = ("image", "diffusion", "text-to-image", "pruning", "quantisation", "features")


@hookimpl
def kd_register_methods() -> list[Component]:
    """Analysis, cut, distillation and quantisation."""
    return [Component("method", "hierarchical-prune", "kd_hierarchical_prune.method:HierarchicalPrune",
                      "kd_hierarchical_prune.options:HierarchicalPruneOptions", SUMMARY, TAGS, PAPER)]  # fmt: skip
