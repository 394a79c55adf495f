"""A language model's splits: tokenised once and kept on disk, or as they are read from a stream."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from kd_datasets import chat, language
from kd_datasets.language import Encoder
from kdcore.errors import DataError

logger = logging.getLogger(__name__)

SOURCES = (chat.__file__, language.__file__)
"""What the tokens depend on besides data, options and tokenizer."""


def tokenised(rows: Any, encoder: Encoder, split: str, kept: Sequence[str], digest: str) -> Any:
    """A split's rows with the fields of `Encoder` in place of its columns, without those that are left out.

    They are kept as Arrow in the cache of datasets, by the data, the options, the tokenizer and the code.

    Args:
        rows: `datasets.Dataset`.
        encoder: makes the fields.
        split: our name of it.
        kept: columns that stay.
        digest: of the encoder, see `digest`.

    Raises:
        DataError: if no row is left, or what `Encoder` raises.
    """
    name = hashlib.blake2b(repr((rows._fingerprint, split, kept, digest)).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "kd-datasets"
    folder.mkdir(parents=True, exist_ok=True)
    made = rows.map(
        lambda row, index: encoder(row, split, index),
        with_indices=True,
        remove_columns=[column for column in rows.column_names if column not in kept],
        features=_features(rows.features, encoder, split, kept),
        cache_file_name=str(folder / f"{name}.arrow"),
        new_fingerprint=name,
        desc=f"tokenising {split}",
    )
    reasons = made["_left_out"][:]
    tell(split, Counter(filter(None, reasons)), len(reasons))
    made = made.remove_columns("_left_out")
    return made.select([i for i, reason in enumerate(reasons) if not reason]) if any(reasons) else made


class TokenisedStream(IterableDataset[dict[str, Any]]):
    """The same for a stream, row by row; what is left out is told at the end of the first epoch."""

    def __init__(self, rows: Any, encoder: Encoder, split: str) -> None:
        self.rows, self.encoder, self.split, self.told = rows, encoder, split, False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reasons: Counter[str] = Counter()
        index = -1
        for index, row in enumerate(self.rows):
            made = self.encoder(row, self.split, index)
            if made["_left_out"]:
                reasons[made["_left_out"]] += 1
            else:
                yield {**row, **made}
        if not self.told:
            tell(self.split, reasons, index + 1)
            self.told = True


def tell(split: str, reasons: Counter[str], size: int) -> None:
    """Say how many of the rows of a split are left out, and why. Raises `DataError` where it is all of them."""
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    if size and reasons.total() == size:
        raise DataError(f"split {split!r}: none of the {size} rows is left to learn from: {why}")
    if reasons:
        logger.warning("split %r: %d of %d rows are left out: %s", split, reasons.total(), size, why)


def lengths(rows: Any) -> list[int]:
    """The number of tokens of each text."""
    parts = rows.select_columns("_input_ids").with_format("numpy").iter(1000)
    return [len(ids) for part in parts for ids in part["_input_ids"]]


def digest(encoder: Encoder) -> str:
    """Hexadecimal digits over all that decides the tokens of a row: options, tokenizer and code."""
    options = encoder.options
    asked = (encoder.form, sorted(encoder.roles.items()), options.template, options.max_length, options.truncation,
             options.train_on)  # fmt: skip
    found = hashlib.blake2b(repr(asked).encode(), digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        for path in (*sorted(path for path in Path(folder).rglob("*") if path.is_file()), *map(Path, SOURCES)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _features(theirs: Mapping[str, Any], encoder: Encoder, split: str, kept: Sequence[str]) -> Any:
    numbers = {name: datasets.List(datasets.Value("int32")) for name in encoder.token_fields}
    texts = {name: datasets.Value("string") for name in (*encoder.text_fields(split), "_left_out")}
    return datasets.Features({**{column: theirs[column] for column in kept}, **numbers, **texts})
