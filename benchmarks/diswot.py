"""How well DisWOT's score ranks architectures: `python benchmarks/diswot.py [--table diswot-s1-table-1.npz]`.

Kendall's tau between the score at random initialisation and accuracy after distillation, over

- the 64 cells of NAS-Bench-201 with `none` or `nor_conv_3x3` on each edge, every one trained here on scikit-learn's
  digits (`--epochs`, `--train-seeds`), teacher and data as in the plugin's quickstart;
- with `--table`, the 64 residual networks of the paper's space S1 beside their measured accuracies on CIFAR-100.

The number of weights is ranked beside them: a score has to beat it to be worth computing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.datasets import load_digits

import kdcore
from kd_diswot import nets
from kd_diswot.options import CellOptions
from kd_diswot.search import initialise, similarity
from kd_diswot.space import decode_cell
from kdcore import Model
from kdcore.models import Labels

BOTH = ("semantic", "relation")


def score(make, teacher, batch, seed):
    """Both terms, their sum, and the number of weights, for one architecture."""
    torch.manual_seed(seed)
    models = []
    for factory in (make, teacher):
        net = factory()
        initialise(net, "gaussian")
        models.append(Model(net, labels=Labels(net.fc.out_features), stages=net.stages))
    taps = tuple(model.tap("@-1")[0] for model in models)
    terms = similarity(*models, batch, taps, BOTH)
    return {**terms, "sum": sum(terms.values()), "weights": sum(p.numel() for p in models[0].parameters())}


def report(title, makes, teacher, batch_of, accuracy, seeds):
    """Print tau of every score, mean and deviation over seeds of batch and initialisation."""
    print(f"\n{title}: {len(makes)} architectures, accuracy {min(accuracy):.3f} to {max(accuracy):.3f}")
    found = {}
    for seed in range(seeds):
        scores = [score(make, teacher, batch_of(seed), seed) for make in makes]
        for name in scores[0]:
            found.setdefault(name, []).append(kendalltau([s[name] for s in scores], accuracy)[0])
    for name, taus in found.items():
        spread = statistics.stdev(taus) if len(taus) > 1 else 0.0
        print(f"  {name:10} tau {statistics.mean(taus):6.3f} ± {spread:.3f}")


def cells(given):
    """The small space, trained exhaustively."""
    options = CellOptions(operations=("none", "nor_conv_3x3"), channels=8, cells=1)
    archs = list(options.space())
    accuracy = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"method": "kd", "data": "digits", "trackers": [],
                  "teacher": {"use": "cifar-resnet", "arch": "1-1-1", "width": 8, "train": {"epochs": 8}},
                  "student": {"use": "nasbench201", "channels": 8, "cells": 1},
                  "train": {"epochs": given.epochs, "batch_size": 32, "log_every": 10000,
                            "optimizer": {"name": "adamw", "lr": 5e-3}},
                  "eval": {"metrics": ["accuracy"], "on": ["test"]}}  # fmt: skip
        first = kdcore.run(recipe, run_dir=Path(folder) / "teacher")
        recipe["teacher"] = {"use": "cifar-resnet", "width": 8,
                             "checkpoint": str(first.path / "stages/01-teacher/artifact/teacher")}  # fmt: skip
        for i, arch in enumerate(archs):
            runs = [kdcore.run({**recipe, "seed": seed, "student": {**recipe["student"], "arch": arch}},
                               run_dir=Path(folder) / f"{i}-{seed}") for seed in range(given.train_seeds)]  # fmt: skip
            accuracy.append(statistics.mean(run.metrics["test/accuracy"] for run in runs))
    digits = load_digits()

    def batch_of(seed):
        rows = np.random.default_rng(seed).permutation(1000)[:64]
        return {"image": torch.tensor(digits.images[rows] / 16, dtype=torch.float32)[:, None],
                "label": torch.tensor(digits.target[rows])}  # fmt: skip

    makes = [lambda a=arch: nets.CellNet(decode_cell(a), 8, 1, 1, 10) for arch in archs]
    report("cells of none and nor_conv_3x3 on digits", makes, lambda: nets.CIFARResNet((1, 1, 1), 8, 1, 10), batch_of,
           accuracy, given.seeds)  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="the measured accuracies of space S1")
    parser.add_argument("--only-table", action="store_true", help="leave the cells out")
    parser.add_argument("--seeds", type=int, default=4, help="of batch and initialisation")
    parser.add_argument("--train-seeds", type=int, default=1, help="trainings of each cell")
    parser.add_argument("--epochs", type=int, default=4, help="of each training")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.table:
        table = np.load(given.table)

        def noise(seed):
            generator = torch.Generator().manual_seed(seed)
            return {"image": torch.randn(16, 3, 32, 32, generator=generator),
                    "label": torch.randint(100, (16,), generator=generator)}  # fmt: skip

        makes = [lambda d=depths: nets.CIFARResNet([int(x) for x in d], 16, 3, 100) for depths in table["in_depths"]]
        report("space S1 on CIFAR-100", makes, lambda: nets.CIFARResNet((9, 9, 9), 16, 3, 100), noise,
               table["out_acc_kd"] / 100, given.seeds)  # fmt: skip
    if not given.only_table:
        cells(given)


if __name__ == "__main__":
    main()
