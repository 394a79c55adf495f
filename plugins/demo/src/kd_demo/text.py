"""Generated text: sentences to be told apart by topic, and short texts for a language model."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from kd_demo.columns import Columns
from kd_demo.grammar import THEME_LIST, TOKENIZER, TOPICS, nouns, sentence
from kd_demo.options import GeneratedOptions, SentencesOptions, TopicsOptions
from kdcore.data import IGNORE, DataModule, Task, derive_seed

PADDING = {"input_ids": TOKENIZER.pad_id, "attention_mask": 0, "labels": IGNORE}


def topics(options: TopicsOptions) -> DataModule:
    """Splits of `input_ids`, `attention_mask`, `text`, `label` (the topic) and `subclass` (the theme hidden in it)."""
    classes = tuple("+".join(TOPICS[start::2]) for start in (0, 1)) if options.binary else TOPICS
    splits = {}
    for name, count in _counts(options).items():
        rngs = [_rng("topics", options, name, i) for i in range(count)]
        themes = [rng.randrange(len(THEME_LIST)) for rng in rngs]
        texts = [sentence(rng, theme, options.confusion) for rng, theme in zip(rngs, themes, strict=True)]
        ids = [torch.tensor(TOKENIZER.encode(text)) for text in texts]
        topic = torch.tensor([THEME_LIST[theme][0] for theme in themes])
        splits[name] = Columns(input_ids=ids, attention_mask=_ones(ids), text=texts,
                               label=topic % 2 if options.binary else topic, subclass=torch.tensor(themes))  # fmt: skip
    task = Task("classification", classes, tokenizer=TOKENIZER, vocabulary=TOKENIZER.fingerprint)
    return DataModule(splits, task, collate=collate)


def sentences(options: SentencesOptions) -> DataModule:
    """Splits of `input_ids` (`<s>`, words, `</s>`), `attention_mask` and `labels`: at each position the next token."""
    splits = {}
    for name, count in _counts(options).items():
        ids = [_text(_rng("sentences", options, name, i), options) for i in range(count)]
        following = [torch.cat([row[1:], torch.tensor([IGNORE])]) for row in ids]
        for row in following:
            row[: options.prompt] = IGNORE
        splits[name] = Columns(input_ids=ids, attention_mask=_ones(ids), labels=following)
    task = Task("causal-lm", num_classes=len(TOKENIZER), tokenizer=TOKENIZER, vocabulary=TOKENIZER.fingerprint)
    return DataModule(splits, task, collate=collate)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: token columns padded on the right to the longest, `[B, T]`, the others as usual."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        padded = name in PADDING
        batch[name] = pad_sequence(values, True, PADDING[name]) if padded else default_collate(values)
    return batch


def _text(rng: random.Random, options: SentencesOptions) -> Tensor:
    theme = rng.randrange(len(THEME_LIST))
    about = [rng.choice(nouns(theme)) for _ in range(options.prompt)]
    told = [sentence(rng, theme, options.confusion) for _ in range(rng.randint(1, options.longest))]
    text = " ".join([*about, *told])
    return torch.tensor([TOKENIZER.start_id, *TOKENIZER.encode(text), TOKENIZER.end_id])


def _ones(ids: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(row) for row in ids]


def _counts(options: GeneratedOptions) -> dict[str, int]:
    return {"train": options.train, "val": options.val, "test": options.test}


def _rng(name: str, options: GeneratedOptions, split: str, index: int) -> random.Random:
    return random.Random(derive_seed(name, options.seed, split, index))
