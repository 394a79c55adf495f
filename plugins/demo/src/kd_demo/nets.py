"""The small networks, in PyTorch alone: this module needs neither kdcore nor what of this package does.

A folder that a run wrote (`student/`) is a `config.json` and a `model.safetensors`. Five lines make a network of it:

    import torch
    from kd_demo import nets
    net = nets.load("runs/quickstart/student")
    with torch.no_grad():
        logits = net(torch.rand(1, 1, 8, 8))["logits"]

Every network returns a dict of `logits` and `embedding`, the input of its last linear layer. A distilled `ViT` has two
such layers and adds `extras`, the logits of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_demo.sensor_nets import SensorNet

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Block(nn.Module):
    """Basic residual block (He et al. 2016, arXiv:1512.03385, figure 2): `[B, C, H, W]` to `[B, D, H/s, W/s]`."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else _conv_bn(channels, width, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """The activations after the block."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(hidden + self.shortcut(x))
        return out


class Encoder(nn.Module):
    """A stem and three residual stages, of `width`, `2 width` and `4 width` channels and `depth` blocks each."""

    stages: Sequence[str] = ("stage1", "stage2", "stage3")

    def __init__(self, in_channels: int, width: int, depth: int, strides: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(in_channels, width, kernel=3, stride=1), nn.ReLU())
        self.stage1 = _stage(width, width, depth, strides[0])
        self.stage2 = _stage(width, 2 * width, depth, strides[1])
        self.stage3 = _stage(2 * width, 4 * width, depth, strides[2])

    def encode(self, image: Tensor) -> Tensor:
        """The last stage's activations, of images in [0, 1] that are brought to [-1, 1] first."""
        out: Tensor = self.stage3(self.stage2(self.stage1(self.stem(2 * image - 1))))
        return out


class CNN(Encoder):
    """Residual image classifier with batch normalisation; its stages work at strides 1, 2 and 4.

    Args:
        in_channels, num_classes: of the task.
        width: channels of the first stage; the second has twice, the third four times as many.
        depth: residual blocks per stage.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__(in_channels, width, depth, strides=(1, 2, 2))
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "width": width, "depth": depth}
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """`image` `[B, C, H, W]` in [0, 1] to logits `[B, num_classes]` and embedding `[B, 4 width]`."""
        embedding = self.encode(image).mean((2, 3))
        return {"logits": self.fc(embedding), "embedding": embedding}


class Segmenter(Encoder):
    """Residual encoder of stride 4 with a 1x1 convolution as head; its stages work at strides 2, 4 and 4.

    Args:
        in_channels, num_classes: of the task.
        width: channels of the first stage; the second has twice, the third four times as many.
        depth: residual blocks per stage.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__(in_channels, width, depth, strides=(2, 2, 1))
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "width": width, "depth": depth}
        self.head = nn.Conv2d(4 * width, num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """`image` `[B, C, H, W]` in [0, 1] to logits `[B, classes, H/4, W/4]`, embedding `[B, 4 width, H/4, W/4]`."""
        embedding = self.encode(image)
        return {"logits": self.head(embedding), "embedding": embedding}


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) over `[B, T, D]`."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` is true where a position may be attended to, `[B, 1, 1, T]`; `None` for all, or for a causal model."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Pre-norm transformer layer (Xiong et al. 2020, arXiv:2002.04745, figure 1b)."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        x = x + self.drop(self.attention(self.norm1(x), mask))
        out: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return out


