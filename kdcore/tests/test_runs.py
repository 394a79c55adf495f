"""Runs: the same again, killed and resumed, accumulated, staged, stopped, refused."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest
import torch

import kdcore
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError, RunFailed, RunFolderError
from kdcore.testing.conformance import assert_same_students


class At:
    """Does something at the n-th step of this session."""

    def __init__(self, step, action):
        self.left, self.action = step, action

    @kdcore.hookimpl
    def kd_step_finished(self, run):
        self.left -= 1
        if self.left == 0:
            self.action(run)


def sigint(run):
    os.kill(os.getpid(), signal.SIGINT)


def go(recipe, manager, path, **changes):
    return kdcore.run(recipe, [f"{k}={v}" for k, v in changes.items()], run_dir=path, plugins=manager)


@pytest.mark.parametrize("method", ["toy-kd", "fit", "adversarial"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(method, recipe, manager, tmp_path):
    recipe["method"] = method
    a, b, c = (go(recipe, manager, tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_students(a.path, b.path)
    assert a.metrics == b.metrics
    with pytest.raises(AssertionError):
        assert_same_students(a.path, c.path)


@pytest.mark.parametrize("method", ["toy-kd", "fit", "adversarial"])
@pytest.mark.parametrize("stops", [(1, 3), (2, 1, 4), (7,)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(method, stops, recipe, manager, tmp_path, request):
    recipe["method"] = method
    whole = go(recipe, manager, tmp_path / "whole")
    for number, stop in enumerate(stops):
        manager.register(At(stop, sigint), name=f"at-{number}")
        with pytest.raises(Interrupted):
            go(recipe, manager, tmp_path / "cut")
        assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    resumed = go(recipe, manager, tmp_path / "cut")
    assert_same_students(whole.path, resumed.path)
    assert (whole.path / "metrics.jsonl").read_text() == (resumed.path / "metrics.jsonl").read_text()
    assert not [p for p in resumed.path.rglob("*") if "tmp" in p.name]


def test_a_crash_between_checkpoints_goes_on_from_the_last_one(recipe, manager, tmp_path):
    whole = go(recipe, manager, tmp_path / "whole")

    def crash(run):
        raise SystemExit("killed")

    manager.register(At(8, crash), name="crash")
    with pytest.raises(SystemExit):
        go(recipe, manager, tmp_path / "cut")
    steps = [p.name for p in sorted((tmp_path / "cut" / "stages" / "01-distill" / "checkpoints").iterdir())]
    assert steps == ["step-00000003", "step-00000006"]
    assert_same_students(whole.path, go(recipe, manager, tmp_path / "cut").path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(recipe, manager, tmp_path, caplog):
    whole = go(recipe, manager, tmp_path / "whole")
    manager.register(At(8, sigint), name="stop")
    with pytest.raises(Interrupted):
        go(recipe, manager, tmp_path / "cut")
    newest = max((tmp_path / "cut" / "stages" / "01-distill" / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with caplog.at_level(logging.WARNING):
        resumed = go(recipe, manager, tmp_path / "cut")
    assert newest.name in caplog.text
    assert "model.safetensors" in caplog.text
    assert_same_students(whole.path, resumed.path)


def test_a_damaged_artifact_is_refused(recipe, manager, tmp_path):
    recipe["method"] = "fit"
    manager.register(At(2, sigint), name="stop")
    with pytest.raises(Interrupted):
        go(recipe, manager, tmp_path / "run")
    (tmp_path / "run" / "stages" / "01-mean" / "artifact" / "tensors.safetensors").write_bytes(b"junk")
    with pytest.raises(RunFolderError, match=r"01-mean.*tensors.safetensors"):
        go(recipe, manager, tmp_path / "run")


def test_finished_stages_are_loaded_and_not_run_again(recipe, manager, tmp_path):
    recipe["method"] = "fit"
    fitted = type(manager.get("method", "fit").load_target())  # the class, to reach its module
    module = __import__(manager.get("method", "fit").target.__module__, fromlist=["Mean"])
    module.Mean.fitted = 0
    manager.register(At(14, sigint), name="stop")  # in the last of three stages
    with pytest.raises(Interrupted):
        go(recipe, manager, tmp_path / "run")
    go(recipe, manager, tmp_path / "run")
    assert module.Mean.fitted == 1
    assert fitted is type


def test_accumulation_changes_nothing_but_memory(recipe, manager, tmp_path):
    recipe["teacher"] = recipe["student"] = {"use": "toy"}
    plain = {"method": "listed", **{k: v for k, v in recipe.items() if k != "method"},
             "losses": [{"use": "explodes", "weight": 0.01}, {"use": "soft"}]}  # fmt: skip
    plain["train"] = {**recipe["train"], "steps": 4}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
        one = go(plain, manager, tmp_path / "one")
        four = go(plain, manager, tmp_path / "four", **{"train.grad_accumulation": 4})
    assert_same_students(one.path, four.path, tolerance=1e-5)


def test_a_term_that_is_not_finite_stops_the_run_and_is_named(recipe, manager, tmp_path):
    recipe.update(method="listed", losses=["explodes"])
    with pytest.raises(RunFailed, match=r"'explodes' became nan at step 6; samples of that batch: \[\d+, "):
        go(recipe, manager, tmp_path / "run")
    kept = (tmp_path / "run" / "stages" / "01-distill" / "checkpoints").iterdir()
    assert [p.name for p in kept] == ["step-00000003"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_model_may_be_trained_before_the_method_and_its_folder_be_a_checkpoint(recipe, manager, tmp_path):
    recipe["teacher"] = {"use": "toy", "train": {"epochs": 1}}
    result = go(recipe, manager, tmp_path / "run")
    assert (result.path / "stages" / "01-teacher" / "artifact" / "teacher" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"]: r["step"] for r in rows} == {"teacher": 4, "distill": 12}


def test_every_objective_has_its_own_optimizer_and_schedule(recipe, manager, tmp_path):
    recipe["method"] = "adversarial"
    seen = []

    class Watch:
        @kdcore.hookimpl
        def kd_step_finished(self, stage, step, terms):
            seen.append(sorted(terms))
            if step == 12:
                self.rates = [g["lr"] for o in stage.made.values() for g in o.param_groups]

    module = __import__(manager.get("method", "adversarial").target.__module__, fromlist=["TwoPhases"])
    make = module.TwoPhases.optimizers
    watch = Watch()
    manager.register(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module.TwoPhases, "optimizers", lambda self, train: setattr(self, "made", make(self, train)) or self.made
        )
        go(recipe, manager, tmp_path / "run")
    assert seen == [["critic", "fool"]] * 12
    assert watch.rates[0] == pytest.approx(0.1)  # constant
    assert watch.rates[1] < 0.001  # the recipe's cosine, at its last step


def test_an_observer_can_end_a_stage_early(recipe, manager, tmp_path):
    manager.register(At(5, lambda run: run.request_stop("enough")), name="stop")
    result = go(recipe, manager, tmp_path / "run")
    assert json.loads((result.path / "run.json").read_text())["timings"]["distill"]["steps"] == 5


def test_an_observer_that_fails_is_named_and_does_no_harm(recipe, manager, tmp_path, caplog):
    manager.register(At(2, lambda run: 1 / 0), name="clumsy")
    go(recipe, manager, tmp_path / "run")
    assert "clumsy" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_per_stage_overrides_count_and_unknown_stages_are_refused(recipe, manager, tmp_path):
    result = go(recipe, manager, tmp_path / "a", **{"stages.distill.train.steps": 2})
    assert json.loads((result.path / "run.json").read_text())["timings"]["distill"]["steps"] == 2
    with pytest.raises(RecipeError, match=r"stages.distil: .*did you mean 'distill'"):
        go(recipe, manager, tmp_path / "b", **{"stages.distil.train.steps": 2})
    assert not (tmp_path / "b").exists()


def test_folders_that_cannot_be_used_are_refused_with_a_way_out(recipe, manager, tmp_path):
    done = go(recipe, manager, tmp_path / "done")
    with pytest.raises(RunFolderError, match=r"--resume .* --run-dir .*done-2"):
        go(recipe, manager, done.path)
    again = kdcore.run(recipe, run_dir=done.path, plugins=manager, resume=True)
    assert again.metrics == done.metrics
    with pytest.raises(RunFolderError, match=r"another recipe \(different: seed: 0 there, 1 now\)"):
        go(recipe, manager, done.path, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="a file is in the way"):
        go(recipe, manager, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"not a run folder: it holds thesis.tex"):
        go(recipe, manager, tmp_path / "other")


def test_a_recipe_runs_again_from_the_folder_as_it_is(recipe, manager, tmp_path):
    first = go(recipe, manager, tmp_path / "a")
    assert_same_students(first.path, go(first.path / "recipe.yaml", manager, tmp_path / "b").path)


def test_what_the_method_needs_is_checked_before_anything_is_written(recipe, manager, tmp_path):
    cases = [
        ({k: v for k, v in recipe.items() if k != "teacher"}, RecipeError, "needs a teacher with the role 'teacher'"),
        ({**recipe, "losses": ["soft"]}, RecipeError, "takes no `losses:` list"),
        ({**recipe, "eval": {"metrics": ["acuracy"]}}, RecipeError, "did you mean 'accuracy'"),
        ({**recipe, "eval": {"on": ["tset"]}}, DataError, "no split 'tset'"),
    ]
    for number, (bad, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message):
            go(bad, manager, tmp_path / str(number))
        assert not (tmp_path / str(number)).exists()


def test_modules_and_data_sets_are_distilled_without_a_recipe(manager, tmp_path):
    from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

    x = torch.randn(60, 6)
    y = (x.sum(1) > 0).long()
    make = lambda width: torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))  # noqa: E731
    train = DataLoader(TensorDataset(x, y), batch_size=8, sampler=WeightedRandomSampler(torch.ones(60), 60))
    student = make(4)
    before = [p.clone() for p in student.parameters()]
    result = kdcore.distill(make(16), student, (train, TensorDataset(x, y)), "toy-kd", plugins=manager,
                            train={"epochs": 2, "batch_size": 8}, run_dir=tmp_path / "run")  # fmt: skip
    assert "val/accuracy" in result.metrics
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    kdcore.distill(make(16), make(4), TensorDataset(x, y), {"use": "toy-kd"}, plugins=manager, train={"steps": 1},
                   run_dir=tmp_path / "mapping")  # fmt: skip
    assert (tmp_path / "mapping" / "student").is_dir()
    with pytest.raises(ModelError, match="teacher has 3 classes, student has 2"):
        kdcore.distill(torch.nn.Linear(6, 3), make(4), TensorDataset(x, y), "toy-kd", plugins=manager,
                       task=kdcore.Task("classification"), run_dir=tmp_path / "bad")  # fmt: skip
