"""Texts: read from the data, compared, put into batches for a learner, and chosen by what it says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_dataset_distill.artifact import encode
from kd_dataset_distill.functional import k_centers
from kd_dataset_distill.generator import Text
from kdcore import DataModule, Model, Run
from kdcore.data import to_device
from kdcore.errors import DataError, RunFailed
from kdcore.models import Batch


def read_text(sample: Mapping[str, Any], tokenizer: Any) -> Text:
    """The text of a sample: itself, or its tokens put into words again; a pair by the tokens' types.

    Raises:
        DataError: if there is neither.
    """
    if isinstance(sample.get("text"), str):
        return sample["text"], sample.get("text_pair")
    if "input_ids" not in sample or tokenizer is None:
        raise DataError(f"there are no texts in the data; its samples have: {', '.join(sample)}")
    ids, types = sample["input_ids"], sample.get("token_type_ids")
    if types is not None and bool((types == 1).any()):
        return _decode(tokenizer, ids[types == 0]), _decode(tokenizer, ids[types == 1])
    return _decode(tokenizer, ids), None


def read_texts(data: DataModule, split: str) -> list[Text]:
    """The texts of a split, in order."""
    return [read_text(data[split][i], data.task.tokenizer) for i in range(data.size(split) or 0)]


def learner_batch(data: DataModule, texts: Iterable[Text], labels: Sequence[int]) -> Batch:
    """Texts as the data's batches hold them, with labels `[B]`."""
    samples: list[dict[str, Any]] = [
        {**encode(data.task.tokenizer, *text), "label": torch.tensor(label)}
        for text, label in zip(texts, labels, strict=True)
    ]
    return data.collate(samples)


class Seen:
    """Texts by their words, whatever their case and blanks: those that must not come again.

    Args:
        data: the texts of its splits other than `train` count as seen.
    """

    def __init__(self, data: DataModule) -> None:
        self.known = {_key(text) for split in data.splits if split != "train" and data.size(split) is not None
                      for text in read_texts(data, split)}  # fmt: skip

    def new(self, text: Text) -> bool:
        """Whether the text is new; from now on it is not."""
        if (key := _key(text)) in self.known:
            return False
        self.known.add(key)
        return True


def _key(text: Text) -> tuple[str, ...]:
    return tuple(" ".join((part or "").split()).casefold() for part in text)


def _decode(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True) if callable(tokenizer) else
               tokenizer.decode(ids.tolist()))  # fmt: skip


def nearest(run: Run, learner: Model, texts: list[Text], label: int, count: int) -> list[Text]:
    """The texts nearest to k-means centres of their embeddings. Raises `RunFailed` if there are not so many."""
    if len(texts) < count:
        name = run.data.task.classes[label] if run.data.task.classes else label
        raise RunFailed(
            f"only {len(texts)} different texts of the class {name!r} can be used, and method.ipc asks for {count}; "
            "raise method.over_generate, or train the generator longer"
        )
    if len(texts) == count:
        return texts
    learner.to(run.device).eval()
    with torch.no_grad():
        points = torch.cat(
            [
                learner(to_device(learner_batch(run.data, part, [label] * len(part)), run.device))
                .need("embedding")
                .float()
                .cpu()
                for part in _parts(texts)
            ]
        )
    return [texts[i] for i in k_centers(points, count, run.seed).tolist()]


def as_columns(found: list[tuple[Text, int]]) -> dict[str, Any]:
    """Texts with labels as columns; `text_pair` where they are pairs."""
    columns: dict[str, Any] = {"text": [text for (text, _), _ in found], "label": [label for _, label in found]}
    if found and found[0][0][1] is not None:
        columns["text_pair"] = [pair for (_, pair), _ in found]
    return columns


def _parts(texts: list[Text], size: int = 256) -> Iterator[list[Text]]:
    return (texts[i : i + size] for i in range(0, len(texts), size))
