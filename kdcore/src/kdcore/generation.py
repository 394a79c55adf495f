"""Generation inside training: the prompts of a batch, what is written after them, and the batch that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdcore.data import IGNORE, derive_seed
from kdcore.errors import DataError
from kdcore.models import Batch, Model
from kdcore.options import Sampling

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "labels", "position_ids")


class Sampler(Protocol):
    """What writes tokens after tokens: a `Model`, or a server that takes its place."""

    def write(
        self, contexts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], *,
        limits: Sequence[int] | None = None, mix: tuple[Model, float] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """As `Model.write`."""

    def follow(self, model: Model, step: int) -> None:
        """Called before it writes at a step of a training: its weights have to be those of the model."""


def split_rows(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """The prompt and the answer of every row, as tokens: a prompt ends where the first label counts.

    Raises:
        DataError: for a row of which no label counts, or for rows that hold several texts.
    """
    if "position_ids" in batch:
        raise DataError("packed rows hold several texts, and no single prompt: set `packing` and `padding_free` of the "
                        "data to false where answers are generated")  # fmt: skip
    counts = batch["labels"] != IGNORE
    if not bool((some := counts.any(1)).all()):
        index = batch["index"][~some][0] if "index" in batch else (~some).nonzero()[0]
        raise DataError(f"sample {int(index)}: no label of it counts, so it has neither a prompt nor an answer")
    first = counts.long().argmax(1)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    shown = torch.ones_like(ids) if mask is None else mask
    prompts = [row[: end + 1][seen[: end + 1] > 0].tolist() for row, seen, end in zip(ids, shown, first, strict=True)]
    answers = [row[kept].tolist() for row, kept in zip(batch["labels"], counts, strict=True)]
    return prompts, answers


def join_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], like: Batch | None = None) -> Batch:
    """A batch of these rows: prompt and answer, padded on the right, and labels that are aligned with the logits and
    count in the answer only; in place of those of another batch, if one is given, whose device it then is on, and of
    which all stays but the tokens."""
    like = {"input_ids": torch.empty(0)} if like is None else like
    device = like["input_ids"].device
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([*[IGNORE] * (len(prompt) - 1), *answer, IGNORE])
              for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip
    made = {"input_ids": _padded(rows, 0), "attention_mask": _padded([torch.ones_like(row) for row in rows], 0),
            "labels": _padded(labels, IGNORE)}  # fmt: skip
    rest = {key: value for key, value in like.items() if key not in TOKEN_KEYS}
    return {**rest, **{key: value.to(device) for key, value in made.items()}}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def row_seeds(batch: Batch, *parts: object) -> list[int]:
    """A seed per row that depends on the parts and the sample's place in its split: not on batches or processes."""
    return [derive_seed(*parts, index) for index in batch["index"].tolist()]


def respond(
    sampler: Sampler, batch: Batch, sampling: Sampling, *parts: object, mix: tuple[Model, float] | None = None
) -> Batch:
    """The batch with answers that a sampler writes after its prompts, in place of its own.

    Args:
        sampler: who writes.
        batch: rows of prompt and answer.
        sampling: how.
        parts: what the random numbers depend on, beside the samples: the run's seed and the step, say.
        mix: as in `Model.write`.
    """
    prompts, _ = split_rows(batch)
    return join_rows(prompts, sampler.write(prompts, sampling, row_seeds(batch, *parts), mix=mix), batch)
