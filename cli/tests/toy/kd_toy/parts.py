"""Data, model and method of the toy plugin."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_toy.options import LinearOptions, PointsOptions, ToyOptions
from kdcore import DataModule, Distill, Loss, Method, Model, Outputs, Task
from kdcore.losses import Weighted
from kdcore.models import Batch


class _Points(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, size: int, seed: int, broken_at: int | None) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        self.broken_at = broken_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.broken_at:
            raise OSError(f"sample {index} is unreadable")
        return {"series": self.x[index], "label": (self.x[index, 0] > 0).long()}


def data(options: PointsOptions) -> DataModule:
    splits = {"train": _Points(options.size, 1, options.broken_at), "val": _Points(32, 2, None)}
    return DataModule(splits, Task("classification", num_classes=2))


def model(options: LinearOptions, task: Task) -> Model:
    module = nn.Linear(4, task.class_count)
    if options.checkpoint:
        from safetensors.torch import load_model

        from kdcore.api import student_folder

        load_model(module, student_folder(Path(options.checkpoint)) / "model.safetensors")
    return Model(module, call=lambda module, batch: Outputs(logits=module(batch["series"])))


class _Match(Loss):
    def __init__(self, distance: str) -> None:
        super().__init__()
        self.distance = nn.L1Loss() if distance == "l1" else nn.MSELoss()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.distance(student.need("logits"), teacher.need("logits"))


class Toy(Method):
    stage_names = ("distill",)
    options: ToyOptions

    def stages(self, run: Any) -> Generator[Any, Any, None]:
        if self.options.crash:
            raise ZeroDivisionError("nobody expects this")
        yield Distill(run.student, [Weighted(_Match(self.options.distance), name="match")], run.teacher)
        run.rows.append({"model": "student", "val/accuracy": "0.91 ± 0.02", "parameters": 10})
