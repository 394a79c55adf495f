"""The networks that the method adds: masks over features, and the gate that routes.

The masks' parameters are named as in the official code, whose weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class MaskNet1d(nn.Module):
    """A mask for a feature vector: self-attention among its C positions.

    Args:
        channels: C.
        hidden: width of a position; a multiple of `heads`.
        heads: attention heads.
    """

    def __init__(self, channels: int, hidden: int, heads: int = 3) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.embed = nn.Linear(channels, hidden * channels)
        self.mha = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.fc = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, C]` (or `[B, C, 1, 1]`) to a mask `[B, C]` in (0, 1)."""
        positions = self.embed(x.flatten(1)).unflatten(1, (self.channels, self.hidden))
        attended, _ = self.mha(positions, positions, positions, need_weights=False)
        mask: Tensor = self.fc(attended).squeeze(-1).sigmoid()
        return mask


class MaskNet2d(MaskNet1d):
    """A mask for the channels of a map, which is brought to a vector first. Arguments as `MaskNet1d`."""

    def __init__(self, channels: int, hidden: int, heads: int = 3) -> None:
        super().__init__(channels, hidden, heads)
        self.spatial_reduce = SpatialReduction(channels)

    def forward(self, x: Tensor) -> Tensor:
        """A map `[B, C, H, W]` to a mask `[B, C]` in (0, 1)."""
        return super().forward(self.spatial_reduce(x))


class SpatialReduction(nn.Module):
    """Depthwise-separable convolution of stride 2, then the mean over what is left: `[B, C, H, W]` to `[B, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The channels' means."""
        reduced: Tensor = self.downsample(x).mean((2, 3))
        return reduced


def mask_net(shape: Sequence[int], *, heads: int = 3, hidden_dim_factor: int = 2) -> MaskNet1d:
    """The mask for features of this shape, `[B, C]` or `[B, C, H, W]`.

    The width of a position is ``C // (hidden_dim_factor * heads) * heads``, about C / 2. The embedding then has about
    C^3 / hidden_dim_factor weights: raise the factor for wide layers.

    Raises:
        ValueError: if the features are neither a vector nor a map, or have too few channels for the heads.
    """
    if len(shape) not in (2, 4):
        raise ValueError(f"gives features of shape {list(shape)}; masks are for [B, C] and [B, C, H, W]")
    channels = shape[1]
    hidden = channels // (hidden_dim_factor * heads) * heads
    if hidden == 0:
        raise ValueError(f"has {channels} channels, which are too few for {heads} heads and a hidden_dim_factor of "
                         f"{hidden_dim_factor}: their product must not exceed the channels")  # fmt: skip
    if len(shape) == 2 or tuple(shape[2:]) == (1, 1):
        return MaskNet1d(channels, hidden, heads)
    return MaskNet2d(channels, hidden, heads)


class GateNet(nn.Module):
    """A sample's class logits `[B, C]` to logits `[B, E]` over the teachers: two linear layers with nothing between."""

    def __init__(self, classes: int, teachers: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(classes, 2 * classes)
        self.fc2 = nn.Linear(2 * classes, teachers)

    def forward(self, logits: Tensor) -> Tensor:
        """The gate's logits."""
        gate: Tensor = self.fc2(self.fc1(logits))
        return gate


class DenseGateNet(nn.Module):
    """An image's logits `[B, C, H, W]` to logits `[B, E]`: one decision per image."""

    def __init__(self, classes: int, teachers: int) -> None:
        super().__init__()
        wide = 2 * classes
        self.conv_point = nn.Conv2d(classes, wide, 1)
        self.conv_depthwise = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide)
        self.fc = nn.Linear(wide, teachers)

    def forward(self, logits: Tensor) -> Tensor:
        """The gate's logits."""
        maps = F.relu(self.conv_depthwise(F.relu(self.conv_point(logits))))
        gate: Tensor = self.fc(maps.mean((2, 3)))
        return gate


def gate_net(student_logits: Tensor, teachers: int) -> nn.Module:
    """The gate for a student with such logits, on their device."""
    kind = GateNet if student_logits.ndim == 2 else DenseGateNet
    return kind(student_logits.shape[1], teachers).to(student_logits.device)
