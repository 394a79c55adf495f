from __future__ import annotations

import json
import logging
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor

import kdcore
from kd_lingugkd.features import FACTS, Features
from kd_lingugkd.functional import retrieval_rate
from kd_lingugkd.losses import TEACHER
from kd_lingugkd.options import LossOptions
from kd_pyg.graph import GraphData
from kd_pyg.models import gcn
from kd_pyg.options import GNNOptions
from kdcore import Component, PluginManager, Result, api, hookimpl
from kdcore.data import IGNORE
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError
from kdcore.testing.conformance import assert_same_students, effect

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip


def small(**changes: Any) -> dict[str, Any]:
    """A recipe of a few steps per stage."""
    method = {"use": "lingugkd", "max_length": 128, "neighbours": 2, "shard_size": 20, "lora": {"rank": 2},
              **changes.pop("method", {})}  # fmt: skip
    plain: dict[str, Any] = {
        "method": method, "teacher": {"use": "transformers", "config": LLAMA}, "student": {"use": "gcn", "hidden": 8},
        "data": {"use": "stochastic-block", "nodes": 60, "train_per_class": 5, "val": 20},
        "train": {"steps": 6, "batch_size": 20, "save_every": 2, "eval_every": 2, "optimizer": {"lr": 0.01}},
        "stages": {"tune": {"train": {"steps": 4, "batch_size": 4}}}, "eval": {"on": ["val", "test"]}}  # fmt: skip
    return plain | changes


class Watch:
    """Keeps the stages of a run, and asks the process to stop once a stage has come to a step."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.stages = stop, {}

    @hookimpl
    def kd_stage_started(self, stage: Any) -> None:
        self.stages[stage.name] = stage

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if (stage.name, step) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def run(recipe: Any, where: Path, watch: Watch | None = None) -> Result:
    manager = PluginManager()
    manager.register(watch or Watch(), name="watch")
    return api.run(recipe, run_dir=where, plugins=manager)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that measures its teacher."""
    recipe = small(method={"measure_teacher": True, "feature_mode": "full"})
    return run(recipe, tmp_path_factory.mktemp("whole") / "run")


# -- stages


