"""A stochastic block model whose nodes have weak features and telling texts: a task for trying methods out."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch_geometric.utils import stochastic_blockmodel_graph

from kd_pyg.graph import GraphData
from kd_pyg.options import StochasticBlockOptions
from kdcore.data import derive_seed, seeded


def stochastic_block(options: StochasticBlockOptions) -> GraphData:
    """The graph. Classes are as equal in size as can be; training nodes are drawn per class."""
    o = options
    labels = torch.arange(o.nodes) * o.classes // o.nodes
    with seeded(derive_seed(o.seed, "stochastic-block")):
        edges = _edges(o, labels.bincount())
        means = torch.nn.functional.normalize(torch.randn(o.classes, o.features), dim=1) * o.signal
        x = means[labels] + torch.randn(o.nodes, o.features)
        texts = [_text(o, int(label)) for label in labels] if o.words else None
        order = torch.randperm(o.nodes)
    train = torch.cat([order[labels[order] == c][: o.train_per_class] for c in range(o.classes)])
    rest = order[~torch.isin(order, train)]
    splits = {"train": train, "val": rest[: o.val], "test": rest[o.val :]}
    return GraphData(x, edges, labels, splits, [f"class{c}" for c in range(o.classes)], texts=texts, hops=o.hops,
                     fanout=o.fanout)  # fmt: skip


def _edges(o: StochasticBlockOptions, sizes: Tensor) -> Tensor:
    """Edges whose probabilities give the mean degree and the share of neighbours of one's own class."""
    size = o.nodes / o.classes
    inside, outside = o.degree * o.homophily / size, o.degree * (1 - o.homophily) / (o.nodes - size)
    chances = torch.full((o.classes, o.classes), outside).fill_diagonal_(inside).clamp(max=1)
    edges: Tensor = stochastic_blockmodel_graph(sizes, chances, directed=False)
    return edges


def _text(o: StochasticBlockOptions, label: int) -> str:
    """Words of the class; by chance, a word of any class instead."""
    topics = [random.randrange(o.classes) if random.random() < o.confusion else label for _ in range(o.words)]
    return " ".join(f"{chr(97 + topic % 26)}{topic // 26 or ''}word{random.randrange(o.vocabulary)}"
                    for topic in topics)  # fmt: skip
