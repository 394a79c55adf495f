"""Pictures: read, brought to size, augmented. Images are float `[C, H, W]` in [0, 1], masks int `[H, W]`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kdcore.data import IGNORE
from kdcore.errors import DataError

Sample = dict[str, Any]

FILL = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
IMAGE_ONLY = ("randaugment", "trivial-augment")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Formats that are read. Pillow knows more, some of which (EPS) start other programs."""
CROP_PADDING = 8  # a random crop pads the image by this part of its side, as is usual on CIFAR: 4 of 32 pixels


def open_picture(value: Any, folder: Path) -> Image.Image:
    """A picture from `{"bytes", "path"}` or a path.

    Raises:
        DataError: naming the file, if it is missing or cannot be decoded.
    """
    name, data = (value["path"], value["bytes"]) if isinstance(value, dict) else (value, None)
    if data is None and not isinstance(name, str):
        raise DataError(f"a picture, or the path of one, is expected; found {type(value).__name__}")
    try:
        picture = Image.open(io.BytesIO(data) if data is not None else folder / name, formats=FORMATS)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {name or 'in the data'} cannot be read: {error}") from error
    return ImageOps.exif_transpose(picture)


def to_image(picture: Image.Image, channels: int) -> Tensor:
    """Float `[channels, H, W]` in [0, 1]."""
    image: Tensor = F.to_dtype(
        F.pil_to_tensor(picture.convert("L" if channels == 1 else "RGB")), torch.float32, scale=True
    )
    return image


def to_mask(picture: Image.Image, count: int, ignore_label: int | None, reduce_labels: bool) -> Tensor:
    """Int `[H, W]`: classes from 0 to count - 1, and `IGNORE` where nothing counts.

    Raises:
        DataError: if the picture has several channels, or other values.
    """
    values = torch.from_numpy(np.array(picture, dtype=np.int64))
    if values.ndim != 2:
        raise DataError(f"a mask is a picture of one channel whose values are classes; this one is {picture.mode}")
    ignored = values == (IGNORE if ignore_label is None else ignore_label)
    if reduce_labels:
        ignored |= values == 0
        values = values - 1
    values = values.masked_fill(ignored, IGNORE)
    wrong = values[(values != IGNORE) & ((values < 0) | (values >= count))]
    if wrong.numel():
        raise DataError(f"a mask holds the value {int(wrong[0]) + reduce_labels}, but there are {count} classes; "
                        "is it an `ignore_label:`?")  # fmt: skip
    return values


class Fit:
    """Brings a sample's image to size; with a mask both are stretched alike, else the image is resized and cropped.

    Args:
        size: height and width in pixels.
        crop_fraction: side of the centre crop, as part of the resized image.
    """

    def __init__(self, size: tuple[int, int], crop_fraction: float) -> None:
        self.size, self.crop_fraction = size, crop_fraction

    def __call__(self, sample: Sample) -> Sample:
        """The sample with image `[C, *size]`, and mask `[*size]` if it has one; they are plain tensors afterwards."""
        image = sample["image"].as_subclass(Tensor)
        if "mask" in sample:
            mask = F.resize(tv_tensors.Mask(sample["mask"]), list(self.size)).as_subclass(Tensor)
            return {**sample, "image": F.resize(image, list(self.size)), "mask": mask}
        return {**sample, "image": self.crop(image)}

    def crop(self, image: Tensor) -> Tensor:
        """Resized so that it covers the enlarged target, then cropped in the centre to `[C, *size]`."""
        height, width = image.shape[-2:]
        scale = max(self.size[0] / height, self.size[1] / width) / self.crop_fraction
        if scale != 1:
            image = F.resize(image, [round(height * scale), round(width * scale)])
        cropped: Tensor = F.center_crop(image, list(self.size))
        return cropped


class Augment:
    """Random changes of a sample's image, and the same geometric ones of its mask.

    Args:
        steps: names, or `{name: arguments}` for torchvision's transform behind it.
        size: height and width in pixels.
        masked: whether samples have masks.

    Raises:
        DataError: if a step cannot be used with masks, or does not take its arguments.
    """

    def __init__(self, steps: Sequence[str | dict[str, dict[str, Any]]], size: tuple[int, int], masked: bool) -> None:
        pairs = [pair for step in steps for pair in ({step: {}} if isinstance(step, str) else step).items()]
        for name, _ in pairs:
            if masked and name in IMAGE_ONLY:
                raise DataError(f"augment: {name!r} moves images without their masks; choose steps that move both")
        self.transform = v2.Compose([_step(name, arguments, size) for name, arguments in pairs])

    def __call__(self, sample: Sample) -> Sample:
        """The sample with image, and mask if it has one, changed; they are plain tensors afterwards."""
        view: Sample = {"image": tv_tensors.Image(sample["image"])}
        if "mask" in sample:
            view["mask"] = tv_tensors.Mask(sample["mask"])
        return {**sample, **{key: value.as_subclass(Tensor) for key, value in self.transform(view).items()}}


class RandomScale(v2.Transform):  # type: ignore[misc]
    """Makes an image, and its mask, larger or smaller by a random factor.

    Args:
        scale: the smallest and the largest factor.
    """

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: two positive factors, the smaller one first; not {list(scale)}")
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size that is drawn."""
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        return {"size": [max(1, round(factor * side)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image or a mask of that size."""
        return self._call_kernel(F.resize, inpt, params["size"])


def random_scale_crop(size: tuple[int, int], scale: tuple[float, float] = (0.5, 2.0)) -> Any:
    """An image at a random scale, of which a piece is cut out; filled up where it is smaller than that."""
    return v2.Compose([RandomScale(scale), v2.RandomCrop(size, pad_if_needed=True, fill=FILL)])


STEPS: dict[str, Callable[[tuple[int, int]], tuple[Any, dict[str, Any]]]] = {
    "random-resized-crop": lambda size: (v2.RandomResizedCrop, {"size": size}),
    "random-scale-crop": lambda size: (random_scale_crop, {"size": size}),
    "random-crop": lambda size: (v2.RandomCrop, {"size": size, "padding": min(size) // CROP_PADDING, "fill": FILL}),
    "flip": lambda size: (v2.RandomHorizontalFlip, {}),
    "vertical-flip": lambda size: (v2.RandomVerticalFlip, {}),
    "rotation": lambda size: (v2.RandomRotation, {"degrees": 15, "fill": FILL}),
    "color-jitter": lambda size: (v2.ColorJitter, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}),
    "randaugment": lambda size: (v2.RandAugment, {}),
    "trivial-augment": lambda size: (v2.TrivialAugmentWide, {}),
    "random-erasing": lambda size: (v2.RandomErasing, {}),
}
"""Each step's transform and the arguments it has by default."""


def _step(name: str, arguments: dict[str, Any], size: tuple[int, int]) -> Any:
    make, defaults = STEPS[name](size)
    try:
        return make(**{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise DataError(f"augment: {name!r} cannot be made with {arguments}: {error}") from error
