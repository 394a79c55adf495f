from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_pyg import nets
from kd_pyg.graph import GraphData, random_split
from kdcore.data import IGNORE, to_device
from kdcore.errors import DataError


def ring(nodes: int = 12, chords: int = 4, isolated: int = 2, **options: Any) -> GraphData:
    """A ring with some chords, and nodes without any edge."""
    torch.manual_seed(0)
    edges = [(i, (i + 1) % nodes) for i in range(nodes)] + [(i, (i + 5) % nodes) for i in range(chords)]
    total = nodes + isolated
    splits = {"train": range(0, total, 2), "val": range(1, total, 4), "test": range(3, total, 4)}
    return GraphData(torch.randn(total, 5), torch.tensor(edges).T, torch.arange(total) % 3, splits, 3, **options)


def network(kind: str, layers: int = 2, **changes: Any) -> nets.GNN:
    torch.manual_seed(1)
    options: dict[str, Any] = {"hidden": 8, "layers": layers, "pre": 1, "post": 1, "activation": "prelu",
                               "batch_norm": True, "l2_norm": True, "dropout": 0.2, "heads": 2}  # fmt: skip
    return nets.GNN(kind, 5, 3, **options | changes).eval()


def outputs(net: nets.GNN, batch: dict[str, Any]) -> Tensor:
    graph = batch["graph"]
    return net(graph.x, graph.edge_index, graph.degree, batch["seeds"])["logits"]


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
def test_a_batch_gives_what_the_whole_graph_gives(kind):
    data = ring(hops=2)
    net, graph = network(kind), data.graph
    whole = net(graph.x, graph.edge_index)["logits"]
    batch = data.sample("train", 3)
    assert batch["graph"].num_nodes < graph.num_nodes
    torch.testing.assert_close(outputs(net, batch), whole[batch["node"]])
    torch.testing.assert_close(batch["graph"].x[batch["seeds"]], graph.x[batch["node"]])


def test_one_hop_less_than_layers_is_not_the_whole_graph():
    data = ring(hops=1)
    net = network("gcn")
    whole = net(data.graph.x, data.graph.edge_index)["logits"]
    batch = data.sample("train", 3)
    assert (outputs(net, batch) - whole[batch["node"]]).abs().max() > 1e-3


def test_no_hops_limit_hands_over_the_whole_graph():
    data = ring(hops=None)
    batch = data.sample("train", 3)
    assert batch["graph"].x is data.graph.x
    assert batch["graph"].edge_index is data.graph.edge_index
    assert torch.equal(batch["seeds"], batch["node"])