def test_the_run_folder_holds_teacher_states_student_and_the_teachers_accuracy(whole):
    stages = whole.path / "stages"
    saved = transformers.AutoModelForCausalLM.from_pretrained(stages / "01-tune" / "artifact" / "teacher")
    assert saved.config.hidden_size == 16
    rows = Dataset.load_from_disk(str(stages / "02-features" / "artifact" / "data"))
    assert set(rows.column_names) == {"node", "hop", "variant", "state", "answer"}
    assert rows.features["state"].feature.dtype == "float32"
    assert len(set(rows["node"])) == 60
    names = [row["model"] for row in whole.rows]
    assert names == ["teacher, hop 0", "teacher, hop 1", "teacher, hop 2", "teacher, all hops"]
    assert all(0 <= row["test/accuracy"] <= 1 for row in whole.rows)
    terms = [json.loads(line).get("terms", {}) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    assert {name for row in terms for name in row} == {"completion", "lingugkd/ce", "lingugkd/nce"}
    assert kdcore.evaluate(whole.path) == whole.metrics
    assert "arXiv:2402.05894" in (whole.path / "README.md").read_text()


@pytest.mark.parametrize("stop", [("tune", 3), ("features", 2), ("distill", 3)])
def test_killed_in_any_stage_it_ends_as_if_it_had_not_been(tmp_path, whole, monkeypatch, stop):
    recipe = small(method={"measure_teacher": True, "feature_mode": "full"})
    with pytest.raises(Interrupted, match=f"interrupted in stage '{stop[0]}'"):
        run(recipe, tmp_path / "run", Watch(stop))
    written, write = [], Features._write
    monkeypatch.setattr(Features, "_write", lambda s, path, number: written.append(number) or write(s, path, number))
    resumed = run(recipe, tmp_path / "run")
    assert resumed.metrics == whole.metrics
    assert resumed.rows == whole.rows
    assert_same_students(whole.path, resumed.path)
    shards = len(list((resumed.path / "stages" / "02-features" / "shards").iterdir()))
    assert written == {"tune": list(range(shards)), "features": list(range(2, shards)), "distill": []}[stop[0]]


def test_a_damaged_shard_alone_is_computed_again(tmp_path, whole, monkeypatch):
    recipe = small(method={"measure_teacher": True, "feature_mode": "full"})
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", Watch(("features", 3)))
    (file,) = (tmp_path / "run" / "stages" / "02-features" / "shards" / "000001").glob("*.arrow")
    file.write_bytes(b"damaged")
    written, write = [], Features._write
    monkeypatch.setattr(Features, "_write", lambda s, path, number: written.append(number) or write(s, path, number))
    resumed = run(recipe, tmp_path / "run")
    assert written[:2] == [1, 3]
    assert_same_students(whole.path, resumed.path)


def test_features_of_an_earlier_run_give_the_same_student_without_a_teacher(tmp_path, whole):
    recipe = small(method={"features": str(whole.path), "measure_teacher": True})
    recipe.pop("teacher")
    recipe["stages"] = {}
    again = run(recipe, tmp_path / "run")
    assert sorted(p.name for p in (again.path / "stages").iterdir()) == ["01-distill"]
    assert again.rows == whole.rows
    recipe["method"]["features"] = str(whole.path / "stages" / "02-features" / "artifact")
    assert run(recipe, tmp_path / "other").metrics == again.metrics


def test_states_are_computed_for_training_nodes_alone_unless_the_teacher_is_measured(tmp_path):
    result = run(small(), tmp_path / "run")
    rows = Dataset.load_from_disk(str(result.path / "stages" / "02-features" / "artifact" / "data"))
    data = api.load_student(result.path)[0].data
    assert set(rows["node"]) == set(data.nodes("train").tolist())
    assert set(rows["answer"]) == {-2}
    assert result.rows == []


def accuracies(result: Result) -> list[float]:
    """What the student had on val in each evaluation."""
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return [row["metrics"]["val/accuracy"] for row in rows if row["stage"] == "distill" and "metrics" in row]


def test_the_best_epoch_on_val_is_kept_or_the_last(tmp_path, whole):
    assert len(accuracies(whole)) == 3
    assert whole.metrics["val/accuracy"] == max(accuracies(whole))
    # a rate that is far too high, so that the last epoch is not the best
    train = {**small()["train"], "steps": 40, "optimizer": {"lr": 2.0}, "schedule": "constant"}
    found = {}
    for selection in ("best", "last"):
        method = {"features": str(whole.path), "selection": selection}
        result = run(small(method=method, train=train), tmp_path / selection)
        found[selection] = result.metrics["val/accuracy"]
    assert found == {"best": max(accuracies(result)), "last": accuracies(result)[-1]}
    assert found["best"] > found["last"]


class Mine:
    """Offers a data set under the name `mine`."""

    def __init__(self, data: GraphData) -> None:
        self.data = data

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "mine", target=lambda options: self.data)]


def test_labels_of_nodes_that_are_not_trained_on_change_nothing(tmp_path, whole):
    """Neither prompts nor losses may see them; only the choice of the best epoch reads those of val."""
    found = []
    data = api.load_student(whole.path)[0].data
    for number in range(2):
        labels = data.graph.y.clone()
        others = torch.cat([data.nodes("val"), data.nodes("test")])
        labels[others] = (labels[others] + number) % 4
        nodes = {split: data.nodes(split) for split in data.splits}
        changed = GraphData(data.graph.x, data.graph.edge_index, labels, nodes, data.task.classes, texts=data.texts)
        manager = PluginManager()
        manager.register(Mine(changed), name="mine")
        recipe = small(data="mine", method={"selection": "last", "tuning": "full"})
        found.append(api.run(recipe, run_dir=tmp_path / str(number), plugins=manager))
    assert_same_students(found[0].path, found[1].path)
    assert found[0].metrics != found[1].metrics


