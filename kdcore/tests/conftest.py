"""A toy plugin: small data, models, losses and methods that the tests of the core put together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdcore
from kdcore import Component, DataModule, Distill, Loss, Method, Model, Outputs, Roles, Task
from kdcore.losses import TaskLoss, Weighted
from kdcore.models import Labels
from kdcore.recipe import ScheduleOptions
from kdcore.stages import FitStage, TrainStage

torch.set_num_threads(1)


def toy_data(options: object = None) -> DataModule:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=generator)
    y = (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 0.5).long()
    split = torch.utils.data.TensorDataset(x, y)
    train, val = torch.utils.data.random_split(split, [64, 32], generator)
    return DataModule({"train": train, "val": val}, Task("classification", ("a", "b", "c")), keys=("series", "label"))


def net(width: int, classes: int = 3, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(width, classes))


def toy_model(options: object, task: Task) -> Model:
    return Model(net(8, task.class_count, dropout=0.3), labels=Labels(task.num_classes), stages=("0", "1"))


class SoftTargets(Loss):
    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        return F.kl_div(student.logits.log_softmax(1), teacher.logits.softmax(1), reduction="batchmean")


class Explodes(Loss):
    needs = {"student": ("logits",)}

    def forward(self, student: Outputs, teacher: Outputs, batch: dict) -> torch.Tensor:
        bad = float("nan") if self.progress.step >= 5 else 1.0
        return student.logits.square().mean() * bad


class ToyKD(Method):
    stage_names = ("distill",)

    def stages(self, run):
        losses = [Weighted(TaskLoss(run.data.task), 0.5, "task"), Weighted(SoftTargets(), 0.5, "soft")]
        yield Distill(run.student, losses, run.teachers())


class Listed(Method):
    roles = Roles(teachers=None, losses=True)

    def stages(self, run):
        yield Distill(run.student, run.losses(), run.teachers())


class Mean(FitStage):
    name = "mean"
    fitted = 0

    def fit(self, run):
        type(self).fitted += 1
        return {"mean": torch.stack([run.data["train"][i][0] for i in range(8)]).mean(0)}


class FitThenTrain(Method):
    def stages(self, run):
        artifact = yield Mean()
        assert artifact["mean"].shape == (6,)
        stage = yield Distill(run.student, [Weighted(SoftTargets(), name="soft")], run.teachers(), name="first")
        assert stage.metrics
        yield Distill(run.student, [Weighted(TaskLoss(run.data.task), name="task")], name="second")


class TwoPhases(TrainStage):
    """A discriminator between student and teacher logits, and a student that fools it; an EMA and a queue besides."""

    objectives = ("critic", "student")

    def __init__(self, student: Model, teacher: Model) -> None:
        super().__init__("adversarial")
        self.student, self.critic, self.frozen = student, nn.Linear(3, 1), {"teacher": teacher.freeze()}
        self.ema = net(8, dropout=0.3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 3))
        self.schedules = {"critic": ScheduleOptions(name="constant")}

    def optimizers(self, train):
        return {"critic": torch.optim.SGD(self.critic.parameters(), lr=0.1),
                "student": torch.optim.Adam(self.student.parameters(), lr=0.01)}  # fmt: skip

    def forward(self, batch, objective="critic"):
        fake = self.student(batch).logits
        if objective == "student":
            return {"fool": -self.critic(fake).mean()}
        with torch.no_grad():
            real = self.frozen["teacher"](batch).logits
        if self.training:
            self.queue = torch.cat([self.queue, real.mean(0, keepdim=True)])[1:]
        return {"critic": self.critic(fake.detach()).mean() - self.critic(real).mean()}

    def after_step(self):
        for slow, fast in zip(self.ema.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 0.1)

    def evaluate(self, batch):
        return self.student(batch)


class Adversarial(Method):
    def stages(self, run):
        yield TwoPhases(run.student, run.teacher)


class Toy:
    @kdcore.hookimpl
    def kd_register_data(self):
        return [Component("data", "toy", toy_data)]

    @kdcore.hookimpl
    def kd_register_teachers(self):
        return [Component("teacher", "toy", toy_model)]

    @kdcore.hookimpl
    def kd_register_students(self):
        return [Component("student", "toy", toy_model)]

    @kdcore.hookimpl
    def kd_register_losses(self):
        return [Component("loss", "soft", lambda o: SoftTargets()), Component("loss", "explodes", lambda o: Explodes())]

    @kdcore.hookimpl
    def kd_register_methods(self):
        methods = {"toy-kd": ToyKD, "listed": Listed, "fit": FitThenTrain, "adversarial": Adversarial}
        return [Component("method", name, cls) for name, cls in methods.items()]


@pytest.fixture
def manager() -> Iterator[kdcore.PluginManager]:
    manager = kdcore.PluginManager(discover=False)
    manager.register(Toy(), name="toy")
    yield manager


@pytest.fixture
def recipe() -> dict:
    return {"method": "toy-kd", "teacher": "toy", "student": "toy", "data": "toy", "trackers": [],
            "train": {"epochs": 3, "batch_size": 16, "save_every": 3, "log_every": 2,
                      "optimizer": {"lr": 0.02}}}  # fmt: skip
