"""What a small data set is worth: fresh networks trained on it, and on as many real samples chosen otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dataset_distill.artifact import LOGITS, as_data, selection, with_logits
from kd_dataset_distill.augment import draw
from kd_dataset_distill.functional import herding, k_centers
from kd_dataset_distill.networks import architectures
from kd_dataset_distill.networks import draw as draw_network
from kd_dataset_distill.options import AugmentOptions, EvaluationOptions
from kd_dataset_distill.real import PixelSpace, class_rows
from kdcore import Distill, Loss, Model, Outputs, Run, Stage
from kdcore.data import DataModule, derive_seed, to_device
from kdcore.losses import TaskLoss, Weighted
from kdcore.models import Batch, FromColumns
from kdcore.stages import Supervised


class SoftLabels(Loss):
    """KL divergence from a teacher's logits at a temperature, times its square; a mean over samples."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """From logits `[B, C]`."""
        ours, theirs = ((side.need("logits").float() / self.temperature).log_softmax(-1) for side in (student, teacher))
        return self.temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


class TrainOn(Distill):
    """A fresh network trained on a small data set, under augmentation.

    Args:
        model: the network.
        data: the small data set as a data module.
        options: of the method.
        name: the stage's name.
        seed: of the order of the samples and the augmentation.
        augment: one change is drawn for each step, with random numbers for each sample; and the units of pixels.
    """

    def __init__(self, model: Model, data: DataModule, options: EvaluationOptions, *, name: str, seed: int,
                 augment: tuple[AugmentOptions, PixelSpace] | None = None) -> None:  # fmt: skip
        soft = options.soft_labels
        loss = Weighted(
            SoftLabels(options.temperature) if soft else TaskLoss(data.task), name="kl" if soft else "supervised"
        )
        super().__init__(model, [loss], FromColumns({"logits": LOGITS}) if soft else None, name=name)
        self.data, self.seed = data, seed
        self.changes, self.space = augment or (AugmentOptions(), None)

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The supervised loss, or that of the soft labels."""
        if self.training and self.space is not None:
            batch = {**batch, "image": self._changed(batch["image"], batch["index"])}
        return super().forward(batch, objective)

    def _changed(self, images: Tensor, index: Tensor) -> Tensor:
        assert self.data is not None
        assert self.space is not None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.progress.step))
        change = draw(self.changes, generator, self.data.size("train") or 1)
        if change is None:
            return images
        numbers = change.numbers.to(index.device)[index]
        return self.space.inverse(type(change)(change.options, change.name, numbers)(self.space(images)))


def train_networks(
    run: Run,
    options: EvaluationOptions,
    rows: datasets.Dataset,
    *,
    augment: tuple[AugmentOptions, PixelSpace] | None = None,
    train: Mapping[str, Any] | None = None,
    wrap: Callable[[Model], Model] = lambda model: model,
) -> Generator[Stage, Any, None]:
    """Stages that train fresh networks on the small data set, on the baselines, and if asked for on all data.

    The student of each role is the first network trained on the small data set. `run.rows` gets a line per set and
    architecture: the metrics' means over the networks, and their standard deviations.

    Args:
        run: the run.
        options: of the method.
        rows: the small data set.
        augment: of images, and the units of pixels.
        train: changes of the recipe's `train` section for the networks on the small data set.
        wrap: what every network is put behind.
    """
    sets: dict[str, datasets.Dataset | None] = {"distilled": rows}
    sets |= {name: with_logits(run, _baseline(run, name, len(rows)), options) for name in options.baselines}
    if options.full:
        sets["all"] = with_logits(run, _everything(run), options) if options.soft_labels else None
    if augment is not None:
        augment[1].to(run.device)
    for role in architectures(run):
        for name, chosen in sets.items():
            data = run.data if chosen is None else as_data(chosen, run.data)
            overrides = dict(train or {}) if name == "distilled" else {"epochs": options.full} if name == "all" else {}
            scores = []
            for number in range(options.eval_networks):
                key = None if (name, number) == ("distilled", 0) else f"{role}-{name}-{number}"
                model = wrap(run.model(role, key=key))
                stage = _stage(run, model, data, options, f"{name}-{role}-{number}", augment)
                stage.overrides = {**_quiet(run), **overrides}
                scores.append(measure(run, (yield stage).student))
                if key is not None:
                    del run.models[key]
            run.rows.append(line(f"{role} on {name}", data.size("train") or 0, scores))


def _stage(run: Run, model: Model, data: DataModule, options: EvaluationOptions, name: str,
           augment: tuple[AugmentOptions, PixelSpace] | None) -> TrainOn:  # fmt: skip
    seed = derive_seed(run.seed, name) % 2**31
    return TrainOn(model, as_data(data["train"], data), options, name=name, seed=seed, augment=augment)


def _quiet(run: Run) -> dict[str, Any]:
    """A small set has one step per epoch: checkpoints and evaluations are not for each."""
    return {"save_every": run.recipe.train.save_every or 500, "eval_every": run.recipe.train.eval_every or 1 << 30}


def measure(run: Run, model: Model) -> dict[str, float]:
    """The metrics of a network on the splits of `eval.on`."""
    stage = Supervised(model, run.data.task, name="measure")
    splits = [split for split in run.recipe.eval.on if split in run.data]
    return {name: value for split in splits for name, value in run.evaluate(stage, split).items()}


def line(name: str, samples: int, scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A line of the table: means and standard deviations over networks."""
    found: dict[str, Any] = {"model": name, "samples": samples, "networks": len(scores)}
    for metric in scores[0]:
        values = [score[metric] for score in scores]
        found[metric] = round(statistics.mean(values), 6)
        found[f"{metric} std"] = round(statistics.stdev(values), 6) if len(values) > 1 else 0.0
    return found