def test_isolated_nodes_and_a_graph_without_edges_work(tmp_path):
    data = {"use": "stochastic-block", "nodes": 60, "train_per_class": 5, "val": 20, "degree": 0}
    result = run(small(data=data), tmp_path / "run")
    rows = Dataset.load_from_disk(str(result.path / "stages" / "02-features" / "artifact" / "data"))
    assert set(rows["hop"]) == {0}
    assert result.metrics["test/accuracy"] >= 0


def test_mini_batches_with_drawn_neighbours_and_drawn_contrasts(tmp_path, whole):
    data = {**small()["data"], "fanout": [3, 2]}
    method = {"features": str(whole.path), "nce_nodes": 4, "symmetric": True}
    train = {**small()["train"], "batch_size": 8, "grad_accumulation": 2}
    result = run(small(data=data, method=method, train=train), tmp_path / "run")
    assert set(result.metrics) == {"val/accuracy", "test/accuracy"}


@pytest.mark.parametrize("kind", ["sage", "gat", "gin"])
def test_every_network_is_a_student(tmp_path, whole, kind):
    result = run(small(student={"use": kind, "hidden": 8}, method={"features": str(whole.path)}), tmp_path / "run")
    assert kdcore.evaluate(result.path) == result.metrics


def test_gradient_goes_to_the_student_alone(tmp_path, whole):
    watch = Watch()
    run(small(method={"features": str(whole.path)}), tmp_path / "run", watch)
    stage = watch.stages["distill"]
    batch = stage.data.sample("train", 8)
    sum(stage(batch).values()).backward()
    assert batch[TEACHER].shape == (8, 3, 16)
    assert not batch[TEACHER].requires_grad
    assert all(p.grad is None for p in stage.best.parameters())
    assert all(p.grad is not None for name, p in stage.student.named_parameters())


def test_python_users_hand_over_a_graph_a_student_and_a_language_model(tmp_path, whole):
    data = api.load_student(whole.path)[0].data
    folder = str(whole.path / "stages" / "01-tune" / "artifact" / "teacher")
    teacher = kdcore.Model(transformers.AutoModelForCausalLM.from_pretrained(folder))
    train = {"steps": 3, "batch_size": 20}
    result = kdcore.distill(teacher, gcn(GNNOptions(hidden=8), data.task), data, "lingugkd", tuning="none",
                            neighbours=2, tokenizer=folder, train=train, run_dir=tmp_path / "run")  # fmt: skip
    assert "val/accuracy" in result.metrics
    with pytest.raises(ModelError, match="needs the tokenizer of the model handed over"):
        kdcore.distill(teacher, gcn(GNNOptions(hidden=8), data.task), data, "lingugkd", run_dir=tmp_path / "other")


# -- what it does


def prototypes(folder: Path, data: Any, shuffled: bool = False) -> str:
    """States that a teacher might have: the class's prototype, rotated for each hop, noise and four more dimensions."""
    generator = torch.Generator().manual_seed(0)
    nodes, labels = data.nodes("train"), data.labels("train")
    means = torch.randn(data.task.class_count, 64, generator=generator)
    own = torch.randn(len(nodes), 64, generator=generator)
    order = torch.randperm(len(nodes), generator=generator) if shuffled else torch.arange(len(nodes))
    rows: dict[str, list[Any]] = {"node": [], "hop": [], "variant": [], "state": [], "answer": []}
    for hop in range(3):
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
        states = torch.cat([(means[labels] + 0.3 * own) @ rotation, torch.randn(len(nodes), 4, generator=generator)], 1)
        rows["node"] += nodes.tolist()
        rows["hop"] += [hop] * len(nodes)
        rows["state"] += states[order].tolist()
    rows["variant"], rows["answer"] = [0] * len(rows["node"]), [-2] * len(rows["node"])
    Dataset.from_dict(rows).save_to_disk(str(folder / "data"))
    (folder / FACTS).write_text(json.dumps({"nodes": len(data.graph.y), "hops": 2}))
    return str(folder)


