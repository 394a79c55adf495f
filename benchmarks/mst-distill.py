"""MST-Distill between a phone and a watch that recorded the same movements, beside baselines of equal length.

    python benchmarks/mst-distill.py --data ../shared/data/sp-sw-har [--seeds 0 1 2] [--to watch phone]

The data are recordings of five movements by 20 people, with a phone in the pocket and a watch on the wrist (CC BY 4.0,
Matey-Sanz et al. 2023), cut into windows of a second of one movement: subjects 1 to 14 train, 15 to 17 validate, 18 to
20 test. Every student is the same small CNN and sees as many batches: the epochs of all stages of MST-Distill together.
The baselines too keep the student of the lowest task loss on the validation subjects. Plain KD's teacher is the same
fusion of both sensors, trained on the labels alone for as many epochs as MST-Distill trains its own.
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import tempfile
import time
import zipfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_mst_distill.selection import Best, validate, validation_due
from kdcore import Component, Distill, Method, PluginManager, Roles, Run, Stage, api, hookimpl
from kdcore.data import DataModule, Task
from kdcore.errors import DataError
from kdcore.losses import TaskLoss, Weighted
from kdcore.models import Outputs
from kdcore.options import Options

CLASSES = ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
DEVICES = {"phone": "sp", "watch": "sw"}
SUBJECTS = {"train": range(1, 15), "val": range(15, 18), "test": range(18, 21)}
ROWS, STEP = 100, 50
CO_TRAIN, ADAPT, DISTILL = 30, 5, 60
METHODS = {
    "student alone": {"use": "selected", "weight": 0.0},
    "KD, both sensors' teacher": {"use": "selected", "weight": 1.0},
    "MST-Distill, w_kl = w_lb = 0": {"use": "mst-distill", "w_kl": 0, "w_lb": 0},
    "MST-Distill": {"use": "mst-distill"},
    "MST-Distill, kl_decay = 1": {"use": "mst-distill", "kl_decay": 1},
}


class RecordingsOptions(Options):
    """Where the recordings are."""

    path: str


def recordings(options: RecordingsOptions) -> DataModule:
    """Windows `phone` and `watch` `[100, 6]`, standardised by channel on the training subjects, and `label`."""
    return DataModule(load(Path(options.path) / "sp_sw_har_subset.zip"), Task("classification", CLASSES))


@functools.cache
def load(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of each split."""
    if not file.is_file():
        raise DataError(f"data.path: there is no {file}")
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SUBJECTS}
    with zipfile.ZipFile(file) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith("_sp.csv")):
            split = next(s for s, people in SUBJECTS.items() if int(name[1:3]) in people)
            splits[split] += windows(*(read(archive, name.replace("_sp.", f"_{d}.")) for d in DEVICES.values()))
    for device in DEVICES:
        train = torch.cat([sample[device] for sample in splits["train"]])
        for sample in (s for samples in splits.values() for s in samples):
            sample[device] = (sample[device] - train.mean(0)) / train.std(0)
    return splits


