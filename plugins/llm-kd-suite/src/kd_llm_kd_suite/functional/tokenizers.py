"""Losses between models with different tokenizers, whose tokens and vocabularies do not match.

Two ways: compare the *shapes* of the distributions, sorted by probability (`uld`), or find the stretches of text over
which both tokenizations agree (`align`) and compare them there (`span_logprobs`, `span_uld`).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_llm_kd_suite.functional.policy import token_logprobs

Offsets = Sequence[tuple[int, int]]
"""Start and end of each token in the text, in characters, as fast tokenizers give with `return_offsets_mapping`."""


Span = tuple[int, int]
"""A run of tokens: the first one, and the one after the last."""
Group = tuple[Span, Span]
"""The student's and the teacher's tokens that spell the same stretch of text."""


def uld(student_logits: Tensor, teacher_logits: Tensor, *, top: int | None = None, temperature: float = 1.0) -> Tensor:
    """Universal Logit Distillation: ``sum_i |q_(i) - p_(i)|`` between probabilities in descending order.

    The shorter vocabulary counts as if it had further tokens of probability 0. Source: Boizard et al. 2024, equation
    5 (arXiv 2402.12030).

    Args:
        student_logits: ``[N, V_s]``; softmaxes are in float32 at least.
        teacher_logits: ``[N, V_t]``, without a gradient.
        top: compare only the largest `top` probabilities, which spares the sorting of whole vocabularies.
        temperature: divides both logits.

    Returns:
        ``[N]``, between 0 and 2.

    Raises:
        ValueError: if the numbers of positions differ, or top or the temperature is not positive.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same positions, but have {list(student_logits.shape[:-1])} and "
            f"{list(teacher_logits.shape[:-1])}"
        )
    ours = _log_probs(student_logits, temperature).exp()
    theirs = _log_probs(teacher_logits.detach(), temperature).exp()
    return _sorted_distance(ours, theirs, top)


def align(student: Offsets, teacher: Offsets) -> list[Group]:
    """The finest common segmentation of two tokenizations of the same text.

    A group ends where a token ends on both sides; tokens that share characters, such as the bytes of one letter, are
    never parted. Where offsets leave out the space between words, either side of it is the same place. Tokens after the
    last common end, as where one side was cut at its longest length, are in no group.

    Args:
        student: offsets of the response's tokens, in order. An end token has the offsets (n, n) of the text's end.
        teacher: the same of the teacher's tokens.

    Returns:
        Groups in the order of the text, together without gaps.
    """
    ours, theirs = _cuts(student), _cuts(teacher)
    groups: list[Group] = []
    i = j = start = their_start = 0
    while i < len(ours) and j < len(theirs):
        (end, first, last), (their_end, their_first, their_last) = ours[i], theirs[j]
        if last < their_first:
            i += 1
        elif their_last < first:
            j += 1
        else:
            groups.append(((start, end), (their_start, their_end)))
            start, their_start = end, their_end
            i, j = i + 1, j + 1
    return groups