@pytest.mark.parametrize("hops", [None, 2])
def test_a_batch_that_goes_to_a_device_leaves_the_graph_where_it_is(hops):
    data = ring(hops=hops)
    moved = to_device(data.sample("train", 3), torch.device("meta"))
    assert {moved[key].device.type for key in ("seeds", "node", "label")} == {"meta"}
    assert moved["graph"].x.device.type == moved["graph"].degree.device.type == "meta"
    assert data.graph.x.device.type == data.graph.edge_index.device.type == "cpu"


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
def test_a_graph_without_edges(kind):
    splits = {"train": [0, 1, 2], "val": [3]}
    data = GraphData(torch.randn(4, 5), torch.empty(2, 0), torch.tensor([0, 1, 2, 0]), splits, 3)
    batch = data.sample("train", 3)
    assert batch["graph"].edge_index.shape == (2, 0)
    assert outputs(network(kind), batch).isfinite().all()


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])  # gin adds up all neighbours in half precision
def test_half_precision_stays_close_also_at_many_neighbours(kind):
    data = GraphData(torch.randn(400, 5), torch.stack([torch.zeros(399).long(), torch.arange(1, 400)]),
                     torch.arange(400) % 3, {"train": range(400)}, 3)  # fmt: skip
    net, batch = network(kind), data.sample("train", 400)
    plain = outputs(net, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(net, batch)
    torch.testing.assert_close(found.float(), plain, atol=0.05, rtol=0.05)


def test_linear_layers_begin_as_xavier_draws_them():
    net = network("gin", hidden=200, pre=2)
    head, hidden = net.head.weight, net.pre[1].layer.weight
    assert hidden.abs().max() <= (12 / 400) ** 0.5
    assert hidden.std().item() == pytest.approx((12 / 400 / 3) ** 0.5, rel=0.02)
    assert head.std().item() == pytest.approx((12 / 203 / 3) ** 0.5, rel=0.1)
    assert not net.head.bias.any()


def test_isolated_nodes_stand_alone():
    data = ring(hops=2)
    batch = data.collate([{"node": torch.tensor(12), "label": torch.tensor(0)}])
    assert batch["graph"].n_id.tolist() == [12]
    for kind in nets.CONVOLUTIONS:
        assert outputs(network(kind), batch).isfinite().all()


def drawn(
    data: GraphData, seed: int = 0, size: int = 4, step: int = 0, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    loader = data.train_loader("train", size, seed=seed, start=step, stop=step + 1, rank=rank, world=world)
    return next(iter(loader))


def test_drawn_neighbours_depend_on_seed_epoch_and_node_alone():
    data, net = ring(chords=12, hops=2, fanout=[2, 2]), network("sage")
    whole = drawn(data)
    first, second = drawn(data, world=2), drawn(data, rank=1, world=2)
    parts = torch.cat([outputs(net, first), outputs(net, second)])
    torch.testing.assert_close(parts, outputs(net, whole))
    assert torch.equal(whole["graph"].edge_index, drawn(data)["graph"].edge_index)
    assert whole["graph"].n_id.tolist() != drawn(data, seed=1)["graph"].n_id.tolist()


def test_drawn_neighbours_are_as_many_as_asked_for_and_edges_of_the_graph():
    data = ring(chords=12, hops=2, fanout=[2, 1])
    edges = set(map(tuple, data.graph.edge_index.T.tolist()))
    batch = drawn(data)
    graph, seeds = batch["graph"], batch["seeds"].tolist()
    assert {tuple(graph.n_id[list(e)].tolist()) for e in graph.edge_index.T.tolist()} <= edges
    limits = [2 if node in seeds else 1 for node in range(graph.num_nodes)]
    assert all(found <= limit for found, limit in zip(graph.degree.tolist(), limits, strict=True))
    assert (graph.n_id[batch["seeds"]] == batch["node"]).all()


def test_evaluation_reads_every_neighbour():
    exact, sampled = ring(hops=2), ring(hops=2, fanout=[1, 1])
    net = network("gin")
    torch.testing.assert_close(outputs(net, sampled.sample("val", 3)), outputs(net, exact.sample("val", 3)))


def test_further_values_of_samples_are_stacked():
    data = ring()
    samples = [{**data["train"][i], "state": torch.full((2,), float(i))} for i in range(3)]
    assert data.collate(samples)["state"].shape == (3, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([IGNORE, 0, 1, 2]), min_size=12, max_size=40), st.integers(0, 5))
def test_a_random_split_deals_out_each_labelled_node_once(labels, seed):
    found = random_split(torch.tensor(labels), 0.25, 0.25, seed)
    dealt = torch.cat(list(found.values())).tolist()
    assert sorted(dealt) == [i for i, label in enumerate(labels) if label != IGNORE]


def test_self_loops_and_duplicates_are_dropped():
    edges = torch.tensor([[0, 0, 1, 2], [1, 1, 0, 2]])
    splits = {"train": [0], "val": [1]}
    data = GraphData(torch.randn(3, 2), edges, torch.zeros(3, dtype=torch.long), splits, 2)
    assert data.graph.edge_index.tolist() == [[0, 1], [1, 0]]
    assert data.graph.degree.tolist() == [1, 1, 0]
    directed = GraphData(torch.randn(3, 2), edges[:, :1], data.graph.y, splits, 2, undirected=False)
    assert directed.graph.edge_index.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": [[0, 1], [1, 7]]}, r"edge 1 names the nodes \[1, 7\], but the nodes are numbered 0 to 3"),
        ({"edges": [0, 1]}, r"edges must be \[2, E\]"),
        ({"labels": [0, 1]}, r"features must be \[N, F\] and labels \[N\]"),
        ({"splits": {"train": [0, 9]}}, "the split 'train' names the node 9, but the last is 3"),
        ({"splits": {"train": [0, -1]}}, "the split 'train' names the node -1"),
        ({"splits": {"train": [0], "val": []}}, "the split 'val' has no nodes"),
        ({"labels": [0, 1, 2, -100]}, "whole numbers from 0 to 1, and -100 where unknown, not 2"),
        ({"labels": [0, 1, -1, 0]}, "not -1"),
        ({"labels": [0.0, 1.0, 0.0, 1.0]}, "not torch.float32"),
        ({"classes": []}, "there are no classes"),
        ({"classes": 0}, "there are no classes"),
        ({"classes": ["only"]}, "there is one class, 'only'"),
        ({"x": [[1.0], [float("nan")], [0.0], [1.0]]}, r"node 1 has features that are not finite \(1 such nodes\)"),
        ({"fanout": [3]}, r"fanout needs one number, at least 1, for each of 2 hops, but is \[3\]"),
        ({"fanout": [3, 0]}, "fanout needs one number"),
        ({"splits": {"train": [0, 1], "test": [1, 2]}}, "node 1 is in train and in test"),
        ({"texts": ["a"]}, "there are 1 texts for 4 nodes"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = {"x": [[0.0]] * 4, "edges": [[0], [1]], "labels": [0, 1, 0, 1], "splits": {"train": [0, 1], "val": [2]},
             "classes": 2} | changes  # fmt: skip
    x, edges, labels = (torch.tensor(given.pop(key)) for key in ("x", "edges", "labels"))
    with pytest.raises(DataError, match=message):
        GraphData(x, edges, labels, **given)


def test_texts_where_they_are_needed():
    with pytest.raises(DataError, match="this graph has none"):
        ring().need_texts("a method")
    with pytest.raises(DataError, match="2 of 14 nodes have none, node 3 first"):
        ring(texts=[None if i in (3, 5) else "a text" for i in range(14)]).need_texts("a method")
    assert ring(texts=["a"] * 14).need_texts("a method") == ["a"] * 14
