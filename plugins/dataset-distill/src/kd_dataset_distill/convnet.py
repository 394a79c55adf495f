"""The ConvNet of the dataset-condensation papers, as a student or teacher.

Source: Zhao, Mopuri, Bilen 2021 (arXiv 2006.05929), section 4.1, after Gidaris and Komodakis 2018.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_dataset_distill.options import ConvNetOptions
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Labels, Model, Outputs, check_pair

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, norm, ReLU and pooling by two, then one linear layer.

    Images of one channel are padded by three in the first convolution, so that 28x28 become 32x32.

    Args:
        channels, size: of the images, `[channels, *size]`.
        num_classes: outputs.
        width: channels of every block.
        depth: how many blocks.
        norm: `instance` (one group per channel), `batch` or `none`.
        mean, std: by which images are standardised first.

    Raises:
        ValueError: if the images are too small for so many blocks.
    """

    def __init__(self, channels: int, size: Sequence[int], num_classes: int, width: int = 128, depth: int = 3,
                 norm: str = "instance", mean: float = 0.0, std: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        self.config = {"channels": channels, "size": list(size), "num_classes": num_classes, "width": width,
                       "depth": depth, "norm": norm, "mean": mean, "std": std}  # fmt: skip
        layers: list[nn.Module] = []
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 else 1
            layers.append(nn.Conv2d(width if block else channels, width, 3, padding=padding))
            layers += [_norm(norm, width), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))
        sides = [(side + (4 if channels == 1 else 0)) // 2**depth for side in size]
        if min(sides) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels are too small for {depth} blocks")
        self.classifier = nn.Linear(width * sides[0] * sides[1], num_classes)
        self.stages = [name for name, m in self.features.named_children() if isinstance(m, nn.AvgPool2d)]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """`[B, C, H, W]` to logits `[B, num_classes]` and embedding `[B, D]`, the flattened features."""
        embedding = self.features((image - self.config["mean"]) / self.config["std"]).flatten(1)
        return {"logits": self.classifier(embedding), "embedding": embedding}


def convnet(options: ConvNetOptions, task: Task) -> Model:
    """The network for a classification of images.

    Raises:
        ModelError: if the task is another, the images are too small, or a checkpoint does not fit.
    """
    if task.image is None or task.num_classes is None:
        raise ModelError("dd-convnet makes logits of images of one shape; the data poses a task of kind "
                         f"{task.kind!r} without {'images' if task.image is None else 'classes'}")  # fmt: skip
    channels, *size = task.image
    if options.checkpoint is None:
        shared = options.model_dump(include={"width", "depth", "norm", "mean", "std"})
        try:
            net = ConvNet(channels, size, task.num_classes, **shared)
        except ValueError as error:
            raise ModelError(f"dd-convnet: {error}; set `depth`") from error
    else:
        net = _load(student_folder(Path(options.checkpoint)), task)
    stages = [f"features.{name}" for name in net.stages]
    return Model(net, call, save=functools.partial(save, net, task.classes), labels=task.labels, stages=stages)


def call(net: nn.Module, batch: dict[str, Any]) -> Outputs:
    """The network on a batch's `image`."""
    if "image" not in batch:
        raise ModelError(f"dd-convnet reads 'image'; the batch has: {', '.join(batch)}")
    return Outputs(**net(batch["image"]))


def save(net: ConvNet, classes: Sequence[str], folder: Path) -> None:
    """Write `config.json` and `model.safetensors`."""
    from safetensors.torch import save_model

    (folder / CONFIG).write_text(json.dumps({"arguments": net.config, "classes": list(classes)}, indent=1) + "\n")
    save_model(net, str(folder / WEIGHTS))


def load(folder: str | Path) -> ConvNet:
    """The network that `save` wrote, in evaluation mode. It needs PyTorch and this module alone."""
    from safetensors.torch import load_model

    net = ConvNet(**json.loads((Path(folder) / CONFIG).read_text())["arguments"])
    load_model(net, str(Path(folder) / WEIGHTS))
    return net.eval()


def _load(folder: Path, task: Task) -> ConvNet:
    try:
        config = json.loads((folder / CONFIG).read_text())
        net = load(folder)
    except Exception as error:  # a missing, foreign or damaged file: safetensors and json have no common class
        raise ModelError(f"checkpoint {folder}: no dd-convnet can be loaded from it: {error}") from error
    names = tuple(config["classes"])
    check_pair(Labels(net.classifier.out_features, names or None), task.labels, (f"checkpoint {folder}", "the data"))
    if [net.config["channels"], *net.config["size"]] != list(task.image or ()):
        raise ModelError(f"checkpoint {folder} was made for images of {net.config['channels']}x{net.config['size']}, "
                         f"the data's are {task.image}")  # fmt: skip
    return net


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(width, width)
