"""Generated data for quickstarts and tests: captioned shapes, and a mixture of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_diffusers.options import MixtureOptions, ShapesOptions
from kdcore.data import DataModule, Task, derive_seed

SIDE = 8
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.3, 1.0)}
SHAPES = {
    "square": ("1111", "1111", "1111", "1111"),
    "frame": ("1111", "1001", "1001", "1111"),
    "cross": ("0110", "1111", "1111", "0110"),
    "stairs": ("1000", "1100", "1110", "1111"),
}
CAPTIONS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


class Rows(Dataset[dict[str, Any]]):
    """Samples from columns of equal length: tensors, or lists of texts."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[index] for key, values in self.columns.items()}


def captioned_shapes(options: ShapesOptions) -> DataModule:
    """Samples of `image` `[3, 8, 8]` in [0, 1], `label` (which of 12 captions), `text`, `prompt_embeds` `[2, D]`, one
    row per word, and `pooled_prompt_embeds` `[D]`, their mean. Shapes of 4x4 pixels lie anywhere."""
    table = _words(options)
    splits = {}
    for name, size in (("train", options.train), ("val", options.val)):
        generator = _generator(options.seed, name)
        label = torch.randint(len(CAPTIONS), (size,), generator=generator)
        corner = torch.randint(SIDE - 3, (size, 2), generator=generator)
        images = torch.stack([_picture(int(c), *map(int, at)) for c, at in zip(label, corner, strict=True)])
        images = images + options.noise * torch.randn(images.shape, generator=generator)
        words = torch.stack([torch.stack([table[word] for word in CAPTIONS[c].split()]) for c in label.tolist()])
        splits[name] = Rows(image=images.clamp(0, 1), label=label, text=[CAPTIONS[c] for c in label.tolist()],
                            prompt_embeds=words, pooled_prompt_embeds=words.mean(1))  # fmt: skip
    return DataModule(splits, Task("unlabelled", CAPTIONS, image=(3, SIDE, SIDE)))


def mixture(options: MixtureOptions) -> DataModule:
    """Samples of `latents` `[2, 1, 1]`, a point of the plane, and `label`, its component."""
    splits = {}
    for name, size in (("train", options.train), ("val", options.val)):
        generator = _generator(options.seed, name)
        label = torch.randint(options.components, (size,), generator=generator)
        angle = 2 * math.pi * label / options.components
        points = torch.stack([angle.cos(), angle.sin()], dim=1)
        points = points + options.spread * torch.randn(points.shape, generator=generator)
        splits[name] = Rows(latents=points[:, :, None, None], label=label)
    return DataModule(splits, Task("unlabelled", num_classes=options.components))


def _words(options: ShapesOptions) -> dict[str, Tensor]:
    generator = _generator(options.seed, "words")
    return {word: torch.randn(options.embedding, generator=generator) for word in (*COLOURS, *SHAPES)}


def _picture(label: int, top: int, left: int) -> Tensor:
    colour, shape = CAPTIONS[label].split()
    image = torch.full((3, SIDE, SIDE), 0.05)
    mask = torch.tensor([[cell == "1" for cell in row] for row in SHAPES[shape]])
    image[:, top : top + 4, left : left + 4][:, mask] = torch.tensor(COLOURS[colour])[:, None]
    return image


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*key))