def read(archive: zipfile.ZipFile, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A recording's six channels, its times in milliseconds and its labels."""
    table = np.loadtxt(io.StringIO(archive.read(name).decode()), delimiter=",", skiprows=1, dtype=str)
    labels = np.array([CLASSES.index(label) for label in table[:, 7]])
    return table[:, :6].astype(np.float32), table[:, 6].astype(np.int64), labels


def windows(phone: Any, watch: Any) -> list[dict[str, Any]]:
    """The windows of one label, every half second by the phone's rows, each with the watch's rows of the same time."""
    found = []
    for start in range(0, len(phone[0]) - ROWS + 1, STEP):
        other = int(np.abs(watch[1] - phone[1][start]).argmin())
        labels = phone[2][start : start + ROWS]
        if (labels == labels[0]).all() and other + ROWS <= len(watch[0]):
            pair = {"phone": phone[0][start : start + ROWS], "watch": watch[0][other : other + ROWS]}
            found.append({**{k: torch.from_numpy(v) for k, v in pair.items()}, "label": torch.tensor(labels[0])})
    return found


class SelectedOptions(Options):
    """Plain KD as MST-Distill weighs it; without weight, the student alone."""

    weight: float = 1.0
    temperature: float = 4.0


class SelectedStage(Distill):
    """Distillation that keeps the student of the lowest task loss on `val`, as MST-Distill does."""

    def __init__(self, run: Run, terms: list[Weighted], teachers: Any) -> None:
        super().__init__(run.student, terms, teachers)
        self.run, self.task = run, TaskLoss(run.data.task)
        self.best = Best([run.student.module])

    def after_step(self) -> None:
        """Validate when it is due."""
        if validation_due(self.run, self):
            (value,) = validate(self.run, self, self.task_loss, 1)
            self.best.offer(value, [self.student.module])

    def task_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the student, and the number of targets."""
        return self.task(self.student(batch), Outputs(), batch).reshape(1), self.task.count(batch)


class Selected(Method):
    """One stage."""

    roles = Roles(teachers=None, splits=("train", "val"))

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage, then the best student."""
        options = run.manager.get("loss", "kd").load_options()
        loss = run.loss("kd", options(temperature=self.options.temperature) if options else None)
        terms = [Weighted(TaskLoss(run.data.task), name="task")]
        if self.options.weight:
            terms.append(Weighted(loss, self.options.weight, "kd"))
        stage = yield SelectedStage(run, terms, run.teachers() if self.options.weight else None)
        run.student.module.load_state_dict(stage.best.kept[0].state_dict())


class Bench:
    """Registers the data and the baselines."""

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        """The recordings."""
        return [Component("data", "recordings", recordings, RecordingsOptions)]

    @hookimpl
    def kd_register_methods(self) -> list[Component]:
        """The baselines."""
        return [Component("method", "selected", Selected, SelectedOptions)]


def measure(name: str, target: str, seed: int, data: Path, where: Path, manager: PluginManager) -> dict[str, float]:
    """Test accuracy and F1 of one method's student, in percent; of MST-Distill also the teachers' accuracy."""
    other = next(device for device in DEVICES if device != target)
    net = {"use": "demo-sensors", "channels": 6, "width": 8}
    method, ours = METHODS[name], METHODS[name]["use"] == "mst-distill"
    teachers = {"teacher": {**net, "inputs": [*DEVICES], "width": 16}, "cross": {**net, "inputs": [other], "width": 16}}
    if not ours:
        wanted = ["teacher"] if method["weight"] else []
        teachers = {role: {**teachers[role], "train": {"epochs": CO_TRAIN}} for role in wanted}
    recipe = {
        "method": method,
        "teachers": teachers,
        "student": {**net, "inputs": [target]},
        "data": {"use": "recordings", "path": str(data)},
        "train": {"epochs": DISTILL if ours else CO_TRAIN + ADAPT + DISTILL, "batch_size": 32,
                  "log_every": 1000, "eval_every": 26, "save_every": 10_000,
                  "optimizer": {"name": "adam", "lr": 1e-3}, "schedule": "constant"},
        "eval": {"metrics": ["accuracy", "f1"], "on": ["test"]},
        "trackers": [],
        "seed": seed,
    }  # fmt: skip
    if ours:
        layers = {role: ["fc1", "fc2"] for role in teachers}
        recipe["method"] = {**method, "mask_layers": layers, "co_train_epochs": CO_TRAIN, "adapt_epochs": ADAPT}
    result = api.run(recipe, run_dir=where, plugins=manager)
    rows = {row["model"]: 100 * row["test/accuracy"] for row in result.rows if row["model"] != "student"}
    return {**{k.partition("/")[2]: 100 * v for k, v in result.metrics.items()}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sp_sw_har_subset.zip")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--to", nargs="+", choices=[*DEVICES], default=[*DEVICES], help="the student's device")
    given = parser.parse_args()
    manager = PluginManager()
    manager.register(Bench(), name="bench")
    print("| student's device | method | accuracy | F1 | teachers' accuracy: both, other | seconds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for target in given.to:
            for name in METHODS:
                began = time.perf_counter()
                found = [measure(name, target, seed, given.data, Path(folder) / f"{target}-{name}-{seed}", manager)
                         for seed in given.seeds]  # fmt: skip
                seconds = (time.perf_counter() - began) / len(found)
                cells = [spread([f[key] for f in found if key in f]) for key in ("accuracy", "f1", "teacher", "cross")]
                print(f"| {target} | {name} | {cells[0]} | {cells[1]} | {', '.join(filter(None, cells[2:]))} | "
                      f"{seconds:.0f} |", flush=True)  # fmt: skip


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main()
