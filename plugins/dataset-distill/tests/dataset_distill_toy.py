"""Data and recipes that several tests use."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from kdcore import Component, DataModule, PluginManager, Task, hookimpl

CLASSES = 4
TRAIN = {
    "steps": 100,
    "batch_size": 256,
    "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4},
}


def prototypes(per_class: int = 200) -> DataModule:
    """Images `[2, 8, 8]`: the prototype of their class (deviation 1) and noise (deviation 1.8)."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(CLASSES, 2, 8, 8, generator=generator)
    splits = {}
    for name in ("train", "test"):
        label = torch.arange(CLASSES * per_class) % CLASSES
        noise = torch.randn(len(label), 2, 8, 8, generator=generator)
        images = 0.5 + 0.1 * (centre[label] + 1.8 * noise)
        splits[name] = [{"image": i, "label": y} for i, y in zip(images, label, strict=True)]
    return DataModule(splits, Task("classification", tuple("abcd"), image=(2, 8, 8)))


class Prototypes:
    """A plugin with that data."""

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "prototypes", target=lambda options: prototypes())]


class Interrupt:
    """Asks the process to stop when a stage has taken so many steps."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.after = name, after

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if (stage.name, step) == (self.name, self.after):
            os.kill(os.getpid(), signal.SIGINT)


def manager(*plugins: Any) -> PluginManager:
    """A manager with the data of these tests and further plugins."""
    found = PluginManager()
    found.register(Prototypes(), name="prototypes")
    for i, plugin in enumerate(plugins):
        found.register(plugin, name=f"more-{i}")
    return found


def recipe(**method: Any) -> dict[str, Any]:
    """A recipe on the prototypes."""
    student = {"use": "dd-convnet", "width": 16, "depth": 2, "mean": 0.5, "std": 0.2}
    return {
        "method": {"eval_networks": 1, "baselines": [], "ipc": 1, **method},
        "student": student,
        "data": "prototypes",
        "train": dict(TRAIN),
        "eval": {"on": ["test"]},
    }
