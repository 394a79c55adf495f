"""The networks of the two search spaces, in PyTorch alone: this module needs neither kdcore nor torchvision.

A folder that a run wrote (`student/`) is a `config.json` and a `model.safetensors`:

    from kd_diswot import nets
    net = nets.load("runs/diswot-quickstart/student")
    logits = net(images)["logits"]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def convolutions(channels: int, width: int, stride: int, *before: nn.Module) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm, the first with a stride."""
    return nn.Sequential(*before, nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                         nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))  # fmt: skip


class Block(nn.Module):
    """Basic residual block: `[B, C, H, W]` to `[B, D, H/s, W/s]`."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = convolutions(channels, width, stride)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))  # fmt: skip
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The activations after the block."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class CIFARResNet(nn.Module):
    """ResNet for small images (He et al. 2016, section 4.2): stages of `depths` blocks, each half as large and twice as
    wide as the one before it."""

    def __init__(self, depths: Sequence[int], width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages, channels = [], width
        for i, depth in enumerate(depths):
            blocks = [Block(channels if j == 0 else width << i, width << i, 1 if j or not i else 2)
                      for j in range(depth)]  # fmt: skip
            stages.append(nn.Sequential(*blocks))
            channels = width << i
        self.layers = nn.ModuleList(stages)
        self.stages = tuple(f"layers.{i}" for i in range(len(stages)))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits `[B, C]` and embedding `[B, D]` of images `[B, in_channels, H, W]`."""
        hidden = self.stem(image)
        for layer in self.layers:
            hidden = layer(hidden)
        embedding = hidden.mean((2, 3))
        return {"logits": self.fc(embedding), "embedding": embedding}


class Zero(nn.Module):
    """The operation `none`: nothing passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def operation(name: str, channels: int) -> nn.Module:
    """An operation of a cell; it keeps the shape."""
    if name in ("nor_conv_1x1", "nor_conv_3x3"):
        kernel = int(name[-1])
        conv = nn.Conv2d(channels, channels, kernel, 1, kernel // 2, bias=False)
        return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels))
    return {"none": Zero, "skip_connect": nn.Identity,
            "avg_pool_3x3": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False)}[name]()  # fmt: skip


class Cell(nn.Module):
    """Four nodes, each the sum of operations on all before it (Dong and Yang 2020, arXiv 2001.00326, figure 1)."""

    def __init__(self, operations: Sequence[str], channels: int) -> None:
        super().__init__()
        self.edges = nn.ModuleList(operation(name, channels) for name in operations)

    def forward(self, x: Tensor) -> Tensor:
        """The last node."""
        nodes, edges = [x], iter(self.edges)
        for _ in range(3):
            nodes.append(torch.stack([next(edges)(node) for node in nodes]).sum(0))
        return nodes[-1]


class Reduction(nn.Module):
    """A residual block that halves the size; its shortcut is pooled, then a 1x1 convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = convolutions(channels, width, 2, nn.ReLU())
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, 0, ceil_mode=True),
                                      nn.Conv2d(channels, width, 1, bias=False))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D, H/2, W/2]`."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class CellNet(nn.Module):
    """NAS-Bench-201's network: three stages of `cells` times the cell, a reduction between them, C, 2C and 4C wide."""

    stages = ("stage1", "stage2", "stage3")

    def __init__(
        self, operations: Sequence[str], channels: int, cells: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()

        def stack(width: int, *before: nn.Module) -> nn.Sequential:
            return nn.Sequential(*before, *(Cell(operations, width) for _ in range(cells)))

        c = channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))
        self.stage1 = stack(c)
        self.stage2 = stack(2 * c, Reduction(c, 2 * c))
        self.stage3 = stack(4 * c, Reduction(2 * c, 4 * c))
        self.stage3.append(nn.Sequential(nn.BatchNorm2d(4 * c), nn.ReLU()))
        self.fc = nn.Linear(4 * c, num_classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits `[B, C]` and embedding `[B, 4 channels]` of images `[B, in_channels, H, W]`."""
        embedding = self.stage3(self.stage2(self.stage1(self.stem(image)))).mean((2, 3))
        return {"logits": self.fc(embedding), "embedding": embedding}


NETS = {"cifar-resnet": CIFARResNet, "nasbench201": CellNet}


def save(net: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write `config.json` (`architecture`, `arguments`) and `model.safetensors`."""
    from safetensors.torch import save_model

    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    save_model(net, str(folder / WEIGHTS))


def load(folder: str | Path) -> nn.Module:
    """The network in a folder that `save` wrote, in evaluation mode."""
    from safetensors.torch import load_model

    config = json.loads((Path(folder) / CONFIG).read_text())
    net: nn.Module = NETS[config["architecture"]](**config["arguments"])
    load_model(net, str(Path(folder) / WEIGHTS))
    return net.eval()
