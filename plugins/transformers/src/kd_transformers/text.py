"""The component `transformers-text`: a language model in this process that answers prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kd_transformers.adapters import find_adapter
from kd_transformers.build import load_weights, stands_apart
from kd_transformers.configs import check_kernel
from kd_transformers.heads import HEADS, is_decoder_only
from kd_transformers.options import TextOptions
from kd_transformers.source import explained, find_source
from kd_transformers.writing import Draw, generation_settings, padded, uniform
from kdcore.data import Task
from kdcore.errors import DataError, ModelError, RunFailed
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher, misfit


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
        adapter = find_adapter(source)
        described = adapter.described if adapter else source
        with explained(f"the config of {described.where!r}"):
            self.config = AutoConfig.from_pretrained(described.where, **described.arguments)
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
        ours = generation_settings(self.module, self.tokenizer)
        ends, pad = ours.eos_token_id, ours.pad_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        own = (getattr(self.module.generation_config, "pad_token_id", None), self.tokenizer.pad_token_id)
        self.blanks = [] if own == (None, None) else [pad]
        self.pad: int = pad
        self.module.generation_config = ours
        if not self.decoder_only and ours.decoder_start_token_id is None and ours.bos_token_id is None:
            raise ModelError(f"{self.name} does not say with which token an answer begins: set decoder_start_token_id "
                             "in its generation_config.json")  # fmt: skip

    def to(self, device: Any) -> TransformersText:
        """Move the model; returns itself."""
        if not stands_apart(self.module):
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
                numbers = [uniform(sampling.max_tokens, seeds[i], j, attempt) for i, j in chunk]
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
        # an answer stands right after its prompt; an encoder reads from its first position
        ids, mask = padded(prompts, self.pad, self.module.device, "left" if self.decoder_only else "right")
        start = ids.shape[1] if self.decoder_only else 1
        draw = Draw(sampling, numbers, start)
        contexts = prompts if self.decoder_only else [[]] * len(prompts)
        over = [SaidStop(self._text, contexts, sampling.stop, start)] if sampling.stop else []
        found = self.module.generate(
            input_ids=ids, attention_mask=mask,
            max_new_tokens=sampling.max_tokens, do_sample=False, logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList(over),
        )  # fmt: skip
        logprobs = torch.stack(draw.logprobs, 1).tolist() if sampling.logprobs else [[]] * len(contexts)
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


def _chunks(rows: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
