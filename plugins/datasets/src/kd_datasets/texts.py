"""Texts: the tokenizer, its fingerprint, and tokens of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore.data import IGNORE
from kdcore.errors import DataError

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids")


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers from a folder or the Hub.

    Raises:
        DataError: if transformers is not installed, or the tokenizer cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"tokenizer: {name!r} needs transformers: pip install 'kd-datasets[text]'") from error
    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer: {name!r} is no folder of a tokenizer and could not be fetched ({cause})"
        ) from error


def tokens(tokenizer: Any, text: str, pair: str | None, max_length: int | None) -> dict[str, Tensor]:
    """Int `[T]` each: `input_ids`, `attention_mask` and, where the tokenizer has them, `token_type_ids`."""
    encoded = tokenizer(text, pair, truncation=max_length is not None, max_length=max_length)
    return {key: torch.tensor(encoded[key], dtype=torch.long) for key in TOKEN_KEYS if key in encoded}


def paddings(tokenizer: Any) -> dict[str, int]:
    """What shorter texts of a batch are filled up with, by batch key."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    one = {"input_ids": pad or 0, "attention_mask": 0, "labels": IGNORE}
    return {**one, "token_type_ids": 0, **{f"ranked_{key}": value for key, value in one.items()}}
