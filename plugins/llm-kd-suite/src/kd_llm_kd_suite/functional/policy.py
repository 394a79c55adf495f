"""Policy gradients: MiniLLM's on the reverse KL, and REINFORCE on a reward model.

Shapes: B sampled responses of up to T tokens; `mask` ``[B, T]`` is 1 (or True) on the response's tokens, its end token
included. Positions outside of the mask count nothing, whatever stands there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_llm_kd_suite.functional.divergences import divergence, row_blocks
from kdcore.data import IGNORE


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(logits)[label]`` per position; no tensor of the logits' size is made or kept in the forward pass.

    Args:
        logits: ``[..., V]``; the softmax is in float32 at least.
        labels: ``[...]``, the token that each position should predict; -100 where nothing counts.

    Returns:
        ``[...]``, in nats, 0 where nothing counts.

    Raises:
        ValueError: if the labels do not fit the logits.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} need labels of shape {list(logits.shape[:-1])}, "
            f"but they have shape {list(labels.shape)}"
        )
    keep = labels != IGNORE
    rows = keep.flatten().nonzero().squeeze(1)
    found: Tensor = _TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), labels[keep], rows)  # type: ignore[no-untyped-call]
    return found.new_zeros(labels.shape).masked_scatter(keep, found)


def single_step_regulariser(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The exact ``KL(q || p)`` of each position's next token, ``[B, T]``, 0 outside of the mask.

    It is the part of MiniLLM's gradient that needs no sampled reward: equation 3 of Gu et al. 2024 (arXiv 2306.08543).

    Args:
        student_logits: ``[B, T, V]``.
        teacher_logits: ``[B, T, V]``.
        mask: ``[B, T]``.
        temperature: divides both logits.

    Raises:
        ValueError: as `divergence` does.
    """
    labels = torch.zeros_like(mask, dtype=torch.long).masked_fill(~mask.bool(), IGNORE)
    options = {"temperature": temperature, "reduction": "none"}
    return divergence("rkl", student_logits, teacher_logits, labels, **options)  # type: ignore[arg-type]


def rewards(student_logprobs: Tensor, teacher_logprobs: Tensor, *, scaling: float = 0.5, clip: float = 100.0) -> Tensor:
    """``r_t = (log p(y_t) - log q(y_t)) / scaling``, clipped to ``[-clip, clip]``, without a gradient.

    Args:
        student_logprobs: log-probabilities of the sampled tokens ``[B, T]``.
        teacher_logprobs: the same under the teacher.
        scaling: divides the rewards before they are clipped, > 0.
        clip: largest magnitude, > 0; `math.inf` for none.

    Raises:
        ValueError: if scaling or clip is not positive.
    """
    _check_positive("scaling", scaling)
    _check_positive("clip", clip)
    return ((teacher_logprobs - student_logprobs).detach() / scaling).clamp(-clip, clip)


def returns(rewards: Tensor, mask: Tensor, *, gamma: float = 0.95, length_norm: bool = True) -> Tensor:
    """``R_t = sum_{t' >= t} gamma^(t' - t) r_t'`` over the tokens of the mask; 0 outside of it. No gradient.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]``.
        gamma: discount in [0, 1].
        length_norm: divide by the discounted length that remains, ``sum_{t' >= t} gamma^(t' - t)``, so that long
            responses gain nothing by their length: a weighted mean of the rewards to come.

    Raises:
        ValueError: if gamma is outside of [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], because it discounts rewards to come, but it is {gamma}")
    counts = mask.to(rewards.dtype)
    # where, not a product: what stands outside of the mask may be infinite
    total = _discounted(torch.where(mask.bool(), rewards.detach(), 0.0), gamma)
    if length_norm:
        total = total / _discounted(counts, gamma).clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(mask.bool(), total, 0.0)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over all positions of the mask, ``[B, T]``; 0 outside of it.

    Raises:
        ValueError: if the mask does not fit the values.
    """
    inside, mean = torch.where(mask.bool(), values, 0.0), masked_mean(values, mask)
    variance = masked_mean((inside - mean).square(), mask)
    return torch.where(mask.bool(), (inside - mean) * (variance + eps).rsqrt(), 0.0)