def _baseline(run: Run, name: str, count: int) -> datasets.Dataset:
    """As many real samples as the small data set has: evenly over the classes, where its size allows that."""
    rows = groups(run.data, run.recipe.method.use)
    if count % len(rows):
        rows = [torch.cat(rows)]
    return selection(run.data, select(run, name, rows, count // len(rows), derive_seed(run.seed, "baseline", name)))


def groups(data: DataModule, method: str) -> list[Tensor]:
    """The positions of each class's training samples; of another task than classification, all in one group."""
    if data.task.kind == "classification":
        return class_rows(data, method)
    return [torch.arange(data.size("train") or 0)]


def select(run: Run, name: str, rows: Sequence[Tensor], count: int, seed: int) -> Tensor:
    """Positions of up to `count` samples of each group: random ones, by herding, or nearest to k-means centres.

    The last two go by embeddings, see `embed`.
    """
    chosen = []
    for number, group in enumerate(rows):
        most = min(count, len(group))
        if name == "random":
            picked = torch.randperm(len(group), generator=torch.Generator().manual_seed(derive_seed(seed, number)))[
                :most
            ]
        else:
            points = embed(run, group)
            picked = herding(points, most) if name == "herding" else k_centers(points, most, derive_seed(seed, number))
        chosen.append(group[picked])
    return torch.cat(chosen)


def embed(run: Run, index: Tensor) -> Tensor:
    """Embeddings `[N, D]` of training samples by the role `teacher`; where the recipe names none, images as vectors,
    and the rest by a fresh network of the first student's kind (with its weights, where that is a pretrained one)."""
    data = as_data(selection(run.data, index), run.data)
    if "teacher" in (*run.recipe.teachers, *run.given.get("teachers", {})):
        return embeddings(run, data, run.teacher)
    images = isinstance(data.sample("train", 1).get("image"), Tensor)
    return embeddings(run, data, None if images else draw_network(run, architectures(run)[0], "embedding"))


def embeddings(run: Run, data: DataModule, model: Model | None) -> Tensor:
    """Embeddings `[N, D]` of a data module's training split on the CPU; without a model its images as vectors."""
    found = []
    if model is not None:
        model.to(run.device).eval()
    with torch.no_grad(), run.accelerator.autocast():
        for batch in data.eval_loader("train", run.recipe.train.eval_batch_size or 256):
            batch = to_device(batch, run.device)
            found.append((batch["image"].flatten(1) if model is None else model(batch).need("embedding")).float().cpu())
    return torch.cat(found)


def _everything(run: Run) -> datasets.Dataset:
    return selection(run.data, torch.arange(run.data.size("train") or 0))
