"""A timm network as a student that gives a feature map and no logits: what the method's head is put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_barm.options import TimmFeaturesOptions
from kd_timm.models import check_name, create, explained, per_channel
from kdcore import Model, Outputs
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError


class Features(nn.Module):
    """A timm network down to its last map, `[B, D, h, w]`, which is also what `map` gives.

    Args:
        network: made with `features_only=True` for one map.
        channels: of the images.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.network, self.map = network, nn.Identity()
        self.last = getattr(network, "output_fmt", None) == "NHWC"
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            values = per_channel(network.pretrained_cfg[name], channels)
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Outputs:
        """The map, as the embedding, of images in [0, 1]."""
        (found,) = self.network((image - self.mean) / self.std)
        return Outputs(embedding=self.map(found.movedim(-1, 1) if self.last else found))


def timm_features(options: TimmFeaturesOptions, task: Task) -> Model:
    """The last feature map of a timm network; the tap `@-1` reads it.

    Raises:
        ModelError: if timm has no such network, it cannot have this stride, or its weights cannot be had.
    """
    check_name(options.model)
    channels = task.image[0] if task.image else 3
    arguments = {"features_only": True, "out_indices": (-1,), "in_chans": channels}
    try:
        published = options.pretrained and not options.checkpoint
        network = create(options.model, {**arguments, "output_stride": options.output_stride, "pretrained": published})
    except ModelError:
        raise
    except Exception as error:  # whatever timm and the Hub raise
        cause = " ".join(str(error).split())
        raise ModelError(f"timm's {options.model!r} cannot be had with pretrained={options.pretrained} and "
                         f"output_stride={options.output_stride}: {cause}") from error  # fmt: skip
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = options.bn_momentum
    made = Features(network, channels)
    if options.checkpoint:
        path = student_folder(Path(options.checkpoint)) / "model.safetensors"
        with explained(path):
            from safetensors.torch import load_model

            load_model(made, path)
    return Model(made, labels=task.labels, stages=("map",))
