"""The teacher: a causal language model and its tokenizer, built for prompts though the data is a graph."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_lingugkd.options import LinguGKDOptions
from kd_lingugkd.prompts import NO, YES, Prompts, Request
from kd_transformers.options import TransformersOptions
from kd_transformers.source import find_source
from kdcore import Run
from kdcore.data import IGNORE, Task, derive_seed, seeded, vocabulary_fingerprint
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.models import Model

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"


@dataclass
class LanguageModel:
    """A causal language model as the stages use it.

    Args:
        model: the model; its module is one of transformers.
        tokenizer: its tokenizer.
        source: whether its weights lie on a disk or the Hub, so that adapters can be saved without them.
    """

    model: Model
    tokenizer: Any
    source: bool

    def encode(self, prompts: Prompts, request: Request, room: int = 0) -> list[int]:
        """The tokens of a prompt, at most `limit` with `room` for an answer: neighbours that do not fit are left out,
        the last first, then words of the node's text.

        Raises:
            DataError: if not even one word of the node's text fits.
        """
        limit = self.limit(prompts.options) - room
        neighbours, words = prompts.options.neighbours * request.hop, len(prompts.texts[request.node].split(" "))
        for drop, cut in [*((n, 0) for n in range(neighbours + 1)), *((neighbours, n) for n in _halved(words))]:
            ids = self.ids(prompts.text(request, drop, cut))
            if len(ids) <= limit:
                return ids
        raise DataError(f"the prompt of node {request.node} has {len(ids)} tokens with a single word of its text, and "
                        f"the answer {room}: raise method.max_length above {self.limit(prompts.options)}, as far as "
                        "the teacher reads, or shorten template")  # fmt: skip

    def limit(self, options: LinguGKDOptions) -> int:
        """How many tokens a prompt may have with its answer: `max_length`, or fewer where the model reads fewer."""
        places: int | None = getattr(self.model.module.config, "max_position_embeddings", None)
        return min(options.max_length, places or options.max_length)

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with a start token where the tokenizer sets one, without an end."""
        found: list[int] = self.tokenizer(prompt)["input_ids"]
        return found[:-1] if found and found[-1] == self.tokenizer.eos_token_id else found

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer, which begins with a blank and ends with the end token."""
        found: list[int] = self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        return [*found, self.tokenizer.eos_token_id]

    def padded(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Tokens `[B, T]` and their mask, padded on one side."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), 1
        return ids, mask

    @property
    def pad(self) -> int:
        """The token that pads; the end token where there is none for it."""
        tokenizer = self.tokenizer
        found: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return found


def _halved(words: int) -> list[int]:
    """How many words to cut: half, three quarters, ... until one is left."""
    cuts, left = [], words
    while left > 1:
        left //= 2
        cuts.append(words - left)
    return cuts


def build_teacher(run: Run, options: LinguGKDOptions, prompts: Prompts) -> LanguageModel:
    """The teacher of the recipe, or the one handed over in Python, as a causal language model.

    A model with fresh weights gets a tokenizer of the words of the texts, unless `tokenizer` names one.

    Raises:
        RecipeError: if there is no teacher.
        ModelError: if it is no causal language model, or has no tokenizer that fits.
    """
    given, spec = run.given.get("teachers", {}).get("teacher"), run.recipe.teachers.get("teacher")
    if given is None and spec is None:
        raise RecipeError("lingugkd needs a teacher, a causal language model such as `teacher: {use: transformers, "
                          "model: meta-llama/Meta-Llama-3-8B}`; or set method.features to an earlier run")  # fmt: skip
    if spec is None:
        if options.tokenizer is None:
            raise ModelError("lingugkd needs the tokenizer of the model handed over: set `tokenizer` to its folder")
        return checked(LanguageModel(check_causal(given), read_tokenizer(options.tokenizer), source=False))
    chosen = run.resolved.options["teachers.teacher"]
    source = find_source(chosen) if isinstance(chosen, TransformersOptions) else None
    tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else source.tokenizer() if source else None
    tokenizer = tokenizer or word_tokenizer(prompts)
    task = Task("causal-lm", num_classes=len(tokenizer), tokenizer=tokenizer,
                vocabulary=vocabulary_fingerprint(tokenizer))  # fmt: skip
    with seeded(derive_seed(run.seed, "teacher")):
        model = check_causal(run.manager.get("teacher", spec.use).load_target()(chosen, task))
    return checked(LanguageModel(model, tokenizer, source is not None and getattr(chosen, "pretrained", True)))


def checked(teacher: LanguageModel) -> LanguageModel:
    """The teacher. Raises `ModelError` unless it knows its tokenizer's tokens, and an end token is among them."""
    size = len(teacher.tokenizer)
    if embedding_rows(teacher.model.module) < size:
        raise ModelError(f"the tokenizer has {size} tokens, the teacher knows fewer: use its own tokenizer")
    if teacher.tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token (eos_token), with which answers end: set method.tokenizer to "
                         "one that has")  # fmt: skip
    return teacher


def embedding_rows(module: Any) -> int:
    """How many tokens a model of transformers knows."""
    rows: int = module.get_input_embeddings().weight.shape[0]
    return rows


def check_causal(model: Any) -> Model:
    """The model. Raises `ModelError` unless it is a causal language model of transformers."""
    module = getattr(model, "module", None)
    config = getattr(module, "config", None)
    can = getattr(module, "can_generate", lambda: False)()
    if not isinstance(model, Model) or not can or getattr(config, "is_encoder_decoder", True):
        kind = type(module if module is not None else model).__name__
        raise ModelError(
            f"the teacher must be a causal language model of transformers, which continues a prompt; {kind} "
            "is none. Use `teacher: {use: transformers, model: ...}` with a decoder such as Llama"
        )
    return model


def read_tokenizer(where: str) -> Any:
    """The tokenizer of a folder or of the Hub. Raises `ModelError` if it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(
            str(Path(where).expanduser()) if Path(where).expanduser().exists() else where, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"method.tokenizer: {where!r} cannot be loaded: {reason}") from error


def word_tokenizer(prompts: Prompts) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words, separated by blanks, of texts, class names and templates."""
    drawn = [prompts.text(Request(node, prompts.options.hops, 0)) for node in range(min(50, len(prompts.texts)))]
    asked = [prompts.link(node, random.Random(node))[0] for node in range(min(5, len(prompts.texts)))]
    texts = [*prompts.texts, *prompts.classes, *(f"({name})" for name in prompts.classes), YES, NO, *drawn, *asked]
    words = sorted({word for text in texts for word in text.split()})
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([PAD, UNKNOWN, END, *words])}, UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)


def shift_labels(ids: Tensor, answers: list[int], mask: Tensor) -> Tensor:
    """Targets `[B, T]` aligned with the logits: position t holds token t + 1 where that belongs to the answer, the last
    `answers[i]` tokens of row i; -100 elsewhere. Rows are padded on the right."""
    labels = torch.full_like(ids, IGNORE)
    for i, (count, length) in enumerate(zip(answers, mask.sum(1).tolist(), strict=True)):
        labels[i, length - count - 1 : length - 1] = ids[i, length - count : length]
    return labels
