"""The component `transformers-text`: a language model in this process that answers prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kd_transformers.build import load_weights
from kd_transformers.configs import check_kernel
from kd_transformers.heads import HEADS, is_decoder_only
from kd_transformers.options import TextOptions
from kd_transformers.source import explained, find_source
from kdcore.data import Task, derive_seed
from kdcore.errors import DataError, ModelError, RunFailed
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher, misfit

KEPT = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "pad_token_id")
"""What of a model's generation settings stays; how answers are drawn, `Sampling` alone says."""


class TransformersText(TextTeacher):
    """A causal language model, or an encoder-decoder, with its tokenizer.

    Each answer is drawn with random numbers of its own, from its prompt's seed, so that it does not depend on the other
    prompts of the call. (The logits do, in their last digits, for a matrix product of a batch is not that of its rows
    one by one: with `batch_size: 1` they do not.)

    Args:
        options: of the teacher.
        task: not read: any data can be asked about.

    Attributes:
        name: the model's.

    Raises:
        ModelError: if the model cannot be had, or writes no text.
    """

    def __init__(self, options: TextOptions, task: Task | None = None) -> None:
        self.options, self.name = options, str(options.checkpoint or options.model)
        source = find_source(options)
        if source is None:
            raise ModelError("transformers-text needs a `model` or a `checkpoint`")
        with explained(f"the config of {source.where!r}"):
            self.config = AutoConfig.from_pretrained(source.where, **source.arguments)
            check_kernel(self.config, options)
        self.decoder_only = not getattr(self.config, "is_encoder_decoder", False)
        head = HEADS["causal-lm" if self.decoder_only else "seq2seq"]
        two_way = (
            self.decoder_only and not is_decoder_only(self.config) and not getattr(self.config, "is_decoder", False)
        )
        if two_way or not head.classes_for(self.config):
            raise ModelError(f"{source.where}: a model of type {self.config.model_type!r} writes no text")
        self.tokenizer = source.tokenizer()
        if self.tokenizer is None:
            raise ModelError(f"{source.where}: there is no tokenizer with the model; save it into the same folder")
        self.module, info = load_weights(options, source, self.config, head)
        if lacking := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
            raise ModelError(f"{source.where} has no fitting weights for {lacking[0]!r}: it was not saved as a model "
                             "that writes text")  # fmt: skip
        self.module.eval().requires_grad_(False)
        self._settle()

    def _settle(self) -> None:
        """Which tokens begin, end and pad; nothing else of the model's own generation settings."""
        ours = GenerationConfig(**{name: getattr(self.module.generation_config, name, None) for name in KEPT})
        ends = self.tokenizer.eos_token_id if ours.eos_token_id is None else ours.eos_token_id
        pad = self.tokenizer.pad_token_id if ours.pad_token_id is None else ours.pad_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.blanks = [] if pad is None else [pad]
        self.pad: int = next(iter([*self.blanks, *self.ends]), 0)
        ours.eos_token_id, ours.pad_token_id = self.ends or None, self.pad
        self.module.generation_config = ours
        if not self.decoder_only and ours.decoder_start_token_id is None and ours.bos_token_id is None:
            raise ModelError(f"{self.name} does not say with which token an answer begins: set decoder_start_token_id "
                             "in its generation_config.json")  # fmt: skip

    def to(self, device: Any) -> TransformersText:
        """Move the model; returns itself."""
        self.module.to(device)
        return self

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """`sampling.n` answers to each prompt, in order.

        An answer's tokens, and their log-probabilities, are the model's own (before temperature, nucleus and penalties)
        and include the one that ends it.

        Raises:
            DataError: on a prompt that is too long for the model, or a chat where the tokenizer has no template.
            RecipeError: if `sampling.json_schema` has a `$ref` that leads nowhere.
            RunFailed: if no answer to a prompt fits it.
        """
        tokens = [self._encode(i, prompt, sampling.max_tokens) for i, prompt in enumerate(prompts)]
        rows = [(i, j) for i in range(len(prompts)) for j in range(sampling.n)]
        answers: dict[tuple[int, int], Answer] = {}
        for attempt in range(self.options.retries + 1):
            open_rows = [row for row in rows if row not in answers]
            for chunk in _chunks(open_rows, self.options.batch_size):
                numbers = [_uniform(sampling.max_tokens, seeds[i], j, attempt) for i, j in chunk]
                written = self._write([tokens[i] for i, _ in chunk], torch.stack(numbers), sampling)
                fits = [sampling.json_schema is None or misfit(a.text, sampling.json_schema) is None for a in written]
                answers |= {row: a for row, a, good in zip(chunk, written, fits, strict=True) if good}
        if lacking := [i for i, j in rows if (i, j) not in answers]:
            raise RunFailed(f"no answer of {self.name} to prompt {lacking[0]} fits json_schema in "
                            f"{self.options.retries + 1} attempts: raise `retries` or `max_tokens`")  # fmt: skip
        return [[answers[i, j] for j in range(sampling.n)] for i in range(len(prompts))]

    def _encode(self, number: int, prompt: Prompt, room: int) -> list[int]:
        """The tokens of a prompt, for which there is room with so many of an answer."""
        if isinstance(prompt, str) and self.options.mode == "chat":
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise DataError(f"prompt {number} is a chat, and the tokenizer of {self.name} has no chat template")
        else:
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids and self.tokenizer.bos_token_id is None:
            raise DataError(f"prompt {number} has no tokens")
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        needed = len(ids) + room if self.decoder_only else max(len(ids), room)
        if limit is not None and needed > limit:
            raise DataError(f"prompt {number} has {len(ids)} tokens; with max_tokens={room} that is more than the "
                            f"{limit} that {self.name} takes")  # fmt: skip
        return ids or [self.tokenizer.bos_token_id]

    @torch.no_grad()
    def _write(self, prompts: list[list[int]], numbers: Tensor, sampling: Sampling) -> list[Answer]:
        """One answer to each of some prompts, drawn with the random numbers `[B, max_tokens]`."""
        longest = max(map(len, prompts))
        gaps = [longest - len(ids) for ids in prompts]
        left = self.decoder_only  # an answer stands right after its prompt; an encoder reads from its first position
        ids = [[self.pad] * gap + p if left else p + [self.pad] * gap for p, gap in zip(prompts, gaps, strict=True)]
        mask = [[0] * gap + [1] * len(p) if left else [1] * len(p) + [0] * gap
                for p, gap in zip(prompts, gaps, strict=True)]  # fmt: skip
        device = self.module.device
        start = longest if self.decoder_only else 1
        draw = Draw(sampling, numbers, start)
        contexts = prompts if self.decoder_only else [[]] * len(prompts)
        over = [SaidStop(self._text, contexts, sampling.stop, start)] if sampling.stop else []
        found = self.module.generate(
            input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=sampling.max_tokens, do_sample=False, logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList(over),
        )  # fmt: skip
        logprobs = torch.stack(draw.logprobs, 1).tolist()
        written = zip(contexts, found[:, start:].tolist(), logprobs, strict=True)
        return [self._answer(*row, sampling) for row in written]

    def _answer(self, prompt: list[int], tokens: list[int], logprobs: list[float], sampling: Sampling) -> Answer:
        """What one row says: up to the token, or without the text, that ends it."""
        over = {**dict.fromkeys(self.blanks, 0), **dict.fromkeys(self.ends, 1)}
        count = next((i + over[token] for i, token in enumerate(tokens) if token in over), len(tokens))
        finish = "length" if count == len(tokens) and tokens[-1] not in self.ends else "stop"
        text = self._text(prompt, tokens[:count])
        if found := [place for stop in sampling.stop if (place := text.find(stop)) >= 0]:
            enough = (k for k in range(1, count + 1) if any(s in self._text(prompt, tokens[:k]) for s in sampling.stop))
            text, finish, count = text[: min(found)], "stop", next(enough)
        return Answer(text, finish, math.fsum(logprobs[:count]) if sampling.logprobs else None, count)

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """The text of an answer's tokens, as it goes on with the prompt: with the blank in between, if there is one."""
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = (self.tokenizer.decode(ids, **settings) for ids in (prompt, [*prompt, *tokens]))
        text: str = whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(tokens, **settings)
        return text


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own random numbers, and leaves no other to choose.

    Args:
        sampling: how.
        numbers: `[B, T]`, uniform in [0, 1): one for each row and step.
        start: how many tokens stand before an answer.

    Attributes:
        logprobs: for each step, the log-probability `[B]` of what was drawn, as the model has it.
    """

    def __init__(self, sampling: Sampling, numbers: Tensor, start: int) -> None:
        self.sampling, self.numbers, self.start = sampling, numbers, start
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` that are 0 for the token drawn and -inf for all others."""
        s, logits = self.sampling, scores.float()
        number = self.numbers[:, len(self.logprobs)].to(logits.device)
        changed = penalised(logits, input_ids[:, self.start :], s.presence_penalty, s.frequency_penalty)
        drawn = draw(changed, number, s.temperature, s.top_p).unsqueeze(1)
        self.logprobs.append(logits.log_softmax(1).gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class SaidStop(StoppingCriteria):  # type: ignore[misc]
    """Whether a row's answer holds a text at which it ends.

    Args:
        text: `(prompt, tokens) -> text`.
        prompts: tokens of each row's prompt.
        stops: those texts.
        start: how many tokens stand before an answer.
    """

    def __init__(
        self, text: Callable[[list[int], list[int]], str], prompts: list[list[int]], stops: Sequence[str], start: int
    ) -> None:
        self.text, self.prompts, self.stops, self.start = text, prompts, stops, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row `[B]` of the tokens `[B, T]` is done."""
        said = [self.text(*row) for row in zip(self.prompts, input_ids[:, self.start :].tolist(), strict=True)]
        return torch.tensor([any(stop in text for stop in self.stops) for text in said], device=input_ids.device)


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


def _uniform(count: int, *parts: int) -> Tensor:
    """Random numbers in [0, 1) that depend on the parts and on nothing else."""
    return torch.rand(count, generator=torch.Generator().manual_seed(derive_seed(*parts)), dtype=torch.float64)


def _chunks(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
