"""Ranges, ranking, update factors and losses.

Source: Kwon et al., HierarchicalPrune, AAAI 2026 (arXiv 2508.04663), and its official code. A part is a pair
`(block, component)`; the component is `None` for a whole block. `contribution` of a part is dP(i, c), the metric of the
whole model minus that of the model without the part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

Part = tuple[int, str | None]


def parse_ranges(text: str) -> list[int]:
    """Half-open ranges and single numbers, separated by commas, as numbers: `25-29,31` is 25, 26, 27, 28, 31.

    An empty text is no number at all.

    Raises:
        ValueError: naming the entry that is neither, or a range without a number in it.
    """
    found: list[int] = []
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        start, dash, stop = (piece.strip() for piece in entry.partition("-"))
        if not start.isdigit() or (dash and not stop.isdigit()):
            raise ValueError(f"{entry!r} is neither a number nor a range such as 25-29")
        numbers = range(int(start), int(stop) if dash else int(start) + 1)
        if not numbers:
            raise ValueError(f"the range {entry!r} is empty: ranges are half-open, 25-29 is 25 to 28")
        found += numbers
    return list(dict.fromkeys(found))


def score(contribution: float, block: int, num_blocks: int, *, position_weight: bool = True) -> float:
    """`-|dP(i, c)| * exp(-i / n)`: the highest is pruned first, so of equal contributions that of the later block.

    (The paper is quoted with `exp((i - n) / n)`, which would spare the later block, against what it says.)
    """
    return -abs(contribution) * (math.exp(-block / num_blocks) if position_weight else 1.0)


def rank(contributions: Mapping[Part, float], num_blocks: int, *, position_weight: bool = True) -> list[Part]:
    """The parts in the order they are pruned in; of equal scores the later block comes first."""

    def key(part: Part) -> tuple[float, int]:
        return -score(contributions[part], part[0], num_blocks, position_weight=position_weight), -part[0]

    return sorted(contributions, key=key)


def choose(ranked: Sequence[Part], parameters: Mapping[Part, int], total: int, target_ratio: float) -> list[Part]:
    """The first parts of a ranking whose removal leaves at most `target_ratio` of `total` parameters.

    Raises:
        ValueError: if removing all of them leaves more.
    """
    chosen, left = [], total
    for part in ranked:
        if left <= target_ratio * total:
            break
        chosen.append(part)
        left -= parameters[part]
    if left > target_ratio * total:
        raise ValueError(f"removing all {len(ranked)} parts that may be pruned leaves {left / total:.3f} of the "
                         f"parameters, more than {target_ratio}")  # fmt: skip
    return chosen


def update_factors(contributions: Mapping[Part, float], eps: float = 1e-12) -> dict[Part, float]:
    """`g(i, c) = clip(min_j |dP_j| / max(|dP(i, c)|, eps), 0, 1)` over the parts that are trained: 1 for the least
    important, towards 0 for the most important one."""
    if not contributions:
        return {}
    least = min(abs(value) for value in contributions.values())
    return {part: min(max(least, eps) / max(abs(value), eps), 1.0) for part, value in contributions.items()}


def task_loss(prediction: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean ((x_t - sigma v) - x0)^2` with `x_t = sigma noise + (1 - sigma) x0`: how far the clean latents that a
    velocity predicts are from the true ones.

    Args:
        prediction: velocity `[B, ...]`.
        clean, noise: x0 and the noise, shaped alike.
        sigma: `[B]` or anything that has B elements.
        weight: of each sample, `[B]`; default 1.
    """
    sigma = sigma.reshape(-1, *[1] * (clean.ndim - 1))
    noised = sigma * noise + (1 - sigma) * clean
    return weighted_distance(noised - sigma * prediction, clean, weight)


def output_loss(prediction: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean (v_S - v_T)^2` of predictions `[B, ...]`, the teacher's without gradient."""
    return weighted_distance(prediction, teacher.detach(), weight)


def feature_loss(
    student: Mapping[tuple[int, str], Tensor],
    teacher: Mapping[tuple[int, str], Tensor],
    blocks: Collection[int],
    streams: Collection[str] = ("img", "txt"),
    weight: Tensor | None = None,
) -> Tensor:
    """Sum over blocks and streams of `mean (f_S - f_T)^2`, the teacher's without gradient.

    Args:
        student, teacher: features `[B, N, D]` by (block, stream). A block need not give every stream.
        blocks: those that are compared.
        streams: those that are compared.
        weight: of each sample, `[B]`; default 1.

    Raises:
        ValueError: if no block gives any of the streams.
    """
    keys = [(block, stream) for block in blocks for stream in streams if (block, stream) in student]
    if not keys:
        raise ValueError(f"no block among {sorted(blocks)} gives any of the streams {', '.join(streams)}")
    return torch.stack([weighted_distance(student[key], teacher[key].detach(), weight) for key in keys]).sum()


def weighted_distance(one: Tensor, two: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over samples of `weight * mean (one - two)^2`, in float32 at least.

    Raises:
        ValueError: if the shapes differ.
    """
    if one.shape != two.shape:
        raise ValueError(f"student {list(one.shape)} and teacher {list(two.shape)} differ in shape")
    if one.dtype in (torch.float16, torch.bfloat16):
        one = one.float()
    values = (one - two).square().flatten(1).mean(1)
    return (values if weight is None else values * weight.flatten()).mean()
