"""Trained modules between student and teacher; none of them is needed once the student is trained.

Source: Liu et al. 2024, "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", IEEE T-ITS
(arXiv 2202.13393), section III: cross selective fusion (CSF), patch embedding alignment (PEA), global-local context
mixer (GL-Mixer) and embedding assistant (EA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_transkd.functional import Grid, resize_tokens

STAGES = 4


class SelectiveFusion(nn.Module):
    """One stage of `CrossSelectiveFusion`.

    Args:
        channels_in: of the student's map.
        channels_mid: of the maps that stages hand on.
        channels_out: of the teacher's map.
        fuse: whether a map arrives from the deeper stage; not at the deepest.
        reduced: channels of the gate.
    """

    def __init__(
        self, channels_in: int, channels_mid: int, channels_out: int, *, fuse: bool = True, reduced: int = 32
    ) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels_in, channels_mid, 1)
        self.conv2 = _conv_norm(channels_mid, channels_out, 3)
        self.fuse = fuse
        if fuse:
            squeeze = [nn.Conv2d(channels_mid, reduced, 1, bias=False) for _ in range(2)]
            self.squeeze = nn.Sequential(squeeze[0], nn.BatchNorm2d(reduced), nn.ReLU())
            self.squeeze_one = nn.Sequential(squeeze[1], nn.ReLU())
            self.excite = nn.ModuleList(nn.Conv2d(reduced, channels_mid, 1) for _ in range(2))

    def forward(self, features: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map for the teacher's stage ``[B, C_out, H, W]``, and the fused one for the stage above
        ``[B, C_mid, H, W]``."""
        fused = self.conv1(features)
        if self.fuse:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            own, theirs = self.shares(fused, deeper)
            fused = own * fused + theirs * deeper
        return self.conv2(fused), fused

    def shares(self, own: Tensor, deeper: Tensor) -> tuple[Tensor, Tensor]:
        """The share of either map in each channel of each sample, ``[B, C_mid, 1, 1]`` twice; they sum to 1.

        A batch of one sample has no statistics over samples, so it takes a path of its own without batch norm.
        """
        pooled = F.adaptive_avg_pool2d(own + deeper, 1)
        used, idle = (self.squeeze, self.squeeze_one) if len(pooled) > 1 else (self.squeeze_one, self.squeeze)
        unused = torch.stack([p.sum() for p in idle.parameters()]).sum()
        gate = used(pooled) + 0.0 * unused  # processes that train together expect a gradient of every parameter
        one, two = torch.stack([layer(gate) for layer in self.excite]).softmax(0)
        return one, two


class CrossSelectiveFusion(nn.Module):
    """CSF: the student's maps fused from the deepest stage up, each brought to its teacher's width.

    Args:
        channels_in: of the student's maps, shallow to deep.
        channels_out: of the teacher's maps.
        channels_mid: of the maps that stages hand on.
        reduced: channels of the gates.
    """

    def __init__(
        self, channels_in: Sequence[int], channels_out: Sequence[int], *, channels_mid: int = 64, reduced: int = 32
    ) -> None:
        super().__init__()
        last = len(channels_in) - 1
        self.blocks = nn.ModuleList(
            SelectiveFusion(ins, channels_mid, outs, fuse=i < last, reduced=reduced)
            for i, (ins, outs) in enumerate(zip(channels_in, channels_out, strict=True))
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C_in_i, H_i, W_i]`` to ``[B, C_out_i, H_i, W_i]``, shallow to deep.

        Raises:
            ValueError: if a batch norm would see one value per channel in training.
        """
        for i, map_ in enumerate(features, start=1):
            if self.training and map_.shape[0] * map_.shape[2] * map_.shape[3] == 1:
                raise ValueError(f"batch norm needs more than one value, but stage {i} gives a map of 1 x 1 for one "
                                 "image: take more images per step, or larger ones")  # fmt: skip
        fused: Tensor | None = None
        results: list[Tensor] = []
        for block, map_ in zip(reversed(self.blocks), reversed(features), strict=True):
            result, fused = block(map_, fused)
            results.insert(0, result)
        return results


class GLMixer(nn.Module):
    """GL-Mixer: self-attention over all tokens beside a gated convolution over three neighbours, with learned shares.

    Args:
        dim: width of the tokens.
        heads: of the attention; they divide the width.
        residual: add the tokens to the result.

    Raises:
        ValueError: if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int = 8, residual: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"gl_heads={heads} does not divide the width {dim} of the student's last stage")
        self.heads, self.residual = heads, residual
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.local = nn.Conv1d(dim, dim, 3, padding=1)
        self.gate = nn.Conv1d(dim, dim, 3, padding=1)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))  # of attention and of convolution

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, dim]`` to the same shape."""
        mixed = self.mix[0] * self.attend(tokens) + self.mix[1] * self.convolve(tokens)
        return mixed + tokens if self.residual else mixed

    def attend(self, tokens: Tensor) -> Tensor:
        """Multi-head self-attention."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return attended

    def convolve(self, tokens: Tensor) -> Tensor:
        """Convolution along the tokens, gated by the sigmoid of another."""
        rows = tokens.transpose(1, 2)
        gated: Tensor = self.local(rows) * self.gate(rows).sigmoid()
        return gated.transpose(1, 2)


class EmbeddingAssistant(nn.Module):
    """EA: an overlapping patch embedding of the teacher's width, on what goes into a stage of the student.

    Args:
        channels_in: of the image, or of the student's map one stage before.
        channels_out: the teacher's width.
        first: whether it is the stage that reads the image: 7 x 7 at stride 4, in place of 3 x 3 at stride 2.
    """

    def __init__(self, channels_in: int, channels_out: int, *, first: bool) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.proj = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels_out)
        nn.init.normal_(self.proj.weight, std=math.sqrt(2 / (kernel**2 * channels_out)))
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, source: Tensor, size: Grid) -> Tensor:
        """``[B, C_in, H, W]`` to tokens ``[B, h*w, C_out]`` of the grid ``size``."""
        features: Tensor = self.proj(source)
        height, width = features.shape[-2:]
        return resize_tokens(self.norm(features.flatten(2).transpose(1, 2)), (height, width), size)


class EmbeddingAlignment(nn.Module):
    """PEA of one stage: a linear map of the student's patch embedding to the teacher's width.

    Args:
        channels_in, channels_out: widths of student and teacher.
        stage: counted from 1; the shares of PEA and EA begin with 0.1 and 0.1 more with each stage: 0.1 to 0.4 and
            0.5 to 0.8.
        mixer: goes before the linear map (gl).
        assistant: is added to it, each with a learned share (ea).
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, stage: int = 1, mixer: GLMixer | None = None,
        assistant: EmbeddingAssistant | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.project = nn.Linear(channels_in, channels_out)
        self.mixer, self.assistant = mixer, assistant
        if assistant is not None:
            self.shares = nn.Parameter(0.1 * torch.tensor([float(stage), float(STAGES + stage)]))

    def forward(self, tokens: Tensor, size: Grid, source: Tensor) -> Tensor:
        """``[B, h*w, C_in]`` of the grid ``size`` to ``[B, h*w, C_out]``; ``source`` is what the stage reads, the
        image or the map ``[B, C, H, W]`` of the stage before."""
        aligned: Tensor = self.project(tokens if self.mixer is None else self.mixer(tokens))
        if self.assistant is None:
            return aligned
        assisted: Tensor = self.assistant(source, size)
        return self.shares[0] * aligned + self.shares[1] * assisted


def _conv_norm(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))