def test_a_telling_teacher_helps_and_a_shuffled_one_does_not(tmp_path):
    """300 nodes in four communities, 16 weak features, 20 training nodes per class, two graph convolutions."""
    recipe = small(data={"use": "stochastic-block", "signal": 0.6}, student={"use": "gcn", "hidden": 32},
                   train={"steps": 80, "batch_size": 80, "eval_every": 100, "save_every": 100,
                          "optimizer": {"lr": 0.01}}, stages={})  # fmt: skip
    recipe.pop("teacher")
    alone = {"distillation": False}
    data = api.load_student(run({**recipe, "method": {"use": "lingugkd", **alone}}, tmp_path / "first").path)[0].data
    variants: dict[str, dict[str, Any]] = {
        "alone": alone,
        "distilled": {"features": prototypes(tmp_path / "telling", data)},
        "shuffled": {"features": prototypes(tmp_path / "shuffled", data, shuffled=True)},
    }
    scores: dict[str, list[float]] = {name: [] for name in variants}
    rates = []
    for seed in range(3):
        for name, options in variants.items():
            watch = Watch()
            method = {"use": "lingugkd", "selection": "last", **options}
            result = run({**recipe, "method": method, "seed": seed}, tmp_path / f"{name}-{seed}", watch)
            scores[name].append(result.metrics["test/accuracy"])
            if name == "distilled":
                rates.append(retrieval(watch.stages["distill"]))
    means = {name: statistics.mean(values) for name, values in scores.items()}
    assert means["distilled"] > means["alone"] + 0.01
    assert means["distilled"] > means["shuffled"] + 0.01
    assert min(rates) > 0.8


def retrieval(stage: Any) -> float:
    """How often a training node's state at the last hop is nearest to its own of the teacher."""
    batch, loss = stage.data.sample("train", 80), stage.losses["lingugkd"]
    stage.eval()
    with torch.no_grad():
        ours: Tensor = stage.student(batch).extras["hidden"][-1]
        theirs = loss.projectors(list(batch[TEACHER].unbind(1)))[-1]
    return float(retrieval_rate(ours, theirs, batch["label"]))


def test_beats_its_ablation(tmp_path):
    """Measured over six seeds: 2.4 points of accuracy on val, 2.0 on test; 2.2 on val over these three."""
    assert effect("lingugkd", tmp_path) > 0.01


