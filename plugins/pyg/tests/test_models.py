from __future__ import annotations

from typing import Any

import pytest
import torch

import kdcore
from kd_pyg import models, nets
from kd_pyg.blocks import stochastic_block
from kd_pyg.options import GATOptions, GNNOptions, StochasticBlockOptions
from kdcore import PluginManager, api, hookimpl
from kdcore.data import Task
from kdcore.errors import Interrupted, ModelError
from kdcore.testing.conformance import _InterruptAt, assert_same_students

KINDS = ["gcn", "sage", "gat", "gin"]
DATA = {"use": "stochastic-block", "nodes": 120, "val": 20, "train_per_class": 10}


def recipe(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "method": "distill", "losses": ["cross-entropy", {"use": "kd", "weight": 0.5}],
        "teacher": {"use": "gat", "hidden": 16, "train": {"steps": 8}}, "student": {"use": "gcn", "hidden": 8},
        "data": DATA, "train": {"steps": 8, "batch_size": 20, "save_every": 2, "eval_every": 8},
        "eval": {"on": ["val", "test"]}}  # fmt: skip
    return plain | changes


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_of_the_batchs_nodes(kind):
    data = stochastic_block(StochasticBlockOptions())
    options = GATOptions if kind == "gat" else GNNOptions
    model = getattr(models, kind)(options(hidden=8, layers=2), data.task)
    names = model.tap("@all")
    found = model(data.sample("train", 5))
    assert found.logits.shape == (5, 4)
    assert found.embedding.shape == (5, 8)
    assert [list(state.shape) for state in found.extras["hidden"]] == [[5, 8]] * 3
    assert names == ["states.0", "states.1", "states.2"]
    for name, state in zip(names, found.extras["hidden"], strict=True):
        assert torch.equal(found.features[name], state)
    assert model.head[0] == "head"


@pytest.mark.parametrize("kind", KINDS)
def test_students_of_a_run_load_outside_it(tmp_path, kind):
    result = api.run(recipe(student={"use": kind, "hidden": 8}), run_dir=tmp_path / "run")
    net = nets.load(tmp_path / "run" / "student")
    data = api.load_student(tmp_path / "run")[0].data
    with torch.no_grad():
        whole = net(data.graph.x, data.graph.edge_index)["logits"]
        batch = data.sample("test", 100)
        torch.testing.assert_close(result.student.eval()(batch).logits, whole[batch["node"]])
    assert kdcore.evaluate(tmp_path / "run") == result.metrics


def test_hidden_states_are_normalised_where_asked_and_options_change_the_network():
    data = stochastic_block(StochasticBlockOptions())
    model = models.sage(GNNOptions(hidden=8, layers=3, pre=2, post=0, l2_norm=True, activation="relu"), data.task)
    data.collate.hops = 3
    found = model.eval()(data.sample("train", 6))
    for state in found.extras["hidden"]:
        torch.testing.assert_close(state.norm(dim=1), torch.ones(6))
    assert (len(model.module.pre), len(model.module.post)) == (2, 0)
    assert torch.equal(found.embedding, found.extras["hidden"][-1])
    assert not any(isinstance(m, torch.nn.BatchNorm1d)
                   for m in models.gcn(GNNOptions(batch_norm=False), data.task).modules())  # fmt: skip


def test_methods_of_other_plugins_run_on_graphs(tmp_path):
    pytest.importorskip("kd_classic")
    for number, losses in enumerate([["cross-entropy", "kd"], ["cross-entropy", "rkd"]]):
        result = api.run(recipe(losses=losses), run_dir=tmp_path / str(number))
        assert set(result.metrics) == {"val/accuracy", "test/accuracy"}


