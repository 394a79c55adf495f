"""The networks, in PyTorch Geometric alone: this module needs neither kdcore nor the rest of this package.

A folder that a run wrote (`student/`) is a `config.json` and a `model.safetensors`. A few lines make a network of it:

    import torch
    from kd_pyg import nets
    net = nets.load("runs/graph/student")
    with torch.no_grad():
        logits = net(x, edge_index)["logits"]  # [N, C], for every node
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv
from torch_geometric.utils import add_self_loops
from torch_geometric.utils import degree as in_degree

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class GNN(nn.Module):
    """Linear layers, message-passing layers, linear layers, a classifier.

    The design space of You et al. 2020 (arXiv:2011.08843): each layer is followed by batch normalisation, an
    activation, dropout and, if asked for, division by the length of each row.

    Args:
        kind: `gcn`, `sage`, `gat` or `gin`.
        features, num_classes: widths of what goes in and comes out.
        hidden: width of every layer.
        layers: message-passing layers, k.
        pre, post: linear layers before and after them; the last of `pre` gives the state of hop 0.
        activation: `prelu` or `relu`.
        batch_norm, l2_norm, dropout: what follows each layer.
        heads: of `gat`.
    """

    def __init__(
        self, kind: str, features: int, num_classes: int, *, hidden: int, layers: int, pre: int, post: int,
        activation: str, batch_norm: bool, l2_norm: bool, dropout: float, heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = {"kind": kind, "features": features, "num_classes": num_classes, "hidden": hidden,
                       "layers": layers, "pre": pre, "post": post, "activation": activation, "batch_norm": batch_norm,
                       "l2_norm": l2_norm, "dropout": dropout, "heads": heads}  # fmt: skip
        bias = not batch_norm

        def after(layer: nn.Module) -> Layer:
            return Layer(layer, hidden, activation, batch_norm, l2_norm, dropout)

        self.pre = nn.ModuleList(after(nn.Linear(hidden if i else features, hidden, bias=bias)) for i in range(pre))
        self.layers = nn.ModuleList(after(CONVOLUTIONS[kind](hidden, bias, heads)) for _ in range(layers))
        self.post = nn.ModuleList(after(nn.Linear(hidden, hidden, bias=bias)) for _ in range(post))
        self.states = nn.ModuleList(nn.Identity() for _ in range(layers + 1))
        self.head = nn.Linear(hidden, num_classes)
        self.apply(init_linear)

    def forward(
        self, x: Tensor, edge_index: Tensor, degree: Tensor | None = None, seeds: Tensor | None = None
    ) -> dict[str, Any]:
        """Outputs for some nodes of a graph.

        Args:
            x: features `[n, F]`.
            edge_index: `[2, e]`, without self-loops.
            degree: in-degrees `[n]` in the graph that this one is a part of; default: in this one.
            seeds: the nodes asked for, `[B]`; default: all.

        Returns:
            `logits` `[B, C]`; `embedding` `[B, hidden]`, the classifier's input; `extras`, whose `hidden` is a list of
            k + 1 states `[B, hidden]`: after the linear layers (hop 0), then after each message-passing layer. They
            also pass through the modules `states.0` to `states.k`, for hooks.
        """
        degree = in_degree(edge_index[1], len(x)) if degree is None else degree
        for layer in self.pre:
            x = layer(x)
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], edge_index, degree))
        states = [tap(h if seeds is None else h[seeds]) for tap, h in zip(self.states, hidden, strict=True)]
        embedding = states[-1]
        for layer in self.post:
            embedding = layer(embedding)
        return {"logits": self.head(embedding), "embedding": embedding, "extras": {"hidden": states}}


def init_linear(module: nn.Module) -> None:
    """Weights of torch's linear layers as You et al. draw them (Xavier, times the gain of a ReLU), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Layer(nn.Module):
    """A linear or message-passing layer and what follows it."""

    def __init__(
        self, layer: nn.Module, width: int, activation: str, batch_norm: bool, l2_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.activation = nn.PReLU() if activation == "prelu" else nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.l2_norm = l2_norm

    def forward(self, x: Tensor, *graph: Tensor) -> Tensor:
        """Rows `[n, D]` to `[n, width]`; `graph` is what a message-passing layer needs besides."""
        x = self.dropout(self.activation(self.norm(self.layer(x, *graph))))
        return F.normalize(x, dim=1) if self.l2_norm else x


class GCN(nn.Module):
    """Graph convolution (Kipf and Welling 2017, arXiv:1609.02907), normalised by degrees that are given, so that a part
    of a graph is computed as the whole graph would be."""

    def __init__(self, width: int, bias: bool, heads: int) -> None:
        super().__init__()
        self.conv = GCNConv(width, width, bias=bias, normalize=False)

    def forward(self, x: Tensor, edge_index: Tensor, degree: Tensor) -> Tensor:
        """`degree` does not count the self-loop that is added here."""
        edges, _ = add_self_loops(edge_index, num_nodes=len(x))
        scale = (degree + 1).rsqrt()  # float32 also under autocast: sums over many neighbours need it
        found: Tensor = self.conv(x, edges, scale[edges[0]] * scale[edges[1]])
        return found


class Plain(nn.Module):
    """A convolution that needs no degrees."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor, degree: Tensor) -> Tensor:
        """The convolution's output."""
        found: Tensor = self.conv(x, edge_index)
        return found


def _sage(width: int, bias: bool, heads: int) -> nn.Module:
    """Hamilton et al. 2017 (arXiv:1706.02216), mean aggregation."""
    return Plain(SAGEConv(width, width, bias=bias))


def _gat(width: int, bias: bool, heads: int) -> nn.Module:
    """Veličković et al. 2018 (arXiv:1710.10903)."""
    return Plain(GATConv(width, width // heads, heads, bias=bias))


def _gin(width: int, bias: bool, heads: int) -> nn.Module:
    """Xu et al. 2019 (arXiv:1810.00826), with a multilayer perceptron of two layers."""
    perceptron = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=bias))
    return Plain(GINConv(perceptron))


CONVOLUTIONS: dict[str, Callable[[int, bool, int], nn.Module]] = {
    "gcn": GCN, "sage": _sage, "gat": _gat, "gin": _gin}  # fmt: skip


def save(net: GNN, folder: Path | str) -> None:
    """Write `config.json` and `model.safetensors`."""
    from safetensors.torch import save_model

    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CONFIG).write_text(json.dumps(net.config, indent=2) + "\n", encoding="utf-8")
    save_model(net, str(Path(folder) / WEIGHTS))


def load(folder: Path | str) -> GNN:
    """The network that `save` wrote, in evaluation mode.

    Raises:
        OSError, ValueError, TypeError, RuntimeError: if the folder holds no such network.
    """
    from safetensors.torch import load_model

    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    net = GNN(**config)
    load_model(net, Path(folder) / WEIGHTS)
    return net.eval()
