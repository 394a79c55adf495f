"""How a teacher cache holds what a teacher said: fewer bits, fewer classes, or the layer before the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}

Arrays = dict[str, Tensor]
"""What is stored of one signal: `[B, ...]` each."""

FLOOR = -1e4
"""A log-probability of nothing: its exponential is 0, and 0 times it is 0, not NaN."""

_ROWS = 2**24
"""Logits that are worked on at once, about."""


def pack(tensor: Tensor, dtype: str) -> Arrays:
    """A tensor `[..., D]` in another type. `int8` keeps a float32 scale `[..., 1]` for each D numbers: their largest
    magnitude is 127."""
    if dtype != "int8":
        return {"values": tensor.to(DTYPES[dtype])}
    tensor = tensor.float()
    scale = tensor.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"values": (tensor / scale).round().to(torch.int8), "scale": scale}


def unpack(arrays: Arrays) -> Tensor:
    """What `pack` was given, in float32."""
    values = arrays["values"].float()
    return values * arrays["scale"] if "scale" in arrays else values


def index_type(classes: int) -> torch.dtype:
    """Of the numbers of so many classes: 2 bytes where they are enough, else 4."""
    return torch.int16 if classes <= 2**15 else torch.int32


def top_k(logits: Tensor, k: int, dtype: str) -> Arrays:
    """The k largest of logits `[..., V]`: which, their log-probabilities, and that of all others together, `rest`."""
    found = [_top_k(rows, k) for rows in torch.split(logits.flatten(0, -2), _chunk(logits))]
    ids, values, rest = (torch.cat(parts).view(*logits.shape[:-1], -1) for parts in zip(*found, strict=True))
    return {"ids": ids.to(index_type(logits.shape[-1])), "rest": rest.to(torch.float16), **pack(values, dtype)}


def _top_k(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.float()
    values, ids = rows.topk(k)
    total = rows.logsumexp(-1, keepdim=True)
    rest = rows.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total
    return ids, values - total, rest.clamp(min=FLOOR)


class TopK(nn.Module):
    """Log-probabilities `[..., V]` of what `top_k` kept, laid out as one tensor `[..., 2k + 1]` by `codes`; the rest's
    mass is spread evenly over the classes that were not kept."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out_features = classes

    @staticmethod
    def codes(arrays: Arrays) -> Tensor:
        """Float32: which classes, their log-probabilities, the rest's. (Exact for up to 2^24 classes.)"""
        return torch.cat([arrays["ids"].float(), unpack(arrays), arrays["rest"].float()], -1)

    def forward(self, codes: Tensor) -> Tensor:
        """The log-probabilities: logits that the teacher's differ from by a constant for each position."""
        k = codes.shape[-1] // 2
        spread = (codes[..., -1:] - math.log(self.out_features - k)).expand(*codes.shape[:-1], self.out_features)
        return spread.scatter(-1, codes[..., :k].long(), codes[..., k:-1])


def sample(logits: Tensor, draws: int, offsets: Tensor) -> Arrays:
    """Classes drawn from the softmax of logits `[..., V]`: an unbiased estimate of it that needs no probabilities.

    The draws are systematic: evenly spaced over the cumulated probabilities from an offset in [0, 1) on, `[...]`. Each
    class is drawn `draws * p` times in expectation, as in independent draws, and never more than one time off it.
    (Anshumann et al. 2025, "Sparse Logit Sampling", draws independently.)
    """
    step = _chunk(logits)
    rows, starts = logits.flatten(0, -2), offsets.flatten().double()
    found = [_sample(part, draws, start)
             for part, start in zip(torch.split(rows, step), torch.split(starts, step), strict=True)]  # fmt: skip
    return {"ids": torch.cat(found).view(*logits.shape[:-1], draws).to(index_type(logits.shape[-1]))}


def _sample(rows: Tensor, draws: int, starts: Tensor) -> Tensor:
    mass = rows.double().softmax(-1).cumsum(-1)
    points = (torch.arange(draws, device=rows.device) + starts[:, None]) / draws * mass[:, -1:]
    return torch.searchsorted(mass, points, right=True).clamp(max=rows.shape[-1] - 1)


class Sampled(nn.Module):
    """Log-probabilities `[..., V]` of the estimate that the draws `[..., n]` are; `FLOOR` for what was not drawn."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out_features = classes

    @staticmethod
    def codes(arrays: Arrays) -> Tensor:
        """Float32: which classes."""
        return arrays["ids"].float()

    def forward(self, codes: Tensor) -> Tensor:
        """The log-probabilities."""
        share = torch.full_like(codes, 1 / codes.shape[-1])
        mass = codes.new_zeros(*codes.shape[:-1], self.out_features).scatter_add(-1, codes.long(), share)
        return mass.log().clamp(min=FLOOR)


def _chunk(logits: Tensor) -> int:
    return max(1, _ROWS // logits.shape[-1])


def logit_error(logits: Tensor, decoded: Tensor) -> dict[str, float]:
    """How far decoded logits are from the teacher's, both `[..., V]`.

    `cross_entropy` is the relative error of the cross-entropy that a student with the teacher's logits at half their
    size would have; `top1` the share of positions with the same most likely class.
    """
    found, logits = (z.flatten(0, -2).float() for z in (decoded, logits))
    student = F.log_softmax(logits / 2, -1)
    true, ours = (-(z.softmax(-1) * student).sum(-1).mean() for z in (logits, found))
    same = (logits.argmax(-1) == found.argmax(-1)).float().mean()
    return {"cross_entropy": ((ours - true).abs() / true.clamp(min=1e-12)).item(), "top1": same.item()}


def tensor_error(tensor: Tensor, decoded: Tensor) -> dict[str, float]:
    """The relative error of a decoded tensor, in the Euclidean norm."""
    norm: Any = torch.linalg.vector_norm
    return {"relative": (norm(decoded - tensor.float()) / norm(tensor.float()).clamp(min=1e-12)).item()}
