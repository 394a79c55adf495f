"""Search stages: an archive on disk, gone on with after a kill, and students that the method makes itself."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import nn

import kdcore
from kdcore import Component, Distill, Method, Model, Roles, SearchStage, Trial
from kdcore.errors import Interrupted, ModelError, RecipeError
from kdcore.losses import Weighted
from kdcore.models import Labels
from kdcore.search import read_archive


def net(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


class Widths(SearchStage):
    """Random widths; the score is how near they come to five."""

    calls = 0

    def __init__(self, budget=6):
        super().__init__("search")
        self.budget = budget

    def propose(self, archive, rng):
        return (rng.randint(2, 9),) if len(archive) < self.budget else None

    def score(self, run, candidate):
        type(self).calls += 1
        return {"near": -abs(candidate[0] - 5)}


class SearchThenTrain(Method):
    roles = Roles(students=())
    budget = 6

    def stages(self, run):
        trials = yield Widths(self.budget)
        best = max(trials, key=lambda trial: trial.scores["near"])
        run.adopt("student", Model(net(best.candidate[0]), labels=Labels(3)))
        yield Distill(run.student, [Weighted(run.loss("soft"), name="soft")], run.teachers())
        run.add_metric("val/width", best.candidate[0], higher_is_better=False)

    def restore(self, student, folder):
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        model = net(len(weights["0.bias"]))
        model.load_state_dict(weights)
        return Model(model, labels=Labels(3))


class Forgets(SearchThenTrain):
    restore = Method.restore


class Empty(SearchThenTrain):
    budget = 0


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self):
        methods = {"search": SearchThenTrain, "empty": Empty, "forgets": Forgets}
        return [Component("method", name, cls) for name, cls in methods.items()]


class Stop:
    def __init__(self, at):
        self.left = at

    @kdcore.hookimpl
    def kd_step_finished(self):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def search(manager, recipe):
    manager.register(Plugin(), name="search")
    Widths.calls = 0
    return {**{k: v for k, v in recipe.items() if k != "student"}, "method": "search"}


def test_an_interrupted_search_goes_on_and_tries_nothing_twice(search, manager, tmp_path):
    whole = kdcore.run(search, run_dir=tmp_path / "whole", plugins=manager)
    Widths.calls = 0
    manager.register(Stop(3), name="stop")
    with pytest.raises(Interrupted, match="after 3 trials"):
        kdcore.run(search, run_dir=tmp_path / "run", plugins=manager)
    resumed = kdcore.run(search, run_dir=tmp_path / "run", plugins=manager)
    assert Widths.calls == 6
    for name in ("stages/01-search/artifact/archive.jsonl", "metrics.jsonl"):
        assert (whole.path / name).read_text() == (resumed.path / name).read_text()
    assert whole.metrics == resumed.metrics


def test_a_line_that_was_cut_off_is_tried_again(search, manager, tmp_path):
    manager.register(Stop(3), name="stop")
    with pytest.raises(Interrupted):
        kdcore.run(search, run_dir=tmp_path / "run", plugins=manager)
    archive = tmp_path / "run/stages/01-search/archive.jsonl"
    archive.write_text(archive.read_text()[:-5])
    assert len(read_archive(archive)) == 2
    kdcore.run(search, run_dir=tmp_path / "run", plugins=manager)
    trials = read_archive(tmp_path / "run/stages/01-search/artifact/archive.jsonl")
    assert len(trials) == 6
    assert Widths.calls == 7
    assert isinstance(trials[0], Trial)


def test_a_student_that_the_method_made_is_saved_measured_and_loaded(search, manager, tmp_path):
    result = kdcore.run(search, run_dir=tmp_path / "run", plugins=manager)
    assert list(result.metrics) == ["val/accuracy", "val/width"]
    facts = json.loads((result.path / "run.json").read_text())
    assert facts["higher_is_better"] is True
    run, student = kdcore.load_student(result.path, plugins=manager)
    batch = run.data.sample("val")
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(batch).logits, result.student.eval()(batch).logits)
    assert kdcore.evaluate(result.path, plugins=manager)["val/accuracy"] == result.metrics["val/accuracy"]


def test_a_method_that_cannot_load_what_it_made_says_so(search, manager, tmp_path):
    result = kdcore.run({**search, "method": "forgets"}, run_dir=tmp_path / "run", plugins=manager)
    with pytest.raises(ModelError, match="Forgets does not say how"):
        kdcore.load_student(result.path, plugins=manager)


def test_a_search_without_candidates_is_refused(search, manager, tmp_path):
    with pytest.raises(RecipeError, match="no candidate"):
        kdcore.run({**search, "method": "empty"}, run_dir=tmp_path / "run", plugins=manager)
    assert not (tmp_path / "run").exists()


def test_a_stage_may_draw_from_other_data_than_the_run(manager, recipe, tmp_path):
    class Elsewhere(Method):
        def stages(self, run):
            stage = Distill(run.student, [Weighted(run.loss("soft"), name="soft")], run.teachers())
            stage.data = kdcore.DataModule(
                {"train": [{"series": torch.randn(6), "label": 1} for _ in range(32)], "val": run.data["val"]},
                run.data.task, keys=("series", "label"))  # fmt: skip
            yield stage

    class Other:
        @kdcore.hookimpl
        def kd_register_methods(self):
            return [Component("method", "elsewhere", Elsewhere)]

    manager.register(Other(), name="other")
    result = kdcore.run({**recipe, "method": "elsewhere"}, ["train.epochs=1"], run_dir=tmp_path / "run",
                        plugins=manager)  # fmt: skip
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2  # 32 samples, not the run's 64
    assert "val/accuracy" in result.metrics