def advantages(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    *,
    gamma: float = 0.95,
    length_norm: bool = True,
    scaling: float = 0.5,
    clip: float = 100.0,
    whitened: bool = True,
) -> Tensor:
    """MiniLLM's advantages ``[B, T]``: `rewards`, then `returns`, then `whiten`. No gradient, 0 outside of the mask.

    Source: Gu et al. 2024, section 2.2 (arXiv 2306.08543). Arguments and errors as in those three.
    """
    reward = rewards(student_logprobs, teacher_logprobs, scaling=scaling, clip=clip)
    found = returns(reward, mask, gamma=gamma, length_norm=length_norm)
    return whiten(found, mask) if whitened else found


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    importance: Tensor | None = None,
) -> Tensor:
    """``-mean min(w rho A, clip(w rho, 1 - c, 1 + c) A)`` over the mask, ``rho = exp(logprobs - old_logprobs)``.

    Source: Schulman et al. 2017, equation 7 (arXiv 1707.06347), with the importance weight inside of the clip as
    MiniLLM has it.

    Args:
        logprobs: of the sampled tokens under the student that is trained ``[B, T]``.
        old_logprobs: under the student that sampled them.
        advantages: ``[B, T]``.
        mask: ``[B, T]``.
        cliprange: c > 0.
        importance: w ``[B, T]``, ``q / ((1 - a) q + a p)`` of tokens drawn from that mixture with the teacher; without
            it 1.

    Raises:
        ValueError: if cliprange is not positive or shapes differ.
    """
    _check_positive("cliprange", cliprange)
    # Outside of the mask the ratio is 1: an overflow there would spoil the gradient of the rest.
    ratio = torch.where(mask.bool(), logprobs - old_logprobs.detach(), 0.0).exp()
    if importance is not None:
        ratio = ratio * importance.detach()
    fixed = advantages.detach()
    return -masked_mean(torch.minimum(ratio * fixed, ratio.clamp(1 - cliprange, 1 + cliprange) * fixed), mask)


def penalised_reward(
    logprobs: Tensor, ref_logprobs: Tensor, reward: Tensor, mask: Tensor, *, beta: float = 0.1
) -> Tensor:
    """``R_b = reward_b - beta sum_t (log pi(y_bt) - log pi_ref(y_bt))``, ``[B]``, without a gradient. Arguments and
    errors as in `reinforce`."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be at least 0, because it weighs a penalty, but it is {beta}")
    _check_shape("log-probabilities", logprobs, mask.shape)
    _check_shape("reference's log-probabilities", ref_logprobs, mask.shape)
    _check_shape("rewards", reward, mask.shape[:1])
    return reward.detach() - beta * torch.where(mask.bool(), (logprobs - ref_logprobs).detach(), 0.0).sum(1)


def reinforce(
    logprobs: Tensor, ref_logprobs: Tensor, reward: Tensor, mask: Tensor, *, beta: float = 0.1,
    baseline: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loss whose gradient ascends ``E[reward] - beta KL(pi || pi_ref)``: ``-mean_b A_b sum_t log pi(y_bt)``.

    ``A_b = R_b - baseline`` with the `penalised_reward` ``R``: a penalty per token, and the mean of the batch as
    baseline, so that a batch of one response teaches nothing.

    Args:
        logprobs: of the sampled tokens under the policy ``[B, T]``.
        ref_logprobs: of the same tokens under the reference, without a gradient.
        reward: of each response ``[B]``, without a gradient.
        mask: ``[B, T]``.
        beta: weight of the penalty, >= 0.
        baseline: a scalar: the mean of `penalised_reward` over more than these responses.

    Raises:
        ValueError: if beta is negative or shapes differ.
    """
    total = penalised_reward(logprobs, ref_logprobs, reward, mask, beta=beta)
    advantage = total - (total.mean() if baseline is None else baseline)
    return -(advantage * torch.where(mask.bool(), logprobs, 0.0).sum(1)).mean()


def reward_model_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigmoid(r(x, y_w) - r(x, y_l))``, averaged over pairs ``[B]``.

    Source: Ouyang et al. 2022, equation 1 (arXiv 2203.02155).

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shape("rejected rewards", rejected, chosen.shape)
    return F.softplus(rejected - chosen).mean()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the positions of the mask; 0, with a gradient of 0, where there are none.

    Raises:
        ValueError: if the mask does not fit the values.
    """
    _check_shape("values", values, mask.shape)
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum().clamp(min=1)


class _TokenLogprobs(torch.autograd.Function):
    """The log-probabilities ``[R]`` of one token in each of the given rows of the logits ``[N, V]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        values = logits.new_empty(len(rows), dtype=dtype)
        for block in row_blocks(len(rows), logits):
            part = logits.index_select(0, rows[block]).to(dtype)
            top = part.amax(-1)
            normaliser = part.softmax(-1).amax(-1).log_()
            values[block] = (part.gather(1, labels[block, None]).squeeze(1) - top).add_(normaliser)
        ctx.save_for_backward(logits, labels, rows)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, rows = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for block in row_blocks(len(rows), logits):
            scale = outer[block, None]
            part = logits.index_select(0, rows[block]).to(outer.dtype).softmax(-1).mul_(-scale)
            part.scatter_add_(1, labels[block, None], scale)
            gradient.index_copy_(0, rows[block], part.to(gradient.dtype))
        return gradient, None, None


def _discounted(values: Tensor, gamma: float) -> Tensor:
    """``sum_{t' >= t} gamma^(t' - t) v_t'``, from the end: a power of gamma would underflow."""
    sums, ahead = torch.empty_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        ahead = values[:, t] + gamma * ahead
        sums[:, t] = ahead
    return sums


def _check_shape(what: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise ValueError(f"the {what} have shape {list(values.shape)}, but they must have {list(shape)}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, but it is {value}")