class Transformer(nn.Module):
    """Small pre-norm transformer over tokens: a text classifier, a tagger or a causal language model.

    Args:
        vocabulary: number of tokens.
        num_classes: of the task; for a language model, the size of the vocabulary.
        width, layers, heads, dropout: as usual; `heads` divides `width`.
        pool: whether the logits are one per text, from the mean over its tokens, or one per token.
        causal: whether a token sees only itself and those before it; padding then stands on the right.
    """

    def __init__(self, vocabulary: int, num_classes: int, width: int, layers: int, heads: int, dropout: float,
                 pool: bool, causal: bool) -> None:  # fmt: skip
        super().__init__()
        self.config = {"vocabulary": vocabulary, "num_classes": num_classes, "width": width, "layers": layers,
                       "heads": heads, "dropout": dropout, "pool": pool, "causal": causal}  # fmt: skip
        self.pool, self.causal = pool, causal
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Layer(width, heads, dropout, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        self.stages: Sequence[str] = tuple(f"blocks.{i}" for i in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """`[B, T]` each, to logits `[B, C]` and embedding `[B, D]`; without `pool`, `[B, T, C]` and `[B, T, D]`."""
        x = self.tokens(input_ids)
        x = x + positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        mask = None if self.causal else attention_mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if self.pool:
            weight = attention_mask[..., None].to(x.dtype)
            x = (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        return {"logits": self.fc(x), "embedding": x}


class ViT(nn.Module):
    """Small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with pre-norm layers, over square patches.

    Args:
        in_channels, num_classes: of the task.
        image_size: height and width of the images; `patch` divides both.
        width, layers, heads, dropout: as usual; `heads` divides `width`.
        patch: side of a patch in pixels.
        distilled: whether a distillation token with a head of its own stands beside the class token (DeiT, Touvron et
            al. 2021, arXiv:2012.12877, section 4).
    """

    def __init__(self, in_channels: int, num_classes: int, image_size: Sequence[int], width: int, layers: int,
                 heads: int, dropout: float, patch: int, distilled: bool) -> None:  # fmt: skip
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "image_size": list(image_size),
                       "width": width, "layers": layers, "heads": heads, "dropout": dropout, "patch": patch,
                       "distilled": distilled}  # fmt: skip
        self.distilled = distilled
        count = 2 if distilled else 1
        height, breadth = (side // patch for side in image_size)
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=0.02))
        # As large as the patches' embeddings: with DeiT's 0.02 the digits take several times as many epochs.
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count + height * breadth, width), std=0.5))
        self.blocks = nn.ModuleList(Layer(width, heads, dropout, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        if distilled:
            self.fc_dist = nn.Linear(width, num_classes)
        self.stages: Sequence[str] = tuple(f"blocks.{i}" for i in range(layers))

    def forward(self, image: Tensor) -> dict[str, Any]:
        """`image` `[B, C, H, W]` in [0, 1] to logits `[B, num_classes]` and embedding `[B, width]`, the class token.

        If distilled, the logits are the mean of both heads, and `extras` holds each as `cls_logits` and `dist_logits`.
        """
        x = self.patches(2 * image - 1).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x, None)
        x = self.norm(x)
        embedding = x[:, 0]
        logits = self.fc(embedding)
        if not self.distilled:
            return {"logits": logits, "embedding": embedding}
        extras = {"cls_logits": logits, "dist_logits": self.fc_dist(x[:, 1])}
        return {"logits": (logits + extras["dist_logits"]) / 2, "embedding": embedding, "extras": extras}


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5), sines then cosines, `[T, D]`, each of length one."""
    rates = torch.exp(-math.log(10_000) * torch.arange((width + 1) // 2, device=device) / ((width + 1) // 2))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width] * math.sqrt(2 / width)


Network = CNN | Segmenter | Transformer | ViT | SensorNet

ARCHITECTURES: dict[str, type[Network]] = {
    "demo-cnn": CNN,
    "demo-segmenter": Segmenter,
    "demo-sensors": SensorNet,
    "demo-transformer": Transformer,
    "demo-vit": ViT,
}
"""Networks by the name of their component, which is also the `architecture` of a `config.json`."""


def save(net: Network, facts: dict[str, Any], folder: Path) -> None:
    """Write `config.json` (architecture, its arguments and any further facts) and `model.safetensors` into a folder."""
    from safetensors.torch import save_model

    name = next(name for name, kind in ARCHITECTURES.items() if isinstance(net, kind))
    (folder / CONFIG).write_text(json.dumps({"architecture": name, "arguments": net.config, **facts}, indent=1) + "\n")
    save_model(net, str(folder / WEIGHTS))


def load(folder: str | Path) -> Network:
    """The network that `save` wrote into a folder, in evaluation mode.

    Raises:
        FileNotFoundError: if the folder has no `config.json` or no `model.safetensors`.
        KeyError: if the architecture is none of `ARCHITECTURES`.
    """
    from safetensors.torch import load_model

    config = json.loads((Path(folder) / CONFIG).read_text())
    net = ARCHITECTURES[config["architecture"]](**config["arguments"])
    load_model(net, str(Path(folder) / WEIGHTS))
    return net.eval()


def _conv_bn(channels: int, width: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def _stage(channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(channels, width, stride), *(Block(width, width, 1) for _ in range(depth - 1)))
