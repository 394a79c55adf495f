"""What a level has of its own: the attention between teacher and student, and the units that select masks from it.

Source: Lan and Tian 2025 (arXiv 2503.06307): STCA-FF, student-teacher cross-attention feature fusion, and ASCM,
adaptive spatial-channel masking. They are trained with the student and left out of what is saved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_acam_kd.functional import cross_attention, pooled_size
from kd_acam_kd.options import ACAMLossOptions

UNIT_STD = 0.01


class STCAFF(nn.Module):
    """Cross-attention of one head: a net asks with its positions, and those of the other answer.

    Without residual and norm. Queries and keys are narrower than the maps by `qk_ratio`.
    """

    def __init__(self, channels: int, qk_ratio: float = 0.5) -> None:
        super().__init__()
        narrow = max(1, int(channels * qk_ratio))
        self.query = nn.Conv2d(channels, narrow, 1)
        self.key = nn.Conv2d(channels, narrow, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, asking: Tensor, answering: Tensor) -> Tensor:
        """Two maps `[B, C, H, W]` to the fused map `[B, C, H, W]`, whose positions are those of `asking`."""
        projected = (self.query(asking), self.key(answering), self.value(answering))
        queries, keys, values = (x.flatten(2).mT for x in projected)
        return cross_attention(queries, keys, values).mT.reshape(asking.shape)


class ASCM(nn.Module):
    """Selection units, each of which makes a mask over the channels and one over the positions of a map.

    A channel unit is a single gain on the map's channel means, or (`full`) one gain for each channel.
    """

    def __init__(self, channels: int, num_masks: int, masks: list[str], channel_units: str = "scalar") -> None:
        super().__init__()
        shapes = {"channel": (num_masks, channels if channel_units == "full" else 1), "spatial": (num_masks, channels)}
        self.units = nn.ParameterDict({kind: UNIT_STD * torch.randn(shapes[kind]) for kind in masks})

    def forward(self, fused: Tensor) -> dict[str, Tensor]:
        """A map `[B, C, H, W]` to `channel` `[B, M, C]` and `spatial` `[B, M, H, W]`, where there are such units."""
        masks = {}
        if "channel" in self.units:
            masks["channel"] = (self.units["channel"] * fused.mean((2, 3))[:, None]).sigmoid()
        if "spatial" in self.units:
            masks["spatial"] = torch.einsum("mc,bchw->bmhw", self.units["spatial"], fused).sigmoid()
        return masks


class Level(nn.Module):
    """The modules of one level. A 1x1 convolution brings the student to the teacher's channels where the two differ."""

    def __init__(self, student_channels: int, teacher_channels: int, num_masks: int, options: ACAMLossOptions) -> None:
        super().__init__()
        self.options = options
        same = student_channels == teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        self.fusion = STCAFF(teacher_channels, options.qk_ratio)
        self.selection = ASCM(teacher_channels, num_masks, list(options.masks), options.channel_units)

    def aligned(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's map with the channels and the size of the teacher's."""
        found: Tensor = self.align(student)
        if found.shape[-2:] != teacher.shape[-2:]:
            found = F.interpolate(found, teacher.shape[-2:], mode="bilinear", align_corners=False)
        return found

    def masks(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The masks of two maps `[B, C, H, W]`: `channel` `[B, M, C]`, `spatial` `[B, M, HW]`.

        Of maps with more than `max_tokens` positions the attention sees average-pooled ones (to project and to pool
        commute), and the spatial masks are interpolated back.
        """
        height, width = teacher.shape[-2:]
        size = pooled_size(height, width, self.options.max_tokens)
        maps = [m if size == (height, width) else F.adaptive_avg_pool2d(m, size) for m in (student, teacher)]
        asking, answering = reversed(maps) if self.options.query_from == "teacher" else maps
        masks: dict[str, Tensor] = self.selection(self.fusion(asking, answering))
        if "spatial" in masks:
            if size != (height, width):
                masks["spatial"] = F.interpolate(
                    masks["spatial"], (height, width), mode="bilinear", align_corners=False
                )
            masks["spatial"] = masks["spatial"].flatten(2)
        return masks
