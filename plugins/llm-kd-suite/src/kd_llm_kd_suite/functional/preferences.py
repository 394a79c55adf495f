"""Learning from a teacher's rankings of answers. B prompts with K answers each, the best one first.

DPO compares *sums* of token log-probabilities: their mean would change what its beta means. RRHF and PRO compare
*means*, so that long answers are not worse by their length.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from kd_llm_kd_suite.functional.policy import token_logprobs
from kdcore.data import IGNORE


def sequence_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each sequence, and of how many tokens it is the sum.

    Args:
        logits: ``[..., T, V]``.
        labels: ``[..., T]``, -100 where nothing counts.

    Returns:
        Sums ``[...]``, in nats, and counts ``[...]``; the mean is ``sums / counts``.

    Raises:
        ValueError: if the labels do not fit the logits.
    """
    return token_logprobs(logits, labels).sum(-1), (labels != IGNORE).sum(-1)


def dpo(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """``-log sigmoid(beta [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))])``, averaged over pairs.

    Source: Rafailov et al. 2023, equation 7 (arXiv 2305.18290).

    Args:
        policy_chosen: summed log-probabilities of the better answers ``[B]`` under the policy that is trained.
        policy_rejected: of the worse ones.
        ref_chosen: of the better ones under the reference, which receives no gradient.
        ref_rejected: of the worse ones under the reference.
        beta: how much the policy is held to the reference, > 0.

    Raises:
        ValueError: if beta is not positive or shapes differ.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, because it scales the margin, but it is {beta}")
    shapes = {tuple(t.shape) for t in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)}
    if len(shapes) > 1:
        raise ValueError(f"the four log-probabilities must have one shape [B], but have {sorted(shapes)}")
    margin = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected).detach()
    return -F.logsigmoid(beta * margin).mean()


def rrhf(scores: Tensor) -> Tensor:
    """``sum_{i better than j} max(0, s_j - s_i)``, averaged over prompts: the ranking term, without `best_nll`.

    Source: Yuan et al. 2023, equation 3 (arXiv 2304.05302).

    Args:
        scores: mean log-probabilities of the answers ``[B, K]``, best first.

    Raises:
        ValueError: if there are fewer than two answers.
    """
    _check_ranked(scores)
    worse_by = scores.unsqueeze(1) - scores.unsqueeze(2)
    return worse_by.triu(1).clamp(min=0).sum((1, 2)).mean()


def pro(scores: Tensor) -> Tensor:
    """``-sum_k log(exp s_k / sum_{i >= k} exp s_i)``, averaged over prompts: each answer against all worse ones.

    The ranking term, without `best_nll`. Source: Song et al. 2024, equation 5 (arXiv 2306.17492).

    Args:
        scores: mean log-probabilities of the answers ``[B, K]``, best first.

    Raises:
        ValueError: if there are fewer than two answers.
    """
    _check_ranked(scores)
    # The worst answer competes with itself alone: its term is 0.
    from_here_on = scores.flip(1).logcumsumexp(1).flip(1)
    return (from_here_on - scores)[:, :-1].sum(1).mean()


def best_nll(sums: Tensor, counts: Tensor) -> Tensor:
    """Supervised fine-tuning on the best answer, which RRHF and PRO add: nats per token of the first of K answers.

    Args:
        sums: log-probabilities ``[B, K]`` from `sequence_logprobs`, best first.
        counts: their numbers of tokens ``[B, K]``.
    """
    return -sums[:, 0].sum() / counts[:, 0].sum().clamp(min=1)


def _check_ranked(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"a ranking needs scores [B, K] of at least two answers, but they have shape {list(scores.shape)}"
        )
