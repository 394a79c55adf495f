"""The student: a causal language model that knows the special tokens, and its answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kd_symbolic_kd.data import TripleData
from kdcore.data import Task, seeded, to_device
from kdcore.errors import ModelError
from kdcore.models import Batch, Labels, Model


def with_special_tokens(model: Model, task: Task, seed: int) -> Model:
    """A student whose embedding has a row for every token of the task's tokenizer, which is saved with it.

    Raises:
        ModelError: if it has too few and cannot be given more, or its own vocabulary is another one.
    """
    tokenizer, size = task.tokenizer, len(task.tokenizer)
    known = model.labels.count
    if known is not None and known < size:
        resize: Any = getattr(model.module, "resize_token_embeddings", None)
        if resize is None:
            raise ModelError(f"the student knows {known} tokens, the tokenizer with its special tokens has {size}; "
                             "take a causal language model of transformers, or one as wide")  # fmt: skip
        with seeded(seed):
            resize(size)
    native = model.save

    def save(folder: Path) -> None:
        native(folder)
        tokenizer.save_pretrained(folder)

    return Model(model.module, functools.partial(_call, model), save=save, stages=model.stages,
                 labels=Labels(max(size, known or 0), None, task.vocabulary))  # fmt: skip


def _call(model: Model, module: Any, batch: Batch) -> Any:
    return model(batch)


@torch.no_grad()
def answers(model: Model, data: TripleData, pairs: Sequence[tuple[str, str]], max_new_tokens: int,
            device: torch.device) -> list[str]:  # fmt: skip
    """The likeliest tail, token by token, for each head and relation, up to the first dot or line break."""
    tokenizer, model = data.tokenizer, model.to(device).eval()
    rows = [data.prompt_ids(head, relation, max_new_tokens) for head, relation in pairs]
    tails: list[list[int]] = [[] for _ in rows]
    for _ in range(max_new_tokens):
        going = [i for i, tail in enumerate(tails) if tokenizer.eos_token_id not in tail]
        if not going:
            break
        said = [[*rows[i], *tails[i]] for i in going]
        logits = model(_batch(said, tokenizer.pad_token_id, device)).need("logits")
        ends = torch.tensor([len(row) - 1 for row in said], device=device)
        likeliest = logits[torch.arange(len(said), device=device), ends, : len(tokenizer)].argmax(-1)
        for i, token in zip(going, likeliest.tolist(), strict=True):
            tails[i].append(token)
    texts = tokenizer.batch_decode(tails, skip_special_tokens=True)
    return [re.split(r"[.\n]", text)[0].strip() for text in texts]


def _batch(rows: list[list[int]], pad: int, device: torch.device) -> Batch:
    ids = [torch.tensor(row) for row in rows]
    batch: Batch = to_device({"input_ids": pad_sequence(ids, True, pad),
                              "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0)},
                             device)  # fmt: skip
    return batch
