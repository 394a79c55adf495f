"""Numbers that go wrong, and memory that runs out."""

from __future__ import annotations

import json

import pytest
import torch

import kdcore
from kdcore import Component
from kdcore.checkpoint import latest
from kdcore.diagnose import replay
from kdcore.errors import RunFailed, RunFolderError
from kdcore.guards import Before, first_not_finite
from kdcore.testing.conformance import assert_same_students


class Wrong(kdcore.Loss):
    """Finite, with a gradient that is not, at the sixth step."""

    needs = {"student": ("logits",)}

    def forward(self, student, teacher, batch):
        value = student.logits.square().mean()
        return value + (value * 0).sqrt() if self.progress.step == 5 else value


class Greedy(kdcore.Loss):
    """Has memory for four samples at once, and keeps count in a buffer."""

    needs = {"student": ("logits",)}

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, student, teacher, batch):
        self.seen += len(student.logits)
        if self.training and len(student.logits) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return student.logits.square().mean()


class Faults:
    @kdcore.hookimpl
    def kd_register_losses(self):
        return [
            Component("loss", "wrong", lambda o: Wrong()),
            Component("loss", "greedy", lambda o: Greedy()),
        ]


@pytest.fixture
def faulty(recipe, manager):
    """A run of one loss: `go(loss, folder, *overrides)`."""
    manager.register(Faults())
    recipe |= {"method": "listed", "train": {**recipe["train"], "save_every": 2}}

    def go(loss, path, *overrides):
        return kdcore.run({**recipe, "losses": [loss]}, overrides, run_dir=path, plugins=manager)

    return go


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("loss", "said"), [("explodes", "the term 'explodes' became nan"), ("wrong", "the gradient norm became nan")]
)
def test_a_bad_number_stops_the_run_with_its_step_and_samples_and_the_last_good_checkpoint_stays(
    loss, said, faulty, tmp_path
):
    with pytest.raises(RunFailed, match=rf"{said} at step 6; samples of that batch: \[\d+, .*train.nonfinite=skip"):
        faulty(loss, tmp_path)
    path, facts = latest(tmp_path / "stages" / "01-distill" / "checkpoints")
    assert facts["step"] == 4
    assert json.loads((tmp_path / "failure.json").read_text())["step"] == 6


@pytest.mark.parametrize(("loss", "module"), [("explodes", "losses.explodes"), ("wrong", None)])
def test_a_replay_finds_where_the_number_came_from_and_leaves_the_run_as_it_is(loss, module, faulty, manager, tmp_path):
    with pytest.raises(RunFailed):
        faulty(loss, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = replay(tmp_path, manager)
    assert (found.stage, found.step, found.module) == ("distill", 6, module)
    assert found.parameter == "student.module.0.weight"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_in_which_nothing_went_wrong_has_no_replay(recipe, manager, tmp_path):
    kdcore.run(recipe, run_dir=tmp_path, plugins=manager)
    with pytest.raises(RunFolderError, match="no step of this run went wrong"):
        replay(tmp_path, manager)


def test_a_bad_step_is_skipped_counted_and_leaves_the_model_as_it_was(faulty, tmp_path):
    result = faulty("wrong", tmp_path, "train.nonfinite=skip")
    (skipped,) = [row for row in rows(tmp_path) if "skipped" in row]
    assert (skipped["step"], skipped["skipped"]) == (6, "a gradient is not finite")
    assert len(skipped["samples"]) == 16
    assert first_not_finite(result.student.named_parameters()) is None


def test_too_many_skipped_steps_stop_the_run_also_after_a_resume(faulty, tmp_path):
    for said in ("3 steps were skipped at step 8", "3 steps were skipped at step 8"):
        with pytest.raises(RunFailed, match=said):
            faulty("explodes", tmp_path, "train.nonfinite=skip", "train.max_skipped=2")
    steps = [row["step"] for row in rows(tmp_path) if "skipped" in row]
    assert steps == [6, 7, 8]


def test_without_memory_the_message_says_what_to_change(faulty, tmp_path):
    with pytest.raises(RunFailed, match=r"out of memory on cpu at step 1 with 16 samples.*train.grad_accumulation=2"):
        faulty("greedy", tmp_path)


def test_halving_gives_what_smaller_micro_batches_give(faulty, tmp_path):
    change = ["train.optimizer={name: sgd, lr: 0.1}"]
    halved = faulty("greedy", tmp_path / "a", "train.on_oom=halve", *change)
    asked = faulty("greedy", tmp_path / "b", "train.grad_accumulation=4", *change)
    assert_same_students(halved.path, asked.path)
    with pytest.raises(RunFailed, match="out of memory"):
        faulty("greedy", tmp_path / "c", "train.on_oom=halve", "train.batch_size=9", *change)


def test_an_output_that_is_not_finite_is_no_result(recipe, manager, tmp_path, monkeypatch):
    def broken(self, batch):
        outputs = self.student(batch)
        outputs.logits[1] = float("nan")
        return outputs

    monkeypatch.setattr(kdcore.Distill, "evaluate", broken)
    with pytest.raises(RunFailed, match=r"the output is NaN or infinite .* samples \[0, 1, .*\] of split 'val'"):
        kdcore.run(recipe, run_dir=tmp_path, plugins=manager)


def test_buffers_and_random_numbers_go_back_to_what_they_were_whatever_was_done_to_them():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("queue", torch.zeros(3))
    kept, following = Before(module, torch.device("cpu")), torch.rand(3)
    module(torch.randn(4, 2))
    module.queue = torch.ones(5)
    kept.restore()
    assert torch.equal(torch.rand(3), following)
    assert module.running_mean.tolist() == [0, 0]
    assert module.num_batches_tracked == 0
    assert module.queue.tolist() == [0, 0, 0]
