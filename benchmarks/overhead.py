"""What a step of a `kd` run costs, beside loops that do the same work.

    python benchmarks/overhead.py [--rounds 9] [--steps 100] [--only digits] [--threads 1]

All sides train the same student from the same teacher on the same batches with the same terms, optimizer and schedule,
in turn, in one process: a run of this project (its own account of its loop), a loop by hand with AdamW as torch has it
and with a fused one, as runs take it, the same loop over Accelerate, and for classifiers of images torchdistill's
`DistillationBox`. Where a loss has no adapter with random weights of its own, the last losses of all sides must agree
to 1 %, or there is no result. The networks are a digits-sized ResNet and a transformer of the demo plugin, timm's
ResNet-34 and ResNet-18, and two SegFormers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loops
import measure
import timm
import torch
from torch import Tensor, nn

import kdcore
from kd_demo.digits import digits
from kd_demo.models import cnn, transformer
from kd_demo.options import CNNOptions, DigitsOptions, ShapesOptions, TopicsOptions, TransformerOptions
from kd_demo.shapes import shapes
from kd_demo.text import topics
from kdcore import DataModule, Model
from kdcore.losses import TaskLoss
from kdcore.models import Batch

BATCH = 64
ADAPTED = ("bpkd", "acam-kd", "transkd")
"""Losses with adapters whose weights begin at random."""
STAGES = ["stage1", "stage2", "stage3"]
LOGITS = {"is_from_teacher": False, "module_path": "fc", "io": "output"}
CE_TERM = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "weight": 1.0, "criterion_wrapper": {
    "key": "SimpleLossWrapper", "kwargs": {"input": LOGITS, "target": {"uses_label": True}}}}  # fmt: skip
KD_TERM = {"criterion": {"key": "KDLoss", "kwargs": {
    "student_module_path": "fc", "student_module_io": "output", "teacher_module_path": "fc",
    "teacher_module_io": "output", "temperature": 4.0, "alpha": 0.1, "beta": 0.9}}, "weight": 1.0}  # fmt: skip
AT_TERM = {"criterion": {"key": "ATLoss", "kwargs": {"mode": "code", "at_pairs": {
    stage: {who: {"io": "output", "path": stage} for who in ("teacher", "student")} for stage in STAGES}}},
    "weight": 1000.0}  # fmt: skip


@dataclass
class Subject:
    """What is trained, and how each side is told of it."""

    name: str
    teacher: Model
    student: Model
    data: DataModule
    method: dict[str, Any]
    parts: loops.Parts
    losses: list[dict[str, Any]] = field(default_factory=list)
    terms: dict[str, Any] = field(default_factory=dict)
    taps: list[str] = field(default_factory=list)
    wrapped: bool = False
    """Whether the loops call the `Model`, not the network in it, because the terms are a plugin's."""
    slow: bool = False
    """Whether a fifth of the steps is enough."""


