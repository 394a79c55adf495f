"""The components `gcn`, `sage`, `gat` and `gin`: from options and a task to a `kdcore.Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_pyg import nets
from kd_pyg.graph import GraphTask
from kd_pyg.options import GNNOptions
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Batch, Model


def gcn(options: GNNOptions, task: Task) -> Model:
    """A graph convolutional network. Raises what `build` does."""
    return build("gcn", options, task)


def sage(options: GNNOptions, task: Task) -> Model:
    """GraphSAGE. Raises what `build` does."""
    return build("sage", options, task)


def gat(options: GNNOptions, task: Task) -> Model:
    """A graph attention network. Raises what `build` does."""
    return build("gat", options, task)


def gin(options: GNNOptions, task: Task) -> Model:
    """A graph isomorphism network. Raises what `build` does."""
    return build("gin", options, task)


def build(kind: str, options: GNNOptions, task: Task) -> Model:
    """A teacher or student. Its stages, for taps, are the states of hop 0 to k, `[B, hidden]`, of the batch's nodes.

    Raises:
        ModelError: if the task is no node classification, or the checkpoint does not fit.
    """
    if not isinstance(task, GraphTask) or task.kind != "classification":
        raise ModelError(f"{kind} classifies the nodes of a graph; this is a {task.kind!r} task of other data. Use the "
                         "data `planetoid`, `graph-files` or `stochastic-block`")  # fmt: skip
    net = _load(kind, options.checkpoint, task) if options.checkpoint else _fresh(kind, options, task)
    stages = [f"states.{hop}" for hop in range(len(net.states))]
    return Model(net, call, save=lambda folder: nets.save(net, folder), labels=task.labels, stages=stages)


def call(net: nets.GNN, batch: Batch) -> dict[str, Any]:
    """The outputs for a batch's nodes.

    Raises:
        ModelError: if the batch holds no graph, less of it than the network's layers reach, or in training a single row
            for batch normalisation.
    """
    if "graph" not in batch or "seeds" not in batch:
        raise ModelError(f"a graph network reads 'graph' and 'seeds'; the batch has: {', '.join(batch)}")
    graph = batch["graph"]
    if "hops" in graph and graph.hops < len(net.layers):  # a whole graph has no hops
        raise ModelError(f"the network has {len(net.layers)} message-passing layers, but a batch holds only "
                         f"{graph.hops} hops around its nodes: set data.hops={len(net.layers)}")  # fmt: skip
    rows = len(batch["seeds"]) if net.post else graph.num_nodes
    if net.training and net.config["batch_norm"] and rows < 2:
        raise ModelError("batch normalisation needs two nodes or more in training, and a batch holds one: raise "
                         "train.batch_size, or set the network's batch_norm=false")  # fmt: skip
    found: dict[str, Any] = net(graph.x, graph.edge_index, graph.degree, batch["seeds"])
    return found


def _fresh(kind: str, options: GNNOptions, task: GraphTask) -> nets.GNN:
    return nets.GNN(kind, task.features, task.class_count, **options.model_dump(exclude={"checkpoint"}))


def _load(kind: str, checkpoint: str, task: GraphTask) -> nets.GNN:
    folder = student_folder(Path(checkpoint))
    try:
        net = nets.load(folder)
    except Exception as error:  # a missing, foreign or damaged file: safetensors and json have no common class
        raise ModelError(f"checkpoint: {folder} holds no graph network: {type(error).__name__}: {error}") from error
    found = {"kind": kind, "features": task.features, "num_classes": task.class_count}
    for key, wanted in found.items():
        if net.config[key] != wanted:
            raise ModelError(f"checkpoint: the network in {folder} has {key} {net.config[key]!r}, here it must be "
                             f"{wanted!r}")  # fmt: skip
    return net.train()