def test_interrupted_in_the_middle_of_drawn_neighbours(tmp_path):
    drawn = recipe(data={**DATA, "fanout": [3, 2]})
    whole = api.run(drawn, run_dir=tmp_path / "whole")
    manager = PluginManager()
    manager.register(_InterruptAt(11), name="interrupt")
    with pytest.raises(Interrupted):
        api.run(drawn, run_dir=tmp_path / "stopped", plugins=manager)
    resumed = api.run(drawn, run_dir=tmp_path / "stopped")
    assert resumed.metrics == whole.metrics
    assert_same_students(whole.path, resumed.path)


def test_a_python_user_brings_a_graph_and_networks(tmp_path):
    data = stochastic_block(StochasticBlockOptions(nodes=120, val=20, train_per_class=10))
    teacher, student = (models.gcn(GNNOptions(hidden=8), data.task) for _ in range(2))
    result = kdcore.distill(
        teacher, student, data, "kd", train={"steps": 3, "batch_size": 40}, run_dir=tmp_path / "run"
    )
    assert "val/accuracy" in result.metrics


class Steps:
    """Keeps the terms of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @hookimpl
    def kd_step_finished(self, terms: dict[str, Any]) -> None:
        self.seen += [float(sum(terms.values()))]


def test_a_network_learns(tmp_path):
    manager, steps = PluginManager(), Steps()
    manager.register(steps, name="steps")
    alone = recipe(losses=["cross-entropy"], train={"steps": 60, "batch_size": 40, "optimizer": {"lr": 0.01}})
    alone.pop("teacher")
    result = api.run(alone, run_dir=tmp_path / "run", plugins=manager)
    assert steps.seen[-1] < 0.5 * steps.seen[0]
    assert result.metrics["test/accuracy"] > 0.45  # four classes


def test_a_checkpoint_decides_the_architecture_and_must_fit(tmp_path):
    api.run(recipe(), run_dir=tmp_path / "run")
    loaded = api.run(recipe(student={"use": "gcn", "checkpoint": str(tmp_path / "run")}), run_dir=tmp_path / "again")
    assert loaded.student.module.config["hidden"] == 8
    for student, data, message in [
        ({"use": "gin"}, DATA, "has kind 'gcn', here it must be 'gin'"),
        ({"use": "gcn"}, {**DATA, "features": 7}, "has features 16, here it must be 7"),
        ({"use": "gcn"}, {**DATA, "classes": 3}, "has num_classes 4, here it must be 3"),
    ]:
        with pytest.raises(ModelError, match=message):
            api.run(recipe(student={**student, "checkpoint": str(tmp_path / "run")}, data=data), run_dir=tmp_path / "x")
    weights = tmp_path / "run" / "student" / nets.WEIGHTS
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / nets.CONFIG).write_text((weights.parent / nets.CONFIG).read_text())
    (tmp_path / "damaged" / nets.WEIGHTS).write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match="damaged holds no graph network"):
        api.run(recipe(student={"use": "gcn", "checkpoint": str(tmp_path / "damaged")}), run_dir=tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no graph network"):
        api.run(recipe(student={"use": "gcn", "checkpoint": str(tmp_path / "empty")}), run_dir=tmp_path / "x")


def test_what_does_not_fit_gets_a_clear_sentence(tmp_path):
    with pytest.raises(ModelError, match="gcn classifies the nodes of a graph; this is a 'classification' task"):
        models.gcn(GNNOptions(), Task("classification", num_classes=3))
    with pytest.raises(ModelError, match=r"3 message-passing layers, but a batch holds only 2 hops.*data.hops=3"):
        api.run(recipe(student={"use": "gcn", "hidden": 8, "layers": 3}), run_dir=tmp_path / "run")
    data = stochastic_block(StochasticBlockOptions())
    with pytest.raises(ModelError, match="needs two nodes or more in training, and a batch holds one"):
        api.run(recipe(train={"steps": 1, "batch_size": 1}), run_dir=tmp_path / "one")
    with pytest.raises(ModelError, match="reads 'graph' and 'seeds'; the batch has: image"):
        models.gcn(GNNOptions(), data.task)({"image": torch.zeros(1)})