def by_kd(subject: Subject, steps: int) -> loops.Found:
    """Seconds per step of a run, from its own account."""
    teacher, student = copy.deepcopy((subject.teacher, subject.student))
    split = subject.data["train"]
    only_train = DataModule({"train": split}, subject.data.task, collate=subject.data.collate,
                            orders={"train": loops.order(len(split))})  # fmt: skip
    train = {"steps": steps, "batch_size": BATCH, "save_every": steps + 1, "eval_every": steps + 1,
             "optimizer": {"name": "adamw", "lr": loops.LR}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = kdcore.distill(teacher, student, only_train, subject.method, losses=subject.losses, train=train,
                              run_dir=Path(folder) / "run").path  # fmt: skip
        timing = json.loads((path / "run.json").read_text())["timings"]["distill"]
        loss = sum(measure.last_terms(path).values())
    return timing["seconds"] / timing["steps"], loss


def sides(subject: Subject, steps: int) -> dict[str, Callable[[], loops.Found]]:
    """Every side of a subject, with fresh copies of the networks each time."""

    def networks() -> Any:
        models = copy.deepcopy((subject.teacher, subject.student))
        return models if subject.wrapped else [model.module for model in models]

    made: dict[str, Callable[[], loops.Found]] = {"kd": lambda: by_kd(subject, steps)}
    fused = functools.partial(loops.by_hand, fused=True)
    for name, loop in (("by hand", loops.by_hand), ("by hand, fused", fused), ("Accelerate", loops.by_accelerate)):
        made[name] = lambda loop=loop: loop(*networks(), subject.parts, loops.loader(subject.data, BATCH), steps)
    if subject.terms:
        made["torchdistill"] = lambda: loops.by_torchdistill(
            *networks(), subject.terms, subject.taps, subject.data, BATCH, steps
        )
    return made


def images() -> list[Subject]:
    """A ResNet of two widths on digits: KD, and attention transfer of three tapped stages."""
    data = digits(DigitsOptions())
    big, small = (cnn(CNNOptions(width=w, depth=2), data.task) for w in (32, 16))
    at = {"use": "at", "student_layers": STAGES, "teacher_layers": STAGES}
    return [
        Subject("ResNet on digits, kd", big, small, data, {"use": "kd"}, loops.kd_by_hand, terms={"kd": KD_TERM},
                taps=["fc"]),
        Subject("ResNet on digits, at, 3 taps", big, small, data, at, loops.at_by_hand,
                terms={"ce": CE_TERM, "at": AT_TERM}, taps=["fc", *STAGES]),
    ]  # fmt: skip


def pictures() -> list[Subject]:
    """A ResNet-34 and a ResNet-18 on random pictures of CIFAR's size: a student of 11 million parameters."""
    data = loops.random_pictures(640, 32, 100)
    big, small = (Model(timm.create_model(name, num_classes=100)) for name in ("resnet34", "resnet18"))
    return [Subject("ResNet-34 to ResNet-18, kd", big, small, data, {"use": "kd"}, loops.kd_by_hand,
                    terms={"kd": KD_TERM}, taps=["fc"], slow=True)]  # fmt: skip


def texts() -> list[Subject]:
    """A small transformer on topics."""
    data = topics(TopicsOptions())
    big, small = (transformer(TransformerOptions(width=w, layers=n), data.task) for w, n in ((128, 4), (64, 2)))
    return [Subject("transformer on topics, kd", big, small, data, {"use": "kd"}, loops.text_kd_by_hand)]


def segmenters() -> list[Subject]:
    """Two SegFormers on generated shapes, with the losses of segmentation methods."""
    from kd_transformers.build import build
    from kd_transformers.options import TransformersOptions

    data = shapes(ShapesOptions(size=64))
    big, small = (
        build(TransformersOptions(config={"model_type": "segformer", "hidden_sizes": widths, "depths": [1] * 4,
                                          "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 64}), data.task)
        for widths in ([32, 64, 80, 128], [16, 32, 40, 64])
    )  # fmt: skip
    return [
        Subject(f"SegFormer on shapes, {loss}", big, small, data, {"use": "distill"}, plugin_terms(loss, data),
                losses=[{"use": "cross-entropy"}, {"use": loss}], wrapped=True, slow=True)
        for loss in ("cwd", "bpkd", "acam-kd", "transkd")
    ]  # fmt: skip


def plugin_terms(name: str, data: DataModule) -> loops.Parts:
    """The cross-entropy and a plugin's loss, called by the loop itself."""

    def parts(teacher: Model, student: Model) -> tuple[loops.Objective, list[nn.Parameter]]:
        component = kdcore.PluginManager().get("loss", name)
        options = component.load_options()
        loss, task = component.load_target()(options() if options else None), TaskLoss(data.task)
        loss.setup(data, "train")
        loss.bind(student, teacher)
        sample = data.sample("train", BATCH)
        loss(student(sample), teacher(sample), sample)  # makes the adapters

        def objective(batch: Batch) -> Tensor:
            with torch.no_grad():
                theirs = teacher(batch)
            ours = student(batch)
            found = loss(ours, theirs, batch)
            return task(ours, theirs, batch) + sum(found.values() if isinstance(found, dict) else [found])

        return objective, list(loss.parameters())

    return parts


def compare(subject: Subject, given: argparse.Namespace) -> measure.Row:
    """Seconds per step of all sides, whose last losses agree."""
    steps = given.steps // 5 if subject.slow else given.steps
    found = measure.in_turn(sides(subject, steps), given.rounds)
    losses = {name: values[-1][1] for name, values in found.items()}
    if not any(loss["use"] in ADAPTED for loss in subject.losses):
        for name, loss in losses.items():
            if abs(loss / losses["kd"] - 1) > 0.01:
                raise SystemExit(f"{subject.name}: the last losses differ ({name}): {losses}")
    times = {name: [1e3 * seconds for seconds, _ in values] for name, values in found.items()}
    said = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
    return measure.row(subject.name, "ms per step", times, **{"last losses": said})


def main() -> None:
    parser = measure.parser(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=100)
    given = measure.begin(parser)
    rows = []
    for make in (images, pictures, texts, segmenters):
        for subject in make():
            if given.only in subject.name:
                rows.append(compare(subject, given))
                measure.show(rows[-1])
    measure.write("overhead", rows, given)


if __name__ == "__main__":
    main()
