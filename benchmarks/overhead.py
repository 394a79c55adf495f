"""What a step of a `kd` run costs, beside a hand-written loop that does the same work.

    python benchmarks/overhead.py [--rounds 7] [--steps 150]

Both train the same student from the same teacher on the same data with cross-entropy and KD, alternating in one
process; the ratio of seconds per step should be at most 1.03. Without arguments: a digits-sized ResNet and a small
transformer of the demo plugin.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import kdcore
from kd_classic import functional
from kd_demo.digits import digits
from kd_demo.models import cnn, transformer
from kd_demo.options import CNNOptions, DigitsOptions, TopicsOptions, TransformerOptions
from kd_demo.text import topics
from kdcore import DataModule, Model

BATCH = 64


def by_hand(teacher: Model, student: Model, data: DataModule, steps: int) -> float:
    """Seconds per step of a plain PyTorch loop."""
    loader = DataLoader(data["train"], BATCH, shuffle=True, drop_last=True, collate_fn=data.collate)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval()
    student.train()
    done, start = 0, time.perf_counter()
    while True:
        for batch in loader:
            with torch.no_grad():
                theirs = teacher(batch).logits
            ours = student(batch).logits
            loss = 0.1 * functional.cross_entropy(ours, batch["label"]) + 0.9 * functional.kd(ours, theirs)
            if done % 10 == 0 and not torch.isfinite(loss):
                raise RuntimeError("the loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                return (time.perf_counter() - start) / steps


def by_kd(teacher: Model, student: Model, data: DataModule, steps: int, where: Path) -> float:
    """Seconds per step of a run, from its own account."""
    train = {"steps": steps, "batch_size": BATCH, "save_every": steps + 1, "eval_every": steps + 1}
    only_train = DataModule({"train": data["train"]}, data.task, collate=data.collate)
    result = kdcore.distill(teacher, student, only_train, "kd", train=train, run_dir=where)
    import json

    timing = json.loads((result.path / "run.json").read_text())["timings"]["distill"]
    return timing["seconds"] / timing["steps"]


def compare(name: str, teacher: Model, student: Model, data: DataModule, rounds: int, steps: int) -> None:
    """Print the medians and the median of the ratios."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            hand = by_hand(copy.deepcopy(teacher), copy.deepcopy(student), data, steps)
            kd = by_kd(copy.deepcopy(teacher), copy.deepcopy(student), data, steps, Path(folder) / str(number))
            pairs.append((kd, hand))
    kd, hand = (1e3 * statistics.median(p[i] for p in pairs[1:]) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs[1:])
    print(f"{name:28}{kd:10.2f}{hand:14.2f}{ratio:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{'':28}{'kd ms/step':>10}{'by hand ms':>14}{'ratio':>9}   ({torch.get_num_threads()} threads)")
    data = digits(DigitsOptions())
    big, small = (cnn(CNNOptions(width=w, depth=2), data.task) for w in (32, 16))
    compare("ResNet on digits", big, small, data, given.rounds, given.steps)
    data = topics(TopicsOptions())
    big, small = (transformer(TransformerOptions(width=w, layers=n), data.task) for w, n in ((128, 4), (64, 2)))
    compare("transformer on topics", big, small, data, given.rounds, given.steps)


if __name__ == "__main__":
    main()
