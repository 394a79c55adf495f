"""Hooks of kd-pyg."""

from __future__ import annotations

from kdcore import Component, hookimpl
from kdcore.components import Kind

_TAGS = ("graph", "classification")
_TEXT = (*_TAGS, "text")


@hookimpl
def kd_register_data() -> list[Component]:
    return [
        _component("data", "planetoid", "planetoid:planetoid", "Planetoid", "Cora, CiteSeer and PubMed", _TEXT),
        _component("data", "graph-files", "files:graph_files", "GraphFiles", "a graph in files of yours", _TEXT),
        _component("data", "stochastic-block", "blocks:stochastic_block", "StochasticBlock",
                   "a generated graph of communities whose nodes have weak features and short texts", _TEXT),
    ]  # fmt: skip


@hookimpl
def kd_register_teachers() -> list[Component]:
    return _models("teacher")


@hookimpl
def kd_register_students() -> list[Component]:
    return _models("student")


def _models(kind: Kind) -> list[Component]:
    return [
        _component(kind, "gcn", "models:gcn", "GNN", "graph convolutional network", _TAGS),
        _component(kind, "sage", "models:sage", "GNN", "GraphSAGE with mean aggregation", _TAGS),
        _component(kind, "gat", "models:gat", "GAT", "graph attention network", _TAGS),
        _component(kind, "gin", "models:gin", "GNN", "graph isomorphism network", _TAGS),
    ]


def _component(kind: Kind, name: str, target: str, options: str, summary: str, tags: tuple[str, ...]) -> Component:
    return Component(kind, name, f"kd_pyg.{target}", f"kd_pyg.options:{options}Options", summary, tags)
