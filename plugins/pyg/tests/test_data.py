from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from kd_pyg.blocks import stochastic_block
from kd_pyg.files import graph_files
from kd_pyg.options import GraphFilesOptions, PlanetoidOptions, StochasticBlockOptions
from kd_pyg.planetoid import CLASSES, planetoid
from kdcore import api
from kdcore.data import IGNORE
from kdcore.errors import DataError, RecipeError

RAW = Path(__file__).parents[4] / "shared" / "data" / "planetoid"
needs_raw = pytest.mark.skipif(not RAW.is_dir(), reason=f"the raw files are not here: there is no {RAW}")
SIZES = {"cora": (2708, 5278, 1433, 140), "citeseer": (3327, 4552, 3703, 120)}


@needs_raw
@pytest.mark.parametrize("name", SIZES)
def test_planetoid_is_as_published(name):
    nodes, edges, features, train = SIZES[name]
    data = planetoid(PlanetoidOptions(name=name, root=str(RAW)))
    assert data.graph.x.shape == (nodes, features)
    assert data.graph.edge_index.shape[1] == 2 * edges
    assert [data.size(split) for split in ("train", "val", "test")] == [train, 500, 1000]
    assert data.task.classes == CLASSES[name]
    assert data.labels("train").bincount().tolist() == [20] * len(CLASSES[name])
    torch.testing.assert_close(data.graph.x.sum(1)[data.nodes("test")], torch.ones(1000))


@needs_raw
def test_citeseers_nodes_without_words_have_no_label_and_isolated_ones_work():
    data = planetoid(PlanetoidOptions(name="citeseer", root=str(RAW), split="random"))
    empty = (data.graph.y == IGNORE).nonzero().flatten()
    assert len(empty) == 15
    alone = (data.graph.degree == 0).nonzero().flatten()
    assert len(alone) == 48
    assert not set(empty.tolist()) & {n for split in data.splits for n in data.nodes(split).tolist()}
    batch = data.collate([{"node": node, "label": data.graph.y[node]} for node in alone])
    assert batch["graph"].edge_index.numel() == 0
    assert sum(data.size(split) for split in data.splits) == 3312
    assert data.need_texts("the test")[int(empty[0])] == "no words"


@needs_raw
def test_planetoid_texts_list_the_words_by_number_and_the_random_split_is_60_20_20():
    data = planetoid(PlanetoidOptions(root=str(RAW), split="random", normalize=False, split_seed=3))
    words = data.graph.x[5].nonzero().flatten().tolist()
    assert data.texts[5] == " ".join(f"w{word}" for word in words)
    assert [data.size(split) for split in ("train", "val", "test")] == [1624, 542, 542]
    assert set(data.graph.x.unique().tolist()) == {0.0, 1.0}
    again = planetoid(PlanetoidOptions(root=str(RAW), split="random", split_seed=4))
    assert not torch.equal(again.nodes("test"), data.nodes("test"))


@needs_raw
def test_planetoid_where_pyg_keeps_it_and_damaged_files(tmp_path):
    raw = tmp_path / "Cora" / "raw"
    shutil.copytree(RAW, raw)
    assert PlanetoidOptions(root=str(tmp_path)).downloads() == []
    assert planetoid(PlanetoidOptions(root=str(tmp_path))).graph.num_nodes == 2708
    (raw / "ind.cora.allx").chmod(0o644)
    (raw / "ind.cora.allx").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="cannot be read"):
        planetoid(PlanetoidOptions(root=str(tmp_path)))


def test_planetoid_says_what_it_would_download(tmp_path):
    (download,) = PlanetoidOptions(root=str(tmp_path), name="pubmed").downloads()
    assert download.name == "Planetoid pubmed"
    assert download.size > 1_000_000


