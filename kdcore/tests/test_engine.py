"""The engine: schedules, several streams, precision, compilation, counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kdcore
from kdcore import Component, DataModule, Method, Task
from kdcore.checkpoint import own_storage
from kdcore.data import IGNORE
from kdcore.losses import Progress, TaskLoss, Weighted, count_units
from kdcore.models import Outputs
from kdcore.recipe import OptimizerOptions, ScheduleOptions
from kdcore.stages import TrainStage, make_optimizer
from kdcore.training import schedule_factor


@given(st.sampled_from(["linear", "cosine", "polynomial"]), st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 1))
def test_schedules_rise_to_one_and_fall_to_their_end(name, total, warmup, final):
    options = ScheduleOptions(name=name, warmup=warmup, final=final)
    factors = [schedule_factor(options, step, total) for step in range(total + 1)]
    assert min(factors) >= 0
    assert max(factors) <= 1 + 1e-9
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[-1] == pytest.approx(final, abs=1e-6)


def test_multistep_drops_at_its_milestones_and_constant_does_not():
    options = ScheduleOptions(name="multistep", milestones=[0.5, 0.75], gamma=0.1)
    assert [schedule_factor(options, s, 8) for s in (0, 3, 4, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    assert schedule_factor(ScheduleOptions(name="constant", warmup=2), 0, 8) == 0.5


def test_the_weight_of_a_loss_warms_up_by_epochs_counted_from_one():
    item = Weighted(TaskLoss(Task("classification", ("a",))), weight=4.0, warmup=20)
    assert [item.factor(Progress(epoch=e)) for e in (0, 9, 19, 50)] == pytest.approx([0.2, 2.0, 4.0, 4.0])


@pytest.mark.parametrize(("kind", "key", "shape"), [("classification", "label", ()), ("segmentation", "mask", (4, 4)),
                                                    ("causal-lm", "labels", (6,))])  # fmt: skip
def test_ignored_targets_do_not_count(kind, key, shape):
    torch.manual_seed(0)
    loss = TaskLoss(Task(kind, ("a", "b", "c")))
    target = torch.randint(0, 3, (5, *shape))
    logits = torch.randn(5, *((6, 3) if kind == "causal-lm" else (3, *shape[:2])))
    kept = target.clone()
    kept[3:] = IGNORE
    part = loss(Outputs(logits=logits[:3]), Outputs(), {key: target[:3]})
    torch.testing.assert_close(loss(Outputs(logits=logits), Outputs(), {key: kept}), part)
    assert count_units({key: kept}) == 3 * target[0].numel()
    nothing = loss(Outputs(logits=logits), Outputs(), {key: torch.full_like(target, IGNORE)})
    assert nothing == 0


class Streams(TrainStage):
    splits = ("train", "extra")
    seen: list = []

    def __init__(self, model):
        super().__init__("streams")
        self.model = model

    def forward(self, batch, objective="loss"):
        if self.training:
            self.seen.append((batch["train"]["index"].tolist(), batch["extra"]["index"].tolist()))
        return {"both": self.model(batch["train"]).logits.square().mean() + self.model(batch["extra"]).logits.mean()}


class StreamsMethod(Method):
    def stages(self, run):
        yield Streams(run.student)


def test_several_splits_are_drawn_together_and_the_shorter_one_again(manager, tmp_path):
    class Plugin:
        @kdcore.hookimpl
        def kd_register_methods(self):
            return [Component("method", "streams", StreamsMethod)]

    manager.register(Plugin())
    Streams.seen.clear()
    make = lambda n: [{"series": torch.randn(6)} for _ in range(n)]  # noqa: E731
    data = DataModule({"train": make(16), "extra": make(8)}, Task("unlabelled"))
    kdcore.distill(torch.nn.Linear(6, 3), torch.nn.Linear(6, 3), data, "streams", plugins=manager,
                   train={"epochs": 1, "batch_size": 4}, run_dir=tmp_path / "run")  # fmt: skip
    assert len(Streams.seen) == 4
    assert sorted(i for first, _ in Streams.seen for i in first) == list(range(16))
    assert sorted(i for _, second in Streams.seen[:2] for i in second) == list(range(8))


@pytest.mark.parametrize("change", ["train.precision=bf16", "train.compile=true", "train.clip_norm=0.1"])
def test_precision_compilation_and_clipping_train(change, recipe, manager, tmp_path, monkeypatch):
    compile_eagerly = lambda self: torch.nn.Module.compile(self, backend="eager")  # noqa: E731 - no C++ compiler needed
    monkeypatch.setattr(TrainStage, "compile", compile_eagerly)
    result = kdcore.run(recipe, ["train.steps=4", change], run_dir=tmp_path / "run", plugins=manager)
    assert 0 <= result.metrics["val/accuracy"] <= 1


def test_views_get_memory_of_their_own_before_they_are_saved():
    module = torch.nn.Module()
    module.register_buffer("queue", torch.arange(10.0)[2:])
    own_storage(module)
    assert module.queue.untyped_storage().nbytes() == module.queue.nbytes
    assert module.queue.tolist() == list(range(2, 10))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.seen: list[bool] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.conv(image)).relu()
        self.seen.append(found.is_contiguous(memory_format=torch.channels_last))
        return self.head(found.mean((2, 3)))


def test_channels_last_changes_the_layout_while_it_trains_and_nothing_else(manager, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 9, 9, generator=generator)
    data = DataModule(
        {"train": torch.utils.data.TensorDataset(images, torch.arange(32) % 3)}, Task("classification", num_classes=3)
    )
    weights = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        teacher, student = Convolutions(), Convolutions()
        train = {"epochs": 2, "batch_size": 8, "channels_last": channels_last, "save_every": 2}
        kdcore.distill(teacher, student, data, "listed", losses=[{"use": "soft"}], plugins=manager, train=train,
                       run_dir=tmp_path / str(channels_last))  # fmt: skip
        assert [sum(model.seen) for model in (student, teacher)] == ([8, 8] if channels_last else [0, 0])
        assert student.conv.weight.is_contiguous()
        assert teacher.conv.weight.is_contiguous()
        weights.append(student.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


def test_adam_is_fused_unless_it_is_told_not_to_be_or_cannot():
    layer = nn.Linear(2, 2)

    def fused(parameters, **options):
        made = make_optimizer(parameters, OptimizerOptions(**options))
        return [group["fused"] for group in made.param_groups]

    assert fused(layer.parameters()) == [True]
    assert fused([{"params": layer.parameters()}, {"params": nn.Parameter(torch.ones(1)), "lr": 0.1}]) == [True, True]
    assert fused(layer.parameters(), fused=False) == [False]
    assert fused([nn.Parameter(torch.ones(2, dtype=torch.complex64))]) == [False]
    assert fused(layer.parameters(), name="sgd", lr=0.1) == [None]
