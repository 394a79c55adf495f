"""A run of a second with every kind of stage, each with a part in the student; and moments at which things happen."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

import kdcore
from kd_cli.errors import reported
from kdcore import (
    Component,
    DataModule,
    Distill,
    GenerateStage,
    Loss,
    Method,
    Model,
    Roles,
    Sampling,
    SearchStage,
    Task,
)
from kdcore.losses import TaskLoss, Weighted
from kdcore.models import Labels
from kdcore.runner import Run
from kdcore.stages import FitStage
from kdcore.text import Answer, TextTeacher

datasets.disable_progress_bars()
torch.set_num_threads(1)

Action = Callable[[Run], Any]

WIDTH = 512
"""The student's files are larger than all others: a limit on size can hit them alone."""

RECIPE = {"method": "every-stage", "teachers": {"teacher": "toy", "writer": "words"}, "student": "toy", "data": "toy",
          "trackers": [], "stages": {"warm": {"train": {"steps": 4}}},
          "train": {"steps": 12, "batch_size": 16, "save_every": 3, "log_every": 2, "eval_every": 6}}  # fmt: skip


def data(options: object) -> DataModule:
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    samples = [{"series": row, "label": (row[0] > 0).long() + (row[1] > 0.5).long()} for row in x]
    return DataModule({"train": samples[:64], "val": samples[64:]}, Task("classification", ("a", "b", "c")))


def model(options: object, task: Task) -> Model:
    net = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Dropout(0.3), nn.Linear(WIDTH, 3))
    return Model(net, labels=Labels(task.num_classes))


class Words(TextTeacher):
    name = "words"

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Answer]]:
        return [[Answer(f"{prompt} {seed % 100}")] for prompt, seed in zip(prompts, seeds, strict=True)]


class Mean(FitStage):
    name = "mean"

    def fit(self, run: Run) -> dict[str, torch.Tensor]:
        first = torch.stack([run.data["train"][i]["series"] for i in range(8)])
        return {"mean": first.mean(0) + run.seed}


class Search(SearchStage):
    def propose(self, archive: Any, rng: Any) -> Any:
        return rng.randint(1, 1_000) if len(archive) < 6 else None

    def score(self, run: Run, candidate: Any) -> dict[str, float]:
        return {"near": -abs(candidate - 500)}


class Pull(Loss):
    """Pulls the logits towards what the stages before gave."""

    def __init__(self, goal: float) -> None:
        super().__init__()
        self.goal = goal

    def forward(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        return (student.need("logits") - self.goal).square().mean()


class EveryStage(Method):
    roles = Roles(teachers=("teacher", "writer"))
    stage_names = ("mean", "search", "corpus", "warm", "distill")

    def stages(self, run: Run) -> Iterator[Any]:
        fitted = yield Mean()
        trials = yield Search("search")
        rows = [{"word": f"w{i}"} for i in range(8)]
        corpus = yield GenerateStage("corpus", run.text_teacher("writer"), rows, "{{ word }}", Sampling(), shard_size=2)
        goal = float(fitted["mean"].sum()) + max(trial.scores["near"] for trial in trials) / 100
        losses = [Weighted(TaskLoss(run.data.task), name="task")]
        yield Distill(run.student, [*losses, Weighted(Pull(goal), name="pull")], run.teacher, name="warm")
        goal = sum(int(row["answer"].split()[-1]) for row in corpus) / 100
        yield Distill(run.student, [*losses, Weighted(Pull(goal), name="pull")], run.teacher)


class Toys:
    @kdcore.hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "toy", data)]

    @kdcore.hookimpl
    def kd_register_teachers(self) -> list[Component]:
        return [Component("teacher", "toy", model), Component("teacher", "words", Words)]

    @kdcore.hookimpl
    def kd_register_students(self) -> list[Component]:
        return [Component("student", "toy", model)]

    @kdcore.hookimpl
    def kd_register_methods(self) -> list[Component]:
        return [Component("method", "every-stage", EveryStage)]


class At:
    """Does something after a step of a stage."""

    def __init__(self, stage: str, step: int, action: Action) -> None:
        self.when, self.action = (stage, step), action

    @kdcore.hookimpl
    def kd_step_finished(self, run: Run, stage: Any, step: int) -> None:
        if (stage.name, step) == self.when:
            self.action(run)


def interrupt(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def go(path: Path, *moments: At, resume: bool = False, **changes: Any) -> kdcore.Result:
    """Run it, or go on with it."""
    manager = kdcore.PluginManager(discover=False)
    manager.register(Toys(), name="toys")
    for number, moment in enumerate(moments):
        manager.register(moment, name=f"moment-{number}")
    lines = [f"{key}={value}" for key, value in changes.items()]
    return kdcore.run(RECIPE, lines, run_dir=path, resume=resume, plugins=manager)


def as_command(path: Path, output: Path, prepare: Callable[[], At]) -> None:
    """Run it in a process of its own, that ends as the command `kd run` does."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with reported():
        go(path, prepare())
