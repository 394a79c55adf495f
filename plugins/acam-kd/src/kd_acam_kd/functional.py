"""The attention, the masked errors and the diversity of masks, as functions.

Source: Lan and Tian 2025, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation", ICCV
(arXiv 2503.06307). Each mean over the samples; with d = F_T - F_S `[C, HW]` and M masks of each kind:

    L_c   = mean over m of  sum over k, p of (Mc[m, k] d[k, p])^2 / (HW sum over k of Mc[m, k])
    L_s   = mean over m of  sum over k, p of (Ms[m, p] d[k, p])^2 / (C  sum over p of Ms[m, p])
    L_div = mean over i != j of  2 <M_i, M_j> / (<M_i, M_i> + <M_j, M_j>),  for both kinds, added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
DICE_EPSILON = 1e-12
ALIGNMENT = 8
"""The kernels of attention that never hold the scores ask for values as wide as the queries, by this many channels."""


def cross_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """For each position of the queries, the mean of the values weighted by softmax over the keys' positions.

    The scores are divided by the square root of the queries' channels. The positions by positions are never in memory
    at once: channels of zeros make queries, keys and values equally wide, which changes no score.

    Args:
        queries: `[B, N, Q]`.
        keys: `[B, K, Q]`.
        values: `[B, K, C]`.

    Returns:
        `[B, N, C]`.
    """
    width, channels = queries.shape[-1], values.shape[-1]
    wide = -(-max(width, channels) // ALIGNMENT) * ALIGNMENT
    q, k, v = (F.pad(x, (0, wide - x.shape[-1]))[:, None] for x in (queries, keys, values))
    mixed: Tensor = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width))
    return mixed[:, 0, :, :channels]


def masked_mse(difference: Tensor, masks: Tensor, over: str, weight: str = "squared") -> Tensor:
    """The squared error under masks, divided by their mass: L_c and L_s of the module.

    Masks of ones give the mean squared error, and so do masks of any constant under `linear`; under `squared` a
    constant scales it.

    Args:
        difference: `[B, C, HW]`.
        masks: in [0, 1], `[B, M, C]` over channels, or `[B, M, HW]` over positions.
        over: `channel` or `spatial`.
        weight: `squared` weighs an error by the square of the mask, `linear` by the mask.

    Returns:
        The mean over samples and masks, a scalar.

    Raises:
        ValueError: for another `over` or `weight`, or masks that do not fit the difference.
    """
    if over not in ("channel", "spatial") or weight not in ("squared", "linear"):
        raise ValueError(f"`over` is channel or spatial and `weight` squared or linear, not {over!r} and {weight!r}")
    along, across = (1, 2) if over == "channel" else (2, 1)
    if masks.ndim != 3 or masks.shape[::2] != (difference.shape[0], difference.shape[along]):
        raise ValueError(f"{over} masks of a difference {list(difference.shape)} must be [{difference.shape[0]}, M, "
                         f"{difference.shape[along]}], not {list(masks.shape)}")  # fmt: skip
    error = difference.square().sum(across)
    factors = masks.square() if weight == "squared" else masks
    weighted = (factors @ error[:, :, None])[..., 0]
    return (weighted / (difference.shape[across] * masks.sum(2) + EPSILON)).mean()


def mask_dice_diversity(masks: Tensor, form: str = "pairwise") -> Tensor:
    """How alike masks are: the Dice coefficient between them.

    Args:
        masks: `[B, M, N]`, not negative.
        form: `pairwise`, the mean over all pairs, in [0, 1]; or `global`, one ratio of sums over all pairs, as the
            paper prints it, which is M - 1 for equal masks.

    Returns:
        The mean over the samples, a scalar.

    Raises:
        ValueError: for another `form`, or fewer than two masks.
    """
    count = masks.shape[1]
    if count < 2:
        raise ValueError("the diversity of masks needs two of them or more")
    products = masks @ masks.mT
    norms = products.diagonal(dim1=1, dim2=2)
    others = 1 - torch.eye(count, device=masks.device, dtype=masks.dtype)
    if form == "pairwise":
        dice = 2 * products / (norms[:, :, None] + norms[:, None, :] + DICE_EPSILON)
        return (dice * others).sum((1, 2)).mean() / (count * (count - 1))
    if form == "global":
        return ((products * others).sum((1, 2)) / (norms.sum(1) + DICE_EPSILON)).mean()
    raise ValueError(f"`form` is pairwise or global, not {form!r}")


def pooled_size(height: int, width: int, most: int | None) -> tuple[int, int]:
    """Height and width of the largest map of about the same shape with at most so many positions."""
    if most is None or height * width <= most:
        return height, width
    scale = math.sqrt(most / (height * width))
    short = max(1, int(min(height, width) * scale))
    long = min(max(height, width), most // short)
    return (short, long) if height <= width else (long, short)
