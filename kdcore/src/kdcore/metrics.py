"""Metrics by task, from torchmetrics. They are summed on the device and gathered over processes by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
import torchmetrics.classification as tmc
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from kdcore.data import IGNORE, Task
from kdcore.errors import RecipeError, did_you_mean
from kdcore.models import Batch, Outputs

Pair = tuple[Tensor, Tensor]


def _per_sample(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").float(), batch["label"]


def _probabilities(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").float().softmax(1), batch["label"]


def _per_pixel(outputs: Outputs, batch: Batch) -> Pair:
    logits = F.interpolate(
        outputs.need("logits").float(), batch["mask"].shape[-2:], mode="bilinear", align_corners=False
    )
    return logits.argmax(1), batch["mask"]


def _per_token(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").float(), batch["labels"]


def _token_classes(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").argmax(-1), batch["labels"]


def _values(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").float().flatten(), batch["label"].float().flatten()


def _multilabel(outputs: Outputs, batch: Batch) -> Pair:
    return outputs.need("logits").float().sigmoid(), batch["label"].long()


class ClassIoU(tmc.MulticlassConfusionMatrix):  # type: ignore[misc]
    """Intersection over union of each class; NaN for one that neither prediction nor target holds."""

    def compute(self) -> Tensor:
        """`[C]`, in [0, 1]."""
        matrix = super().compute().double()
        ratios: Tensor = matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())
        return ratios


class MeanIoU(ClassIoU):
    """Mean over the classes that occur in prediction or target of intersection over union, ignored pixels left out."""

    def compute(self) -> Tensor:
        """The mean, in [0, 1]."""
        return super().compute().nanmean()


class BoundaryF1(torchmetrics.Metric):  # type: ignore[misc]
    """How well the contours of the classes are met: the F1 of boundary pixels that have one of the other side near,
    mean over images and the classes that have a contour in the target (Csurka et al., "What is a good evaluation
    measure for semantic segmentation?", BMVC 2013). Pixels that are ignored bound nothing.

    Args:
        classes: how many.
        tolerance: what is near, as a share of the image's diagonal; a pixel at least.
    """

    total: Tensor
    count: Tensor

    def __init__(self, classes: int, tolerance: float = 0.0075) -> None:
        super().__init__()
        self.classes, self.tolerance = classes, tolerance
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Add images: classes `[B, H, W]`, predicted and true."""
        height, width = target.shape[-2:]
        radius = max(1, round(self.tolerance * math.hypot(height, width)))
        reach = torch.arange(-radius, radius + 1, device=target.device)
        disc = (reach[:, None] ** 2 + reach**2 <= radius**2).float()[None, None]
        for name in range(self.classes):  # one at a time: maps of all would take C times the memory
            ours, theirs = (_contour(labels == name, target == IGNORE) for labels in (predictions, target))
            near = [F.conv2d(edge.float()[:, None], disc, padding=radius)[:, 0] > 0.5 for edge in (theirs, ours)]
            precision, recall = ((edge & close).sum((1, 2)) / edge.sum((1, 2)).clamp(min=1)
                                 for edge, close in zip((ours, theirs), near, strict=True))  # fmt: skip
            there = theirs.any(2).any(1)
            scores = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
            self.total += scores[there].double().sum()
            self.count += there.sum()

    def compute(self) -> Tensor:
        """The mean, in [0, 1]; NaN where no image has a contour."""
        return self.total / self.count


def _contour(inside: Tensor, ignored: Tensor) -> Tensor:
    """Pixels `[B, H, W]` of a class beside one of another class."""
    filled = F.pad((inside | ignored).float()[:, None], (1, 1, 1, 1), value=1.0)
    eroded = -F.max_pool2d(-filled, 3, stride=1)[:, 0]
    return inside & ~ignored & (eroded < 0.5)


@dataclass(frozen=True)
class _Spec:
    make: Callable[[int], Any]
    pair: Callable[[Outputs, Batch], Pair]
    higher_is_better: bool = True


def _accuracy(classes: int) -> Any:
    return tmc.MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE)


