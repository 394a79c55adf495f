"""Distilled MNIST beside subsets of the same size: `python benchmarks/dataset-distill.py --data FOLDER`.

FOLDER holds `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`: 8,000 images are trained on, 2,000 measured
on. Each seed distils a set anew and trains several fresh networks on it; the table gives mean and standard deviation
over all of them.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

import kdcore
from kdcore import Component, DataModule, PluginManager, Task, hookimpl

MAGIC = {3: 16, 1: 8}
"""Bytes before the values, by dimensions of an IDX file."""
CHANGES = {"strategy": "color_crop_cutout_scale_rotate"}
NETWORK = {"use": "dd-convnet", "width": 32, "depth": 2, "mean": 0.13, "std": 0.31}
METHODS: dict[str, dict[int, dict[str, Any]]] = {
    "dm": {n: {"iterations": 200, "batch_real": 64, "augment": CHANGES} for n in (1, 10)},
    "dsa": {
        1: {"iterations": 100, "batch_real": 64, "lr_img": 1.0, "augment": CHANGES},
        10: {"iterations": 10, "outer": 10, "inner": 5, "batch_real": 64, "lr_img": 1.0, "augment": CHANGES},
    },
    "mtt": {
        1: {
            "iterations": 100,
            "num_experts": 2,
            "train_epochs": 6,
            "batch_expert": 128,
            "lr_expert": 0.02,
            "syn_steps": 8,
            "expert_epochs": 1,
            "max_start_epoch": 4,
            "lr_img": 100,
            "lr_lr": 1e-4,
            "augment": CHANGES,
        }
    },
}


class Images(Dataset[dict[str, Any]]):
    """Images and labels in memory."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def column(self, name: str) -> torch.Tensor:
        """All values of a key; only of labels."""
        return {"label": self.labels}[name]


class Mnist:
    """A plugin with the data."""

    def __init__(self, folder: Path, side: int) -> None:
        images = torch.from_numpy(read(folder / "t10k-images-idx3-ubyte.gz", 3)).float().view(-1, 1, 28, 28) / 255
        labels = torch.from_numpy(read(folder / "t10k-labels-idx1-ubyte.gz", 1)).long()
        images = F.interpolate(images, (side, side), mode="area")
        splits = {"train": Images(images[:8000], labels[:8000]), "test": Images(images[8000:], labels[8000:])}
        self.data = DataModule(splits, Task("classification", tuple("0123456789"), image=(1, side, side)))

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        """The data `mnist`."""
        return [Component("data", "mnist", target=lambda options: self.data)]


def read(path: Path, dimensions: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=MAGIC[dimensions]).copy()


def recipe(method: str, ipc: int, seed: int, networks: int, first: bool) -> dict[str, Any]:
    """Baselines and the networks on all data are trained for the first method of a size only."""
    options = {
        "use": method,
        "ipc": ipc,
        "eval_networks": networks,
        "baselines": ["random", "herding"] if first else [],
        "full": 2 if first and ipc == 1 else 0,
        **METHODS[method][ipc],
    }
    sgd = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    teacher = {"train": {"epochs": 2, "batch_size": 64, "optimizer": {"name": "adamw", "lr": 2e-3}}}
    return {"method": options, "student": NETWORK, "data": "mnist", "seed": seed, "eval": {"on": ["test"]},
            "train": {"steps": 200, "batch_size": 256, "optimizer": sgd,
                      "schedule": {"name": "multistep", "milestones": [0.5]}},
            **({"teacher": {**NETWORK, **teacher}} if first else {})}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the IDX files")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--seeds", type=int, default=2, help="sets of each kind")
    parser.add_argument("--networks", type=int, default=2, help="networks trained on each set")
    parser.add_argument("--side", type=int, default=14, help="pixels of a side")
    given = parser.parse_args()
    manager = PluginManager()
    manager.register(Mnist(given.data, given.side), name="mnist")
    print(f"{'images per class':18}{'set':12}{'accuracy %':>16}{'seconds per run':>18}", flush=True)
    for ipc in given.ipc:
        for number, method in enumerate(m for m in given.methods if ipc in METHODS[m]):
            scores: dict[str, list[float]] = {}
            started = time.perf_counter()
            for seed in range(given.seeds):
                with tempfile.TemporaryDirectory() as where:
                    made = recipe(method, ipc, seed, given.networks, first=number == 0)
                    result = kdcore.run(made, run_dir=Path(where) / "run", plugins=manager)
                for row in result.rows:
                    name = row["model"].removeprefix("student on ").replace("distilled", method)
                    scores.setdefault(name, []).extend([row["test/accuracy"], row["test/accuracy std"]])
            seconds = (time.perf_counter() - started) / given.seeds
            for name, values in scores.items():
                print(f"{ipc:<18}{name:12}{summary(values):>16}{seconds:>18.0f}", flush=True)


def summary(values: list[float]) -> str:
    """Mean of the means, and the deviation over seeds and networks together."""
    means, inner = values[::2], values[1::2]
    between = statistics.pvariance(means)
    return f"{100 * statistics.mean(means):.1f} ± {100 * (between + statistics.mean(s * s for s in inner)) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