def token_ends(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[int]:
    """Where each token ends in the text of all of them, in characters, from how the text grows token by token.

    A token that ends within a character of several bytes ends before it.

    Args:
        decode: tokens -> text.
        ids: the tokens.
    """
    text = decode(ids)
    return [_shared(text, decode(ids[: i + 1])) for i in range(len(ids))]


def _shared(one: str, two: str) -> int:
    """Characters with which both begin: a text cut within a character, or before a blank, ends in others."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def span_logprobs(logprobs: Tensor, spans: Sequence[Span]) -> Tensor:
    """The log-probability of each stretch of text: the sum over its tokens.

    Args:
        logprobs: of one side's tokens ``[T]``.
        spans: that side's tokens of each of G groups of `align`.

    Returns:
        ``[G]``.
    """
    places = [(group, token) for group, (start, end) in enumerate(spans) for token in range(start, end)]
    owners, tokens = torch.tensor(places, dtype=torch.long, device=logprobs.device).reshape(-1, 2).unbind(1)
    return logprobs.new_zeros(len(spans)).index_add(0, owners, logprobs[tokens])


def span_uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    groups: Sequence[Group],
    *,
    common: Tensor | Sequence[tuple[int, int]] = (),
    kl_weight: float = 1.0,
    uld_weight: float = 1.0,
    top: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Universal Logit Distillation over stretches of text, with a divergence on the tokens that both sides know.

    A group's distribution is that of its first token, times the probabilities of its further tokens given what stands
    before: as in the merging of GOLD (Patiño et al. 2025, "Unlocking On-Policy Distillation for Any Model Family"), it
    is not normalised. On the common tokens ``sum p log(p / q) - p + q`` is taken, which is at least 0 for such masses
    too, and the sorted distance on all others. Without common tokens it is the sorted distance alone.

    Args:
        student_logits: ``[T_s, V_s]`` of one response.
        teacher_logits: ``[T_t, V_t]`` of the same text, without a gradient.
        student_labels: the response's tokens ``[T_s]``, aligned with the logits.
        teacher_labels: the teacher's tokens ``[T_t]``.
        groups: from `align`.
        common: (student id, teacher id) of the tokens that are the same string; a tensor ``[C, 2]`` spares its making.
        kl_weight: weight of the common tokens, >= 0.
        uld_weight: weight of the sorted distance, >= 0.
        top: compare only the largest `top` of the other probabilities.
        temperature: divides both logits.

    Returns:
        ``[G]``, one value per group.

    Raises:
        ValueError: if labels do not fit the logits, or a weight, top or the temperature is out of range.
    """
    if min(kl_weight, uld_weight) < 0:
        raise ValueError(f"weights must be at least 0, but are {kl_weight} and {uld_weight}")
    ours = _merged(student_logits, student_labels, [ours for ours, _ in groups], temperature)
    theirs = _merged(teacher_logits.detach(), teacher_labels, [theirs for _, theirs in groups], temperature)
    if not len(common):
        return uld_weight * _sorted_distance(ours.exp(), theirs.exp(), top)
    ids = torch.as_tensor(common, device=ours.device).unbind(1)
    p, q = (side[:, known] for side, known in zip((theirs, ours), reversed(ids), strict=True))
    # A token that either side forbids has no ratio.
    terms = torch.where(p.isneginf() | q.isneginf(), 0.0, p.exp() * (p - q) - p.exp() + q.exp())
    rest = [side[:, _others(side.shape[1], known)].exp() for side, known in zip((ours, theirs), ids, strict=True)]
    return kl_weight * terms.sum(1) + uld_weight * _sorted_distance(rest[0], rest[1], top)


def _cuts(offsets: Offsets) -> list[tuple[int, int, int]]:
    """The places where a tokenization may be cut: (tokens before it, first and last character position of the cut)."""
    found, reached = [], 0
    for count, (_, end) in enumerate(offsets, 1):
        reached = max(reached, end)
        following = offsets[count][0] if count < len(offsets) else reached
        if following >= reached:
            found.append((count, reached, following))
    return found


def _merged(logits: Tensor, labels: Tensor, spans: Sequence[Span], temperature: float) -> Tensor:
    """Log-probabilities ``[G, V]`` of each group's first token, plus those of the tokens that follow it there."""
    first = torch.tensor([start for start, _ in spans], dtype=torch.long, device=logits.device)
    logprobs = token_logprobs(_scaled(logits, temperature), labels)
    further = span_logprobs(logprobs, [(start + 1, end) for start, end in spans])
    return _log_probs(logits[first], temperature) + further.unsqueeze(1)


def _sorted_distance(ours: Tensor, theirs: Tensor, top: int | None) -> Tensor:
    """L1 distance of masses ``[N, V_s]`` and ``[N, V_t]``, each in descending order and padded with zeros."""
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, because it is how many probabilities are compared, not {top}")
    ours, theirs = _descending(ours, top), _descending(theirs, top)
    width = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (F.pad(side, (0, width - side.shape[-1])) for side in (ours, theirs))
    return (ours - theirs).abs().sum(-1)


def _descending(masses: Tensor, top: int | None) -> Tensor:
    if top is None or top >= masses.shape[-1]:
        return masses.sort(dim=-1, descending=True).values
    return masses.topk(top, dim=-1).values


def _others(classes: int, known: Tensor) -> Tensor:
    """The classes that are not among the known ones."""
    return torch.ones(classes, dtype=torch.bool, device=known.device).index_fill(0, known, False)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return _scaled(logits, temperature).log_softmax(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, because it divides the logits, not {temperature}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
