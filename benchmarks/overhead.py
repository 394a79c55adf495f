"""What a step of a `kd` run costs, beside a hand-written loop that does the same work.

    python benchmarks/overhead.py [--rounds 7] [--steps 150] [--segmentation]

Both train the same student from the same teacher on the same data with the same terms, alternating in one process; the
ratio of seconds per step should be at most 1.03. The students are a digits-sized ResNet and a small transformer of the
demo plugin, with cross-entropy and KD; with `--segmentation`, two SegFormers with the losses of segmentation methods.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kdcore
from kd_classic import functional
from kd_demo.digits import digits
from kd_demo.models import cnn, transformer
from kd_demo.options import CNNOptions, DigitsOptions, ShapesOptions, TopicsOptions, TransformerOptions
from kd_demo.shapes import shapes
from kd_demo.text import topics
from kdcore import DataModule, Model, Outputs
from kdcore.losses import TaskLoss
from kdcore.models import Batch

BATCH = 64


Terms = Callable[[Outputs, Outputs, Batch], Tensor]
"""Outputs of student and teacher, and a batch -> the objective."""


def kd_terms(ours: Outputs, theirs: Outputs, batch: Batch) -> Tensor:
    """Those of the method `kd`."""
    logits, teacher = ours.need("logits"), theirs.need("logits")
    return 0.1 * functional.cross_entropy(logits, batch["label"]) + 0.9 * functional.kd(logits, teacher)


def by_hand(teacher: Model, student: Model, data: DataModule, steps: int, name: str | None = None) -> float:
    """Seconds per step of a plain PyTorch loop; with the name of a loss, of that beside the cross-entropy."""
    terms, more = (kd_terms, []) if name is None else loss_terms(name, teacher, student, data)
    loader = DataLoader(data["train"], BATCH, shuffle=True, drop_last=True, collate_fn=data.collate)
    optimizer = torch.optim.AdamW([*student.parameters(), *more], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval()
    student.train()
    done, start = 0, time.perf_counter()
    while True:
        for batch in loader:
            with torch.no_grad():
                theirs = teacher(batch)
            loss = terms(student(batch), theirs, batch)
            if done % 10 == 0 and not torch.isfinite(loss):
                raise RuntimeError("the loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                return (time.perf_counter() - start) / steps


def loss_terms(name: str, teacher: Model, student: Model, data: DataModule) -> tuple[Terms, list[nn.Parameter]]:
    """The cross-entropy and a loss, and the parameters of its adapters."""
    component = kdcore.PluginManager().get("loss", name)
    options = component.load_options()
    loss, task = component.load_target()(options() if options else None), TaskLoss(data.task)
    loss.setup(data, "train")
    loss.bind(student, teacher)
    sample = data.sample("train", BATCH)
    loss(student(sample), teacher(sample), sample)  # makes the adapters

    def terms(ours: Outputs, theirs: Outputs, batch: Batch) -> Tensor:
        found = loss(ours, theirs, batch)
        return task(ours, theirs, batch) + sum(found.values() if isinstance(found, dict) else [found])

    return terms, list(loss.parameters())


def by_kd(teacher: Model, student: Model, data: DataModule, steps: int, where: Path, name: str | None = None) -> float:
    """Seconds per step of a run, from its own account."""
    train = {"steps": steps, "batch_size": BATCH, "save_every": steps + 1, "eval_every": steps + 1}
    only_train = DataModule({"train": data["train"]}, data.task, collate=data.collate)
    method, losses = ("distill", [{"use": "cross-entropy"}, {"use": name}]) if name else ("kd", [])
    result = kdcore.distill(teacher, student, only_train, method, losses=losses, train=train, run_dir=where)
    timing = json.loads((result.path / "run.json").read_text())["timings"]["distill"]
    return timing["seconds"] / timing["steps"]


def compare(
    name: str, teacher: Model, student: Model, data: DataModule, given: argparse.Namespace, loss: str | None = None
) -> None:
    """Print the medians and the median of the ratios."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds + 1):
            where, models = Path(folder) / str(number), (teacher, student)
            hand = by_hand(*map(copy.deepcopy, models), data, given.steps, loss)
            kd = by_kd(*map(copy.deepcopy, models), data, given.steps, where, loss)
            pairs.append((kd, hand))
    kd, hand = (1e3 * statistics.median(p[i] for p in pairs[1:]) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs[1:])
    print(f"{name:28}{kd:10.2f}{hand:14.2f}{ratio:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--segmentation", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{'':28}{'kd ms/step':>10}{'by hand ms':>14}{'ratio':>9}   ({torch.get_num_threads()} threads)")
    if given.segmentation:
        segmenters(given)
        return
    data = digits(DigitsOptions())
    big, small = (cnn(CNNOptions(width=w, depth=2), data.task) for w in (32, 16))
    compare("ResNet on digits", big, small, data, given)
    data = topics(TopicsOptions())
    big, small = (transformer(TransformerOptions(width=w, layers=n), data.task) for w, n in ((128, 4), (64, 2)))
    compare("transformer on topics", big, small, data, given)


def segmenters(given: argparse.Namespace) -> None:
    """Two SegFormers on generated shapes."""
    from kd_transformers.build import build
    from kd_transformers.options import TransformersOptions

    data = shapes(ShapesOptions(size=64))
    big, small = (
        build(TransformersOptions(config={"model_type": "segformer", "hidden_sizes": widths, "depths": [1] * 4,
                                          "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 64}), data.task)
        for widths in ([32, 64, 80, 128], [16, 32, 40, 64])
    )  # fmt: skip
    for loss in ("cwd", "bpkd", "acam-kd", "transkd"):
        compare(f"SegFormer on shapes, {loss}", big, small, data, given, loss)


if __name__ == "__main__":
    main()
