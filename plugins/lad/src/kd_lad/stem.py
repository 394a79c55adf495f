"""A further input plane of any model's first convolution, which reads the label channel of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd_lad.noising import CHANNEL
from kdcore import Model
from kdcore.data import to_device
from kdcore.errors import ModelError, did_you_mean
from kdcore.models import Batch

WEIGHTS = "label_plane.safetensors"
"""The plane's weights, `[out, 1, kh, kw]`, beside the native files of the model without it."""


class LabelPlane:
    """Widens a convolution of a model in place by one input plane; the weights of the others stay.

    From then on the model reads `batch["label_channel"]`, `[B, 1, H, W]`, where its batch has one, and zeros where not:
    the channel joins the image at the convolution, after the model's own normalisation (see `fitted` where the model
    also changes the image's size).

    Args:
        model: the model.
        channels: of the images.
        std: standard deviation of the new plane's weights.
        stem: module name of the convolution; default: the first one that reads as many channels.

    Raises:
        ModelError: if there is no such convolution.
    """

    def __init__(self, model: Model, channels: int, std: float, stem: str | None = None) -> None:
        self.model, self.channel = model, None
        self.name, self.conv = find_stem(model.module, channels, stem)
        weight = self.conv.weight.detach()
        self._set(torch.cat([weight, std * torch.randn_like(weight[:, :1])], 1))
        self._handles = [
            model.register_forward_pre_hook(self._take),
            self.conv.register_forward_pre_hook(self._append),
            model.register_forward_hook(self._drop),
        ]

    def remove(self) -> None:
        """Make the model what it was: it computes the same as before, given zeros in the channel."""
        for handle in self._handles:
            handle.remove()
        self._set(self.conv.weight.detach()[:, :-1])

    def save(self, folder: Path) -> None:
        """Write the model without the plane in its native format, and the plane beside it."""
        from safetensors.torch import save_file

        whole = self.conv.weight
        self._set(whole.detach()[:, :-1])
        try:
            self.model.save(folder)
        finally:
            self.conv.weight, self.conv.in_channels = whole, whole.shape[1]
        save_file({self.name: whole.detach()[:, -1:].cpu().contiguous()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Take the plane's weights from a folder that `save` wrote.

        Raises:
            ModelError: if the file cannot be read, or is of another convolution.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}") from error
        plane, wanted = found.get(self.name), self.conv.weight[:, -1:]
        if plane is None or plane.shape != wanted.shape:
            held = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
            raise ModelError(f"{folder / WEIGHTS} holds the plane of {held}; the teacher's is {self.name} "
                             f"{list(wanted.shape)}")  # fmt: skip
        with torch.no_grad():
            wanted.copy_(plane)

    def export(self) -> Model:
        """What saves itself with the plane."""
        return Model(self.model.module, save=self.save)

    def _set(self, weight: Tensor) -> None:
        self.conv.weight = nn.Parameter(weight.contiguous())
        self.conv.in_channels = weight.shape[1]

    def _take(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.channel = inputs[0].get(CHANNEL)

    def _append(self, conv: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        image: Tensor = inputs[0]
        if self.channel is None:
            return (F.pad(image, (0, 0, 0, 0, 0, 1)),)
        return (torch.cat([image, fitted(self.channel.to(image), image)], 1),)

    def _drop(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        self.channel = None


def fitted(channel: Tensor, image: Tensor) -> Tensor:
    """A channel `[B, 1, H, W]` at the size of what a convolution reads: an image that the model has filled up on the
    right and below with one value, where the channel becomes 0, or else resized (nearest neighbours)."""
    size, (height, width) = image.shape[-2:], channel.shape[-2:]
    if size == (height, width):
        return channel
    below, right = size[0] - height, size[1] - width
    rest = (image[..., height:, :], image[..., width:])
    if min(below, right) >= 0 and all(bool((part == part[..., :1, :1]).all()) for part in rest):
        return F.pad(channel, (0, right, 0, below))
    return F.interpolate(channel, size, mode="nearest")


def find_stem(module: nn.Module, channels: int, stem: str | None = None) -> tuple[str, nn.Conv2d]:
    """Name and module of the convolution that reads the image.

    Raises:
        ModelError: if there is none, or the one that is named reads no image.
    """
    convolutions = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    fitting = {n: c for n, c in convolutions.items() if c.in_channels == channels and c.groups == 1
               and not parametrize.is_parametrized(c)}  # fmt: skip
    if stem is None and fitting:
        return next(iter(fitting.items()))
    what = f"{type(module).__name__} has no plain 2D convolution"
    if stem is None:
        has = ", ".join(f"{name} ({conv.in_channels})" for name, conv in list(convolutions.items())[:5])
        raise ModelError(
            f"{what} of {channels} input channels that could be widened for the labels; it has: {has or 'none'}"
        )
    if stem not in fitting:
        raise ModelError(
            f"method.stem: {what} {stem!r} of {channels} input channels; {did_you_mean(stem, fitting, 'such')}"
        )
    return stem, fitting[stem]


@torch.no_grad()
def reads_labels(model: Model, batch: Batch) -> bool:
    """Whether the logits of a model depend on the label channel of its batch."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    image = batch["image"].to(device)
    generator = torch.Generator().manual_seed(0)
    channel = torch.randn(len(image), 1, *image.shape[-2:], generator=generator).to(device)
    one, two = (model({**to_device(batch, device), CHANNEL: c}).need("logits") for c in (channel, channel.flip(0, -1)))
    model.train(training)
    return not torch.equal(one, two)
