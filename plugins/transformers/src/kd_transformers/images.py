"""How a model wants its images: read from its image processor's settings, applied to images in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES


@dataclass(frozen=True)
class Normalise:
    """`(image - mean) / std` per channel, or nothing without a mean; `bgr` for models that read colours in reverse."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    bgr: bool = False

    def __call__(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Images `[B, C, H, W]` in [0, 1], normalised."""
        channels = image.flip(1).unbind(1) if self.bgr else image.unbind(1)
        if self.mean:  # plain numbers, so that nothing is copied to the device and waited for
            triples = zip(channels, self.mean, self.std, strict=True)
            channels = tuple((channel - mean) / std for channel, mean, std in triples)
        return torch.stack(channels, 1).to(dtype)


def default_settings(config: Any) -> dict[str, Any]:
    """The settings of a model type's own image processor, for a checkpoint that brings none.

    ImageNet's mean and deviation where the type has no processor of its own; 0.5 for images that are not in colour.
    """
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type) or {}
    maker = getattr(transformers, names.get("pil") or "", None)
    settings: dict[str, Any] = dict(maker().to_dict()) if maker else {}
    mean, std = settings.get("image_mean") or IMAGENET_DEFAULT_MEAN, settings.get("image_std") or IMAGENET_DEFAULT_STD
    channels = getattr(config, "num_channels", len(mean))
    if channels != len(mean):
        mean, std = IMAGENET_STANDARD_MEAN[:1] * channels, IMAGENET_STANDARD_STD[:1] * channels
    settings |= {"do_normalize": settings.get("do_normalize", True), "image_mean": list(mean), "image_std": list(std)}
    if image_size := getattr(config, "image_size", None):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        settings["size"] = {"height": height, "width": width}
    return settings


def normaliser(settings: Mapping[str, Any]) -> Normalise:
    """The normalisation that an image processor's settings ask for."""
    bgr = bool(settings.get("do_flip_channel_order"))
    if not settings.get("do_normalize", True):
        return Normalise(bgr=bgr)
    mean, std = settings.get("image_mean") or IMAGENET_DEFAULT_MEAN, settings.get("image_std") or IMAGENET_DEFAULT_STD
    return Normalise(tuple(mean), tuple(std), bgr)