def test_planetoid_that_cannot_be_had(tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("kd_pyg.planetoid.download_url", refuse)
    with pytest.raises(DataError, match=r"data.root: the raw files of 'cora' .* are not in .* no network"):
        planetoid(PlanetoidOptions(root=str(tmp_path)))


NODES = [{"id": f"p{i}", "text": f"graph paper {i} on {'trees' if i % 2 else 'cats'}", "label": ["b", "a"][i % 2],
          "split": ["train", "val", "test", "none"][i % 4]} for i in range(12)]  # fmt: skip
EDGES = [{"source": f"p{i}", "target": f"p{(i + 1) % 12}"} for i in range(12)]


def write(folder: Path, ending: str, name: str, rows: list[dict[str, Any]]) -> str:
    path, table = folder / f"{name}.{ending}", pd.DataFrame(rows)
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    return str(path)


def files(folder: Path, node_rows: Any = None, edge_rows: Any = None, ending: str = "csv", **options: Any) -> Any:
    given: dict[str, Any] = {
        "nodes": write(folder, ending, "nodes", node_rows or NODES),
        "edges": write(folder, ending, "edges", edge_rows or EDGES),
        "id": "id",
        "split": "split",
    }
    return graph_files(GraphFilesOptions(**given | options))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_files_of_every_kind(tmp_path, ending):
    data = files(tmp_path, ending=ending)
    assert data.task.classes == ("a", "b")
    assert data.graph.y.tolist() == [1, 0] * 6
    assert {split: data.nodes(split).tolist() for split in data.splits} == {
        "train": [0, 4, 8], "val": [1, 5, 9], "test": [2, 6, 10]}  # fmt: skip
    assert data.graph.degree.tolist() == [2] * 12
    assert data.need_texts("the test")[3] == "graph paper 3 on trees"
    assert data.graph.x.shape[0] == 12
    assert data.task.features == data.graph.x.shape[1] > 2


def test_features_of_a_column_of_a_file_and_numbered_labels_with_gaps(tmp_path):
    rows = [{**row, "label": i % 3 or None, "vector": [float(i), 1.0]} for i, row in enumerate(NODES)]
    data = files(tmp_path, rows, ending="parquet", features="vector", classes=["0", "1", "2"])
    assert data.graph.x.tolist() == [[float(i), 1.0] for i in range(12)]
    assert data.graph.y.tolist() == [i % 3 or IGNORE for i in range(12)]
    np.save(tmp_path / "x.npy", np.ones((12, 4)))
    assert files(tmp_path, features=str(tmp_path / "x.npy")).task.features == 4


def test_without_edges_and_without_a_split(tmp_path):
    data = files(tmp_path, split=None, id=None, edges=None)
    assert data.graph.edge_index.shape == (2, 0)
    assert sum(data.size(split) for split in data.splits) == 12


def test_texts_that_are_missing_are_only_missed_where_they_are_needed(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "text" or i != 4} for i, row in enumerate(NODES)]
    data = files(tmp_path, rows)
    with pytest.raises(DataError, match="1 of 12 nodes have none, node 4 first"):
        data.need_texts("the test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edge_rows": [*EDGES, {"source": "p0", "target": "p99"}]}, "row 12 names the target 'p99'.*no such node"),
        ({"node_rows": [*NODES, NODES[0]]}, "two nodes are named 'p0'"),
        ({"label": "lable"}, "data.label: the file has no column 'lable'; did you mean 'label'"),
        ({"text": "title"}, "data.text: the file has no column 'title'"),
        ({"classes": ["a", "c"]}, "node 0 has the label 'b'"),
        ({"node_rows": [{**row, "label": ""} for row in NODES]}, "there are no classes"),
        ({"node_rows": [{**row, "label": "a"} for row in NODES]}, "there is one class, 'a'"),
        ({"node_rows": NODES[:2], "split": None, "edges": None}, "the split 'val' has no nodes"),
        ({"split": "label"}, "no row of the column 'label' says 'train'; it says: a, b"),
        ({"text": None}, "nodes without texts need features"),
        ({"features": "label"}, "data.features: 'label'"),
        ({"features": "nowhere.npy"}, "data.features: 'nowhere.npy' cannot be read"),
        ({"nodes": "nowhere.csv"}, "data.nodes: there is no file 'nowhere.csv'"),
        ({"nodes": "nodes.xml"}, "data.nodes: 'nodes.xml' is none of .csv"),
    ],
)  # fmt: skip
def test_wrong_files_are_explained(tmp_path, options, message):
    nodes, edges = options.pop("node_rows", None), options.pop("edge_rows", None)
    with pytest.raises(DataError, match=message):
        files(tmp_path, nodes, edges, **options)


def test_the_block_model_is_what_its_options_say():
    options = StochasticBlockOptions(nodes=2000, degree=8, homophily=0.75, val=100)
    data = stochastic_block(options)
    graph = data.graph
    same = graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]
    assert abs(same.float().mean() - 0.75) < 0.03
    assert abs(graph.degree.mean() - 8) < 0.4
    assert data.labels("train").bincount().tolist() == [20] * 4
    assert sum(data.size(split) for split in data.splits) == 2000
    assert stochastic_block(options).texts == data.texts
    assert stochastic_block(options.model_copy(update={"seed": 1})).texts != data.texts
    assert stochastic_block(options.model_copy(update={"words": 0})).texts is None
    own = [
        word[0] == "abcd"[label]
        for text, label in zip(data.texts, graph.y.tolist(), strict=True)
        for word in text.split()
    ]
    assert abs(sum(own) / len(own) - (0.7 + 0.3 / 4)) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.fanout=[3]", "fanout needs one number per hop: 1 are given, hops is 2"),
        ("data.fanout=[3,0]", "at least one neighbour per hop"),
        ("data.nodes=20", "leave no node for the test"),
        ("data.homophily=2", "data.homophily: .*less than or equal to 1"),
        ("student.hidden=0", "student.hidden: .*greater than 0"),
        ("student.layer=3", "student.layer: unknown key; did you mean 'layers'"),
    ],
)
def test_wrong_options_name_the_key(change, message):
    recipe = {"method": "distill", "losses": ["cross-entropy"], "student": "gcn", "data": "stochastic-block"}
    with pytest.raises(RecipeError, match=message):
        api.plan(recipe, [change])
