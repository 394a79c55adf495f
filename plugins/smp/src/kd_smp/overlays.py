"""Pictures of a segmentation: labels, what teachers and students predict, over the images."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn import functional as F

from kdcore.data import IGNORE, to_device
from kdcore.folder import write_text
from kdcore.models import Batch, Model
from kdcore.runner import Run

SAMPLES = 4
"""Rows of a picture."""
PICTURE = "samples.png"
INCH = 2.2
OPAQUE = 0.55
LEGEND = 24
"""Classes that the legend names, at most."""


def write_overlays(run: Run) -> None:
    """Draw the first samples of the split on which the student was evaluated, as `samples.png` of the run folder, and
    show it in the folder's README: a row for each, with the image, its labels, and what every teacher and student makes
    of it."""
    split = next((split for split in run.recipe.eval.on if split in run.data), None)
    if split is None:
        return
    rows = list(itertools.islice(_rows(run, split), SAMPLES))
    names = run.data.task.classes or [str(number) for number in range(run.data.task.num_classes or 0)]
    _draw(rows, list(names)).savefig(run.path / PICTURE, dpi=110)
    readme = run.path / "README.md"
    text, link = readme.read_text(encoding="utf-8"), f"![{split}: image, labels and predictions]({PICTURE})"
    if link not in text:
        write_text(readme, f"{text}\n{link}\n")


def _rows(run: Run, split: str) -> Any:
    """For each sample, its panels: a title, and an image `[3, H, W]` or labels `[H, W]` over one."""
    models = {role: run.models[role] for role in (*run.recipe.teachers, *run.student_roles)
              if isinstance(run.models.get(role), Model)}  # fmt: skip
    for batch in run.data.eval_loader(split, 1):
        batch = to_device(batch, run.device)
        if "image" not in batch:
            return
        said = {role: _predicted(run, role, model, batch) for role, model in models.items()}
        yield batch["image"][0].float().cpu(), {"labels": batch["mask"][0].cpu(), **{k: v for k, v in said.items()
                                                                                     if v is not None}}  # fmt: skip


@torch.no_grad()
def _predicted(run: Run, role: str, model: Any, batch: Batch) -> Tensor | None:
    """The class of each pixel of the label `[H, W]`; nothing for a model that does not read the plain batch."""
    model.to(run.device).eval()
    try:
        outputs = model(batch)
        outputs = run.method.predict(outputs, batch) if role in run.student_roles else outputs
        logits = outputs.need("logits").float()
    except Exception:  # a teacher may want more than what is evaluated has, such as labels in its input
        return None
    return F.interpolate(logits, batch["mask"].shape[-2:], mode="bilinear").argmax(1)[0].cpu()


def _draw(rows: list[tuple[Tensor, dict[str, Tensor]]], names: list[str]) -> Figure:
    titles = ["image", *(rows[0][1] if rows else ())]
    colours = _colours(len(names))
    figure = Figure((INCH * len(titles), INCH * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (image, layers) in zip(axes, rows, strict=True):
        picture = _rgb(image)
        panels = [picture, *(_over(picture, labels, colours) for labels in layers.values())]
        for place, panel in zip(line, panels, strict=True):
            place.imshow(panel)
            place.set_axis_off()
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title, fontsize=9)
    patches = [Patch(color=colours[i], label=name) for i, name in enumerate(names[:LEGEND])]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def _colours(count: int) -> np.ndarray:
    """`[C, 3]`, as different as a colour map has them."""
    palette = mpl.colormaps["tab20" if count > 10 else "tab10"]
    return np.array([palette(number % palette.N)[:3] for number in range(max(count, 1))])


def _rgb(image: Tensor) -> np.ndarray:
    """`[H, W, 3]` in [0, 1] of an image `[C, H, W]`, stretched to that range where it goes beyond."""
    shown = (image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()
    low, high = min(0.0, float(shown.min())), max(1.0, float(shown.max()))
    return np.asarray((shown - low) / (high - low))


def _over(picture: np.ndarray, labels: Tensor, colours: np.ndarray) -> np.ndarray:
    """The picture in grey with each pixel's class laid over it; pixels that are ignored are left as they are."""
    values = labels.numpy()
    counts = (values != IGNORE)[..., None]
    size = picture.shape[:2]
    if values.shape != size:
        tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
        picture = F.interpolate(tensor, values.shape, mode="bilinear")[0].permute(1, 2, 0).numpy()
    grey = picture.mean(-1, keepdims=True)
    mixed = (1 - OPAQUE) * grey + OPAQUE * colours[np.where(values == IGNORE, 0, values)]
    return np.asarray(np.where(counts, mixed, picture))
