"""Sequence correction and re-generation: the teacher replaces the worst token of a text, the student writes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_llm_kd_suite.chunked import CHUNK, Scores
from kd_llm_kd_suite.functional import forward_kl
from kd_mgsr_llm.functional import answer_mask, common, find_errors
from kdcore import Outputs
from kdcore.data import derive_seed, to_device
from kdcore.generation import Sampler, join_rows
from kdcore.models import Model
from kdcore.options import Sampling

Rows = list[list[int]]


@torch.no_grad()
def correct_and_regenerate(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], seeds: Sequence[int], *,
    teacher: Model, student: Model, sampling: Sampling, rounds: int = 1, sampler: Sampler | None = None,
) -> Rows:  # fmt: skip
    """Answers of the student, corrected where they go wrong most and written on from there by the student.

    A round takes one forward of both models on all rows. In each row the teacher's likeliest token takes the place of
    the answer's at the position of the largest ``KL(p || q)`` among those where the two differ, and the student writes
    what follows; nothing follows a token that ends the answer. A row without such a position stays as it is.

    Args:
        prompts: tokens of each row.
        answers: what the student wrote after them, with the token that ended it.
        seeds: one for each row; each round draws with others that are derived from them.
        teacher: says what is wrong.
        student: is asked where it is farthest from the teacher, in evaluation mode.
        sampling: how it writes; with `max_tokens` at most in the whole answer.
        rounds: corrections of each row, at most.
        sampler: who writes in the student's place, a server with its weights, say.
    """
    revised = [list(answer) for answer in answers]
    ends, open_rows = end_tokens(student), list(range(len(revised)))
    with _evaluating(teacher, student):
        for number in range(rounds):
            found = worst_tokens([prompts[i] for i in open_rows], [revised[i] for i in open_rows], teacher, student)
            wrong = {i: error for i, error in zip(open_rows, found, strict=True) if error}
            for i, (place, token) in wrong.items():
                revised[i] = [*revised[i][:place], token]
            room = {i: _room(student, prompts[i], sampling) - len(revised[i]) for i in wrong}
            going = [i for i in wrong if revised[i][-1] not in ends and room[i] > 0]
            if going:
                more = (sampler or student).write(
                    [[*prompts[i], *revised[i]] for i in going],
                    sampling,
                    [derive_seed(seeds[i], number) for i in going],
                    limits=[room[i] for i in going],
                )
                for i, rest in zip(going, more, strict=True):
                    revised[i] += rest
            open_rows = list(wrong)
            if not open_rows:
                break
    return revised


def worst_tokens(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], teacher: Model, student: Model
) -> list[tuple[int, int] | None]:
    """Of each answer, the place of its worst token and the teacher's token for it; `None` where they agree."""
    device = next(student.parameters()).device
    batch = to_device(join_rows(prompts, answers), device)
    labels = batch["labels"]
    divergences, tokens = error_map(student(batch), teacher(batch), labels)
    places = find_errors(divergences, tokens, labels, answer_mask(labels))
    chosen = tokens.gather(1, places.clamp(min=0).unsqueeze(1)).squeeze(1)
    return [(place - len(prompt) + 1, token) if place >= 0 else None
            for prompt, place, token in zip(prompts, places.tolist(), chosen.tolist(), strict=True)]  # fmt: skip


def error_map(student: Outputs, teacher: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p || q)`` and the teacher's likeliest token at each position, `[B, T]` each; 0 where nothing counts.

    A chunk of positions at a time, whose logits are made by the models' last layers where those are given.
    """
    ours, theirs = Scores.of(student), Scores.of(teacher)
    divergences = torch.zeros(labels.numel(), device=labels.device)
    tokens = torch.zeros_like(labels).flatten()
    where = answer_mask(labels).flatten().nonzero().squeeze(1)
    step = max(1, CHUNK.get(labels.device.type, CHUNK["cuda"]) // ours.size)
    for chosen in torch.split(where, step):
        q, p = common(ours.at(chosen), theirs.at(chosen))
        divergences[chosen], tokens[chosen] = forward_kl(q, p), p.argmax(1)
    return divergences.view_as(labels), tokens.view_as(labels)


def end_tokens(model: Model) -> frozenset[int]:
    """Tokens that end what a model writes: as its settings say, or else its tokenizer."""
    ends = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(model.tokenizer, "eos_token_id", None)
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def _room(model: Model, prompt: Sequence[int], sampling: Sampling) -> int:
    """Tokens that an answer may have."""
    config: Any = getattr(model.module, "config", None)
    longest = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config,
                      "max_position_embeddings", None)  # fmt: skip
    return min(sampling.max_tokens, longest - len(prompt)) if longest and longest > 0 else sampling.max_tokens


@contextlib.contextmanager
def _evaluating(*models: Model) -> Iterator[None]:
    """Inside, the models are in evaluation mode."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
