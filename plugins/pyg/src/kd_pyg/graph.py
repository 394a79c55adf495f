"""A graph as data: a sample is a node, a batch is some nodes and the part of the graph around them.

So a loss sees one row per sample, as with images; metrics, processes and checkpoints need to know nothing of graphs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torch_geometric.data import Data
from torch_geometric.utils import coalesce, degree, k_hop_subgraph, remove_self_loops, to_undirected

from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError
from kdcore.models import Batch


@dataclass(frozen=True)
class GraphTask(Task):
    """Node classification.

    Args:
        features: width of the nodes' features.
    """

    features: int = 0


class GraphData(DataModule):
    """Nodes of one graph in splits. All splits see the same graph (transductive): features and edges of every node,
    labels of their own nodes only.

    A batch holds `graph`, a `torch_geometric.data.Data` with `x` `[n, F]`, `edge_index` `[2, e]`, `n_id` `[n]` (the
    nodes' numbers in the whole graph), `degree` `[n]` and `hops`; `seeds` `[B]`, the positions of the batch's nodes in
    it; `node` `[B]`, their numbers in the whole graph; and `label` `[B]`.

    Args:
        x: features `[N, F]`.
        edges: `[2, E]`, from row 0 to row 1. Self-loops and duplicates are dropped.
        labels: classes `[N]`, -100 where unknown.
        splits: node numbers by split.
        classes: class names in label order, or their number.
        texts: a text per node; `None`, or empty, for one without.
        undirected: whether every edge counts in both directions.
        hops: how much of the graph around its nodes a batch holds; `None` for all of it.
        fanout: neighbours drawn per node and hop in training, instead of all; draws depend on (seed, epoch, index).

    Raises:
        DataError: if the sizes do not fit, a feature is not finite, an edge, label or split names what there is not, a
            split is empty, a training node is also in another split, there are fewer than two classes, or `fanout`
            has not one number per hop.
    """

    def __init__(
        self,
        x: Tensor,
        edges: Tensor,
        labels: Tensor,
        splits: Mapping[str, Sequence[int] | Tensor],
        classes: Sequence[str] | int,
        *,
        texts: Sequence[str | None] | None = None,
        undirected: bool = True,
        hops: int | None = 2,
        fanout: Sequence[int] = (),
    ) -> None:
        names, count = ((), classes) if isinstance(classes, int) else (tuple(classes), len(classes))
        nodes = {name: torch.as_tensor(ids, dtype=torch.long) for name, ids in splits.items()}
        self.graph = make_graph(x, edges, labels, undirected)
        self.texts = None if texts is None else list(texts)
        _check_labels(labels, names, count)
        _check_splits(nodes, len(labels))
        if self.texts is not None and len(self.texts) != len(labels):
            raise DataError(f"there are {len(self.texts)} texts for {len(labels)} nodes")
        if fanout and (len(fanout) != hops or min(fanout) < 1):
            raise DataError(f"fanout needs one number, at least 1, for each of {hops} hops, but is {list(fanout)}")
        super().__init__(
            {name: Nodes(ids, labels) for name, ids in nodes.items()},
            GraphTask("classification", names, count, features=x.shape[1]),
            collate=Neighbourhood(self.graph, hops, fanout),
            augment=_with_draw if fanout else None,
        )

    def nodes(self, split: str) -> Tensor:
        """The node numbers of a split, `[n]`."""
        found: Tensor = self[split].nodes
        return found

    def need_texts(self, who: str) -> list[str]:
        """The nodes' texts.

        Raises:
            DataError: if there are none, or a node has none.
        """
        if self.texts is None:
            raise DataError(f"{who} reads the nodes' texts, and this graph has none; name their column (`data.text`)")
        if bare := [i for i, text in enumerate(self.texts) if not (text or "").strip()]:
            raise DataError(f"{who} reads the nodes' texts, and {len(bare)} of {len(self.texts)} nodes have none, "
                            f"node {bare[0]} first; give each a text, such as its title")  # fmt: skip
        return [str(text) for text in self.texts]


class Nodes(Dataset[dict[str, Any]]):
    """The nodes of a split: samples of `node` and `label`."""

    def __init__(self, nodes: Tensor, labels: Tensor) -> None:
        self.nodes, self.labels = nodes, labels[nodes]

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"node": self.nodes[index], "label": self.labels[index]}

    def column(self, name: str) -> Tensor:
        """A column of all samples. Raises `KeyError` where there is none of this name."""
        return {"node": self.nodes, "label": self.labels}[name]


class Neighbourhood:
    """Collates nodes with the graph around them. (A class, so that worker processes can have it.)

    A node's outputs in a network of at most `hops` layers are then those that the whole graph gives, since `degree` is
    the whole graph's. Where neighbours are drawn, each node of the batch has a subgraph of its own, apart from the
    others', so that its outputs do not depend on the batch it is in; `degree` is then the subgraph's.
    """

    def __init__(self, graph: Data, hops: int | None, fanout: Sequence[int] = ()) -> None:
        self.graph, self.hops, self.fanout = graph, hops, tuple(fanout)
        if fanout:
            order = graph.edge_index[1].argsort(stable=True)
            self.sources = graph.edge_index[0][order].numpy()
            self.ends = np.concatenate([[0], graph.degree.long().cumsum(0).numpy()])

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """The batch; further values of the samples are stacked."""
        draws = [sample.pop("draw", None) for sample in samples]
        batch: Batch = default_collate(samples)
        around = self.drawn if draws[0] is not None else self.exact
        graph, seeds = around(batch["node"], draws)
        return {"graph": graph, "seeds": seeds, **batch}

    def exact(self, nodes: Tensor, draws: object = None) -> tuple[Data, Tensor]:
        """The subgraph of all nodes within `hops` of `nodes` `[B]`, and where they are in it."""
        graph = self.graph
        if self.hops is None:
            return copy.copy(graph), nodes  # a copy, since moving or pinning a graph changes it in place
        kept, edges, seeds, _ = k_hop_subgraph(nodes, self.hops, graph.edge_index, True, graph.num_nodes)
        return Data(x=graph.x[kept], edge_index=edges, n_id=kept, degree=graph.degree[kept], hops=self.hops), seeds

    def drawn(self, nodes: Tensor, draws: Sequence[int]) -> tuple[Data, Tensor]:
        """One subgraph of drawn neighbours per node of `nodes` `[B]`, side by side, and where the nodes are."""
        seeds: list[int] = []
        kept: list[int] = []
        edges: list[tuple[int, int]] = []
        for node, draw in zip(nodes.tolist(), draws, strict=True):
            found, found_edges = self._draw(node, draw)
            seeds.append(len(kept))
            edges += [(source + len(kept), target + len(kept)) for source, target in found_edges]
            kept += found
        ids, edge_index = torch.tensor(kept), torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T.contiguous()
        found = degree(edge_index[1], len(ids))
        around = Data(x=self.graph.x[ids], edge_index=edge_index, n_id=ids, degree=found, hops=self.hops)
        return around, torch.tensor(seeds)

    def _draw(self, node: int, draw: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Nodes and edges (by position) of a subgraph around one node; each node's neighbours are drawn once."""
        rng = np.random.default_rng(draw)
        found, edges, frontier = {node: 0}, list[tuple[int, int]](), [node]
        for fanout in self.fanout:
            reached = []
            for target in frontier:
                near = self.sources[self.ends[target] : self.ends[target + 1]]
                near = near if len(near) <= fanout else rng.choice(near, fanout, replace=False)
                for source in near.tolist():
                    if source not in found:
                        found[source] = len(found)
                        reached.append(source)
                    edges.append((found[source], found[target]))
            frontier = reached
        return list(found), edges


def make_graph(x: Tensor, edges: Tensor, labels: Tensor, undirected: bool = True) -> Data:
    """The whole graph: `x`, `edge_index` without self-loops and duplicates, `y`, `n_id`, the in-degree `degree`.

    Raises:
        DataError: if sizes do not fit, a feature is not finite, or an edge names a node that there is not.
    """
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise DataError(f"features must be [N, F] and labels [N], but they are {list(x.shape)} and "
                        f"{list(labels.shape)}")  # fmt: skip
    if len(wrong := (~x.isfinite()).any(1).nonzero()):
        raise DataError(f"node {int(wrong[0])} has features that are not finite ({len(wrong)} such nodes): fill them")
    if edges.ndim != 2 or len(edges) != 2:
        raise DataError(f"edges must be [2, E], but have the shape {list(edges.shape)}")
    edges = edges.long()
    if edges.numel() and (edges.min() < 0 or edges.max() >= len(x)):
        wrong = ((edges < 0) | (edges >= len(x))).any(0).nonzero()[0, 0]
        raise DataError(f"edge {int(wrong)} names the nodes {edges[:, wrong].tolist()}, but the nodes are numbered 0 "
                        f"to {len(x) - 1}")  # fmt: skip
    edges, _ = remove_self_loops(edges)
    edges = to_undirected(edges, num_nodes=len(x)) if undirected else coalesce(edges, num_nodes=len(x))
    return Data(x=x.float(), edge_index=edges, y=labels, n_id=torch.arange(len(x)), degree=degree(edges[1], len(x)))


def random_split(labels: Tensor, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Tensor]:
    """Labelled nodes in train, val and test, at random."""
    known = (labels != IGNORE).nonzero().flatten()
    order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    val, test = round(val_fraction * len(order)), round(test_fraction * len(order))
    return {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}


def _with_draw(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with a seed for its neighbours; the generator is seeded by (seed, epoch, index)."""
    return {**sample, "draw": random.getrandbits(62)}


def _check_labels(labels: Tensor, names: tuple[str, ...], count: int) -> None:
    if count < 2:
        raise DataError(f"there {'is one class' if count else 'are no classes'}{f', {names[0]!r}' if names else ''}: "
                        "it takes two or more; look at the column of labels (`data.label`)")  # fmt: skip
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= count))
    if labels.is_floating_point() or wrong.any():
        found = labels.dtype if labels.is_floating_point() else int(labels[wrong][0])
        raise DataError(f"labels are whole numbers from 0 to {count - 1}, and {IGNORE} where unknown, not {found}")


def _check_splits(splits: Mapping[str, Tensor], count: int) -> None:
    for name, nodes in splits.items():
        if not len(nodes):
            raise DataError(f"the split {name!r} has no nodes: leave it out, label more nodes, or change the shares of "
                            "the splits")  # fmt: skip
        if len(wrong := nodes[(nodes < 0) | (nodes >= count)]):
            raise DataError(f"the split {name!r} names the node {int(wrong[0])}, but the last is {count - 1}")
    train = set(splits["train"].tolist()) if "train" in splits else set()
    for name in ("val", "test"):
        if name in splits and (both := train & set(splits[name].tolist())):
            raise DataError(f"node {min(both)} is in train and in {name}: what is measured must not be trained on")
