"""The video encoder, in PyTorch and timm alone: this module needs neither kdcore nor the rest of this package.

A folder that a run wrote (`student/`) is a `config.json` and a `model.safetensors`. Five lines make an encoder of it:

    import torch
    from kd_discovr import vit
    net = vit.load("runs/discovr-quickstart/student")
    with torch.no_grad():
        embedding = net(torch.rand(1, 8, 3, 32, 32))["embedding"]  # [1, 64]

Source: the encoder of Tong et al. 2022, "VideoMAE" (arXiv 2203.12602), with a class token, as DISCOVR uses it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EPS = 1e-6
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class VideoViT(nn.Module):
    """A vision transformer over tubelets of a clip, with fixed positions; what is masked never enters the blocks.

    Args:
        channels: of the frames.
        width, layers, heads, mlp_ratio, qkv_bias: of the transformer.
        patch: side of a patch in pixels.
        tubelet: frames that a patch spans.
        mean, std: of each channel, for frames in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int = 3, width: int = 768, layers: int = 12, heads: int = 12, mlp_ratio: float = 4.0,
        qkv_bias: bool = True, patch: int = 16, tubelet: int = 2,
        mean: Sequence[float] = IMAGENET[0], std: Sequence[float] = IMAGENET[1],
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = {"channels": channels, "width": width, "layers": layers, "heads": heads, "mlp_ratio": mlp_ratio,
                       "qkv_bias": qkv_bias, "patch": patch, "tubelet": tubelet, "mean": list(mean),
                       "std": list(std)}  # fmt: skip
        self.width, self.heads, self.patch, self.tubelet = width, heads, patch, tubelet
        kernel = (tubelet, patch, patch)
        self.projection = nn.Conv3d(channels, width, kernel, stride=kernel)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.blocks = blocks(width, layers, heads, mlp_ratio, qkv_bias)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.blocks.apply(init_linear)

    def embed(self, video: Tensor) -> Tensor:
        """Every token of a clip with its position, before the blocks.

        Args:
            video: `[B, T, C, H, W]` in [0, 1].

        Returns:
            `[B, N, width]`, by frame, row and column.

        Raises:
            ValueError: if tubelets and patches do not tile the clip, or its channels are others.
        """
        grid(video.shape, self.tubelet, self.patch, self.projection.in_channels)
        pixels = (video - self.mean) / self.std
        tokens = self.projection(pixels.transpose(1, 2)).flatten(2).mT
        return tokens + positions(tokens.shape[1], self.width, tokens.device)

    def encode(self, tokens: Tensor) -> Tensor:
        """The class token and the given tokens after all blocks: `[B, n, width]` to `[B, 1 + n, width]`."""
        hidden = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        out: Tensor = self.norm(self.blocks(hidden))
        return out

    def forward(self, video: Tensor) -> dict[str, Tensor | None]:
        """The class token of the whole clip as `embedding` `[B, width]`; there are no logits."""
        return {"logits": None, "embedding": self.encode(self.embed(video))[:, 0]}

    def frame_encoder(self) -> VideoViT:
        """An encoder of single frames of the same geometry, with weights of its own."""
        return VideoViT(**{**self.config, "tubelet": 1})


def blocks(width: int, layers: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> nn.Sequential:
    """Pre-norm transformer blocks."""
    norm: Any = functools.partial(nn.LayerNorm, eps=EPS)
    return nn.Sequential(*(Block(width, heads, mlp_ratio, qkv_bias, norm_layer=norm) for _ in range(layers)))


def init_linear(module: nn.Module) -> None:
    """Weights of a linear layer as VideoMAE draws them (Xavier), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def positions(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """The sine and cosine table `[count, width]` of Vaswani et al. 2017, section 3.5, over the flat index of a token:
    sines in the even channels, cosines in the odd ones."""
    channel = torch.arange(width, device=device)
    rate = torch.pow(10000.0, -2 * (channel // 2).double() / width)
    angle = torch.arange(count, device=device)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def grid(shape: Sequence[int], tubelet: int, patch: int, channels: int) -> tuple[int, int, int]:
    """How many tubelets, rows and columns of patches a clip `[B, T, C, H, W]` has.

    Raises:
        ValueError: if they do not tile it, or its channels are others.
    """
    if len(shape) != 5:
        raise ValueError(f"a batch of clips is [B, T, C, H, W], but has the shape {list(shape)}")
    frames, found, height, width = shape[1:]
    if found != channels:
        raise ValueError(f"the clips have {found} channels, the encoder reads {channels}; set its `channels`")
    if frames % tubelet:
        raise ValueError(f"clips of {frames} frames cannot be divided into tubelets of {tubelet} frames; take a "
                         f"multiple of the encoder's `tubelet`, such as {-(-frames // tubelet) * tubelet}")  # fmt: skip
    if height % patch or width % patch:
        raise ValueError(f"frames of {height}x{width} pixels cannot be divided into patches of side {patch}; resize "
                         "the frames, or set the encoder's `patch` to a divisor of both")  # fmt: skip
    return frames // tubelet, height // patch, width // patch


def save(net: VideoViT, folder: Path) -> None:
    """Write an encoder: its arguments and its weights."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"architecture": "discovr-vit", "arguments": net.config}, indent=2) + "\n")
    save_model(net, str(folder / WEIGHTS))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The arguments of the encoder in a folder.

    Raises:
        ValueError: if there is none.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, json.JSONDecodeError):
        config = {}
    if config.get("architecture") != "discovr-vit":
        raise ValueError(f"{folder} holds no discovr-vit: there is no {CONFIG} of one")
    arguments: dict[str, Any] = config["arguments"]
    return arguments


def load(folder: str | Path) -> VideoViT:
    """The encoder in a folder that `save` wrote, in evaluation mode. Raises `ValueError` as `read_config`."""
    from safetensors.torch import load_model

    net = VideoViT(**read_config(folder))
    load_model(net, str(Path(folder) / WEIGHTS))
    return net.eval()