# -- what does not fit


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": {"hops": 3}}, ModelError, r"hops 0 to 3 .* only 2 message-passing layers: set method.hops=2"),
        ({"method": {"template": "{{ txt }}"}}, RecipeError, "has no field 'txt'; did you mean 'text'"),
        ({"method": {"template": "{{ text"}}, RecipeError, "template .* is not valid"),
        ({"data": {"use": "stochastic-block", "words": 0}}, DataError, "nodes' texts, and this graph has none"),
        ({"data": "digits", "student": "demo-cnn"}, DataError, "needs a graph whose nodes have texts"),
        ({"eval": {"on": ["test"]}}, RecipeError, "method.selection=best would pick the student by its test nodes"),
        ({"method": {"features": "nowhere"}}, RecipeError, "'nowhere' is no run folder with a finished stage"),
        ({"teacher": {"use": "demo-transformer"}}, ModelError, "must be a causal language model"),
        ({"method": {"max_length": 10}}, DataError, "raise method.max_length above 10"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_a_clear_sentence(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(small(**changes), tmp_path / "run")


def test_a_recipe_without_a_teacher_is_told_what_it_lacks(tmp_path):
    recipe = small()
    recipe.pop("teacher")
    with pytest.raises(RecipeError, match=r"needs a teacher, a causal language model .* method.features"):
        run(recipe, tmp_path / "run")


def test_features_of_another_graph_or_of_fewer_hops_are_refused(tmp_path, whole):
    other = small(data={"use": "stochastic-block"}, method={"features": str(whole.path)})
    with pytest.raises(RecipeError, match="is of a graph of 60 nodes and 2 hops; here are 300 nodes"):
        run(other, tmp_path / "run")
    deeper = small(method={"features": str(whole.path), "hops": 3}, student={"use": "gcn", "hidden": 8, "layers": 3},
                   data={**small()["data"], "hops": 3})  # fmt: skip
    with pytest.raises(RecipeError, match=r"method.hops is 3"):
        run(deeper, tmp_path / "run")


def test_features_without_answers_are_refused_where_answers_are_read(tmp_path):
    first = run(small(), tmp_path / "first")
    for method in ({"measure_teacher": True}, {"feature_mode": "correct"}):
        with pytest.raises(RecipeError, match="the teacher was not asked for answers"):
            run(small(method={"features": str(first.path), **method}), tmp_path / "run")


def graph_run(where: Path, labels: Tensor, splits: dict[str, Any], **changes: Any) -> Result:
    """A run on a graph of 60 nodes in two classes, with an untuned teacher."""
    edges = torch.stack([torch.arange(59), torch.arange(1, 60)])
    data = GraphData(torch.randn(60, 4), edges, labels, splits, ["a", "b"], texts=[f"text {i}" for i in range(60)])
    manager = PluginManager()
    manager.register(Mine(data), name="mine")
    recipe = small(data="mine", **{"method": {"tuning": "none"}, **changes})
    return api.run(recipe, run_dir=where, plugins=manager)


def test_training_nodes_without_labels_are_left_out_with_a_warning(tmp_path, caplog):
    labels = torch.arange(60) % 2
    splits = {"train": range(30), "val": range(30, 50), "test": range(50, 60)}
    with caplog.at_level(logging.WARNING):
        graph_run(tmp_path / "some", labels.where(torch.arange(60) > 3, IGNORE), splits)
    assert "4 of 30 training nodes lack a state of the teacher and are left out" in caplog.text
    with pytest.raises(DataError, match="no node of the split 'train' has a label"):
        graph_run(tmp_path / "none", labels.where(torch.arange(60) >= 30, IGNORE), splits)


def test_without_a_val_split_the_last_student_must_be_asked_for(tmp_path):
    labels, splits = torch.arange(60) % 2, {"train": range(30), "test": range(50, 60)}
    with pytest.raises(RecipeError, match="picks the student by the split 'val', which the data does not have"):
        graph_run(tmp_path / "best", labels, splits, eval={})
    last = {"tuning": "none", "selection": "last"}
    assert set(graph_run(tmp_path / "last", labels, splits, eval={}, method=last).metrics) <= {"test/accuracy"}


def test_the_loss_alone_needs_data_with_states(tmp_path):
    recipe = small(method={"use": "distill"}, losses=["cross-entropy", "lingugkd"])
    recipe["method"], recipe["stages"] = "distill", {}
    recipe.pop("teacher")
    with pytest.raises(ModelError, match="the loss 'lingugkd' reads `label` and 'teacher_hidden' from the data"):
        run(recipe, tmp_path / "run")
    assert LossOptions().tau == 0.07


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.tau=0", "method.tau: .*greater than 0"),
        ("method.hops=-1", "method.hops: .*greater than or equal to 0"),
        ("method.tuning=qlora", "method.tuning: .*'lora', 'full' or 'none'"),
        ("method.quantize=nf4 method.tuning=full", "method: .*quantize=nf4 is for tuning=lora.*tuning is full"),
        ("method.quantize=nf4 method.tuning=none", "method: .*quantize=nf4 is for tuning=lora.*tuning is none"),
        ("method.lora.rank=0", "method.lora.rank: .*greater than 0"),
        ("method.lora.ranks=4", "method.lora.ranks: unknown key.*rank"),
        ("method.temperature=1", "method.temperature: unknown key"),
        ("stages.tuning.train.epochs=1", "no such stage.*tune"),
    ],
)
def test_wrong_options_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("lingugkd", change.split())
