"""The label noising module: the label channel of a batch, from random numbers of each sample's own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kd_lad.functional import fixed_codes, label_channel
from kdcore.data import IGNORE
from kdcore.generation import row_seeds
from kdcore.models import Batch

CHANNEL = "label_channel"
"""Key of a batch under which a teacher finds the channel, float `[B, 1, H, W]`."""


@dataclass(frozen=True)
class LabelNoising:
    """How labels become a channel.

    Args:
        classes: of the data, K.
        codes: drawn for each image, or the same for all.
        code_std: standard deviation of random codes, factor of fixed ones.
        noise_std, scale: as in `functional.label_channel`.
    """

    classes: int
    codes: Literal["random", "fixed"]
    code_std: float
    noise_std: float
    scale: float

    def __call__(self, batch: Batch, *parts: object) -> Tensor:
        """The channel `[B, 1, H, W]` of a batch's `mask`.

        Its random numbers depend on `parts` and on each sample's place in its split, and so neither on the number of
        processes nor on how the batch is divided.
        """
        mask: Tensor = batch["mask"]
        codes, noise = _draw(row_seeds(batch, *parts), self.classes + 1, mask)
        if self.codes == "fixed":
            codes = fixed_codes(self.classes).to(mask.device).expand_as(codes)
        return label_channel(
            mask, self.code_std * codes, noise, noise_std=self.noise_std, scale=self.scale, ignore_index=IGNORE
        )

    def seen(self, batch: Batch, *parts: object) -> Batch:
        """The batch with the channel in it."""
        return {**batch, CHANNEL: self(batch, *parts)}


def _draw(seeds: Sequence[int], slots: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal codes `[B, slots]` and noise `[B, 1, H, W]`, each row from a seed."""
    generator, codes, noise = torch.Generator(mask.device), [], []
    for seed in seeds:
        generator.manual_seed(seed)
        codes.append(torch.randn(slots, generator=generator, device=mask.device))
        noise.append(torch.randn(1, *mask.shape[1:], generator=generator, device=mask.device))
    return torch.stack(codes), torch.stack(noise)