_TOKENS = {"perplexity": _Spec(lambda n: Perplexity(ignore_index=IGNORE), _per_token, higher_is_better=False),
           "token-accuracy": _Spec(_accuracy, _token_classes)}  # fmt: skip
METRICS: dict[str, dict[str, _Spec]] = {
    "classification": {
        "accuracy": _Spec(_accuracy, _per_sample),
        "top5": _Spec(lambda n: tmc.MulticlassAccuracy(n, top_k=min(5, n), average="micro"), _per_sample),
        "f1": _Spec(lambda n: tmc.MulticlassF1Score(n), _per_sample),
        "matthews": _Spec(lambda n: tmc.MulticlassMatthewsCorrCoef(n), _per_sample),
        "auroc": _Spec(lambda n: tmc.MulticlassAUROC(n), _probabilities),
        "ece": _Spec(lambda n: tmc.MulticlassCalibrationError(n), _probabilities, higher_is_better=False),
    },
    "multilabel": {
        "map": _Spec(lambda n: tmc.MultilabelAveragePrecision(n), _multilabel),
        "f1": _Spec(lambda n: tmc.MultilabelF1Score(n), _multilabel),
    },
    "segmentation": {
        "miou": _Spec(lambda n: MeanIoU(n, ignore_index=IGNORE), _per_pixel),
        "pixel-accuracy": _Spec(_accuracy, _per_pixel),
        "mean-accuracy": _Spec(lambda n: tmc.MulticlassAccuracy(n, ignore_index=IGNORE), _per_pixel),
        "boundary-f1": _Spec(BoundaryF1, _per_pixel),
        "class-iou": _Spec(lambda n: ClassIoU(n, ignore_index=IGNORE), _per_pixel),
    },
    "token-classification": {
        "token-accuracy": _Spec(_accuracy, _token_classes),
        "token-f1": _Spec(lambda n: tmc.MulticlassF1Score(n, ignore_index=IGNORE), _token_classes),
    },
    "causal-lm": _TOKENS,
    "masked-lm": _TOKENS,
    "seq2seq": _TOKENS,
    "regression": {
        "mse": _Spec(lambda n: torchmetrics.MeanSquaredError(), _values, higher_is_better=False),
        "mae": _Spec(lambda n: torchmetrics.MeanAbsoluteError(), _values, higher_is_better=False),
        "pearson": _Spec(lambda n: torchmetrics.PearsonCorrCoef(), _values),
        "spearman": _Spec(lambda n: torchmetrics.SpearmanCorrCoef(), _values),
    },
    "unlabelled": {},
}  # fmt: skip
"""Metrics of each kind of task by name; the first is the default."""


def higher_is_better(task: Task, name: str) -> bool:
    """Whether more of a metric is better."""
    return METRICS[task.kind][name].higher_is_better


def metric_names(task: Task, asked: Sequence[str] = ()) -> list[str]:
    """The metrics asked for, or the task's default.

    Raises:
        RecipeError: for a name the task has no metric of.
    """
    known = METRICS[task.kind]
    for name in asked:
        if name not in known:
            raise RecipeError(f"eval.metrics: a task of kind {task.kind!r} has no metric {name!r}; "
                              f"{did_you_mean(name, known, 'metrics')}")  # fmt: skip
    return list(asked) or list(known)[:1]


class Metrics:
    """Several metrics fed together. `update(outputs, batch)` per batch, then `compute()`."""

    def __init__(self, task: Task, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        specs, self._task = METRICS[task.kind], task
        self._specs = {name: specs[name] for name in names}
        self._metrics = {name: spec.make(task.num_classes or 1).to(device) for name, spec in self._specs.items()}

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch."""
        for name, metric in self._metrics.items():
            metric.update(*self._specs[name].pair(outputs, batch))

    def compute(self) -> dict[str, float]:
        """The values over all batches and processes; those of a class as `metric/class`, where the class occurs."""
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            values = metric.compute()
            if values.ndim == 0:
                found[name] = float(values)
                continue
            classes = self._task.classes or [str(number) for number in range(len(values))]
            found |= {f"{name}/{c}": v for c, v in zip(classes, values.tolist(), strict=True) if not math.isnan(v)}
        return found
