"""Tokens after tokens: sampling from a causal language model with a cache, each row with random numbers of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kdcore.data import derive_seed
from kdcore.errors import DataError, ModelError
from kdcore.options import Sampling

KEPT = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "pad_token_id")
"""What of a model's generation settings stays; how tokens are drawn, `Sampling` alone says."""


class Writer:
    """`kdcore.Model`'s writer of a causal language model: see `Model.write`.

    Args:
        module: the model.
        tokenizer: says which tokens end and pad, where the model does not.

    Attributes:
        ends: tokens that end an answer.
        pad: the token that fills up shorter rows.
    """

    def __init__(self, module: Any, tokenizer: Any) -> None:
        self.settings = generation_settings(module, tokenizer)
        ends = self.settings.eos_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.pad: int = self.settings.pad_token_id
        self.longest: int | None = getattr(module.config.get_text_config(), "max_position_embeddings", None)

    def __call__(
        self, module: Any, contexts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int],
        limits: Sequence[int] | None = None, mix: tuple[Any, float] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens after each context, with the one that ends them."""
        most = self._rooms(contexts, limits or [sampling.max_tokens] * len(contexts))
        ids, mask = padded(contexts, self.pad, module.device)
        start, room = ids.shape[1], max(most)
        numbers = torch.stack([uniform(room, seed) for seed in seeds])
        draw = Draw(sampling, numbers, start)
        processors: list[Any] = [Mixed(*mix, mask), draw] if mix else [draw]
        enough = Enough(torch.tensor(most, device=ids.device) + start)
        with generating(module, self.settings):
            found = module.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False,
                logits_processor=LogitsProcessorList(processors), stopping_criteria=StoppingCriteriaList([enough]),
            )  # fmt: skip
        return [self._cut(row[:limit]) for row, limit in zip(found[:, start:].tolist(), most, strict=True)]

    def _rooms(self, contexts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[int]:
        """How many tokens there is room for after each context."""
        rooms = []
        for number, (context, limit) in enumerate(zip(contexts, limits, strict=True)):
            room = limit if self.longest is None or self.longest < 0 else min(limit, self.longest - len(context))
            if not context or room < 1:
                raise DataError(f"row {number}: a prompt of {len(context)} tokens, with {limit} asked for, leaves no "
                                f"room for an answer (the model reads {self.longest}): shorten prompts")  # fmt: skip
            rooms.append(room)
        return rooms

    def _cut(self, tokens: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[:end]


def generation_settings(module: Any, tokenizer: Any) -> Any:
    """Which tokens begin, end and pad; nothing else of a model's own generation settings."""
    ours = GenerationConfig(**{name: getattr(module.generation_config, name, None) for name in KEPT})
    if ours.eos_token_id is None:
        ours.eos_token_id = getattr(tokenizer, "eos_token_id", None)
    if ours.pad_token_id is None:
        ours.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    if ours.pad_token_id is None:
        ends = ours.eos_token_id
        ours.pad_token_id = ends[0] if isinstance(ends, list) and ends else ends if isinstance(ends, int) else 0
    return ours


@contextlib.contextmanager
def generating(module: Any, settings: Any) -> Iterator[None]:
    """Inside, a model generates with these settings and none of its own, and keeps what it has read in a cache."""
    own, module.generation_config = module.generation_config, settings
    checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    if checkpointing:
        module.gradient_checkpointing_disable()
    try:
        yield
    finally:
        module.generation_config = own
        if checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of tokens that end together `[B, T]`, or begin together (`right`), and their mask."""
    ids, mask = (pad_sequence([torch.tensor(row) for row in values], True, fill, side) for values, fill in
                 ((rows, pad), ([[1] * len(row) for row in rows], 0)))  # fmt: skip
    return ids.to(device), mask.to(device)


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own random numbers, and leaves no other to choose.

    Args:
        sampling: how.
        numbers: `[B, T]`, uniform in [0, 1): one for each row and step.
        start: how many tokens stand before an answer.

    Attributes:
        logprobs: for each step, the log-probability `[B]` of what was drawn, as the model has it; where asked for.
    """

    def __init__(self, sampling: Sampling, numbers: Tensor, start: int) -> None:
        self.sampling, self.numbers, self.start = sampling, numbers, start
        self.steps = 0
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` that are 0 for the token drawn and -inf for all others."""
        s, logits = self.sampling, scores.float()
        number = self.numbers[:, self.steps].to(logits.device)
        self.steps += 1
        changed = penalised(logits, input_ids[:, self.start :], s.presence_penalty, s.frequency_penalty)
        drawn = draw(changed, number, s.temperature, s.top_p).unsqueeze(1)
        if s.logprobs:
            self.logprobs.append(logits.log_softmax(1).gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class Mixed(LogitsProcessor):  # type: ignore[misc]
    """Scores that are the logarithm of two models' probabilities, mixed.

    Args:
        module: the other model; it reads with a cache of its own.
        share: of its probabilities.
        mask: `[B, T]` of the contexts.
    """

    def __init__(self, module: Any, share: float, mask: Tensor) -> None:
        self.module, self.share, self.mask, self.cache = module, share, mask, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logarithm `[B, V]` of the mixture; tokens that one of them does not have are left to the other."""
        more = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.nn.functional.pad(self.mask, (0, more), value=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        seen = 0 if self.cache is None else input_ids.shape[1] - 1
        found = self.module(input_ids=input_ids[:, seen:], attention_mask=self.mask, position_ids=positions[:, seen:],
                            past_key_values=self.cache, use_cache=True)  # fmt: skip
        self.cache = getattr(found, "past_key_values", None)
        if self.cache is None:
            raise ModelError(f"{type(self.module).__name__} keeps no keys and values, so it cannot be mixed in")
        ours, theirs = scores.float().softmax(1), found.logits[:, -1].float().softmax(1)
        size = min(ours.shape[1], theirs.shape[1])
        mixed = (1 - self.share) * ours
        mixed[:, :size] += self.share * theirs[:, :size]
        return mixed.log()


class Enough(StoppingCriteria):  # type: ignore[misc]
    """Whether a row is as long as it may be.

    Args:
        lengths: tokens `[B]`, those of the padded context included.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row `[B]` of the tokens `[B, T]` is done."""
        return self.lengths <= input_ids.shape[1]


def penalised(logits: Tensor, written: Tensor, presence: float, frequency: float) -> Tensor:
    """Logits `[B, V]` less the penalties for each token that is in `written` `[B, T]` already."""
    if not presence and not frequency:
        return logits
    counts = torch.zeros_like(logits).scatter_add(1, written, torch.ones_like(written, dtype=logits.dtype))
    return logits - presence * (counts > 0) - frequency * counts


def draw(logits: Tensor, number: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens `[B]` drawn from logits `[B, V]` by inverting the distribution function at `number` `[B]` in [0, 1)."""
    if temperature == 0:
        return logits.argmax(1)
    chances = (logits / temperature).softmax(1)
    if top_p < 1:
        ordered, order = chances.sort(stable=True, dim=1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 0.0)
        chances = torch.zeros_like(chances).scatter(1, order, ordered)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    heights = chances.to(exact).cumsum(1)
    reached = heights[:, -1:] * number.to(exact).unsqueeze(1)
    return torch.searchsorted(heights, reached, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def uniform(count: int, *parts: int) -> Tensor:
    """Random numbers in [0, 1) that depend on the parts and on nothing else."""
    return torch.rand(count, generator=torch.Generator().manual_seed(derive_seed(*parts)), dtype=torch.float64)
