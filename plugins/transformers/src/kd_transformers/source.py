"""Where a model comes from: a folder or the Hub, and the files beside its weights."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from kd_transformers.options import CheckpointOptions
from kdcore.api import student_folder
from kdcore.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A local folder or a repository of the Hub.

    Args:
        where: the folder's path or the Hub id.
        revision: branch, tag or commit on the Hub.
        trust: whether code that lies there may run.
    """

    where: str
    revision: str | None = None
    trust: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` is called with."""
        return {"revision": self.revision, "trust_remote_code": self.trust}

    def file(self, name: str) -> Path | None:
        """A file's local path, fetched if need be; `None` if there is no such file."""
        found = cached_file(self.where, name, revision=self.revision, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        return Path(found) if found else None

    def tokenizer(self) -> Any:
        """The tokenizer that lies with the model, or `None`. Raises `ModelError` if it cannot be loaded."""
        if not any(self.file(name) for name in ("tokenizer_config.json", "tokenizer.json")):
            return None
        with explained(f"the tokenizer of {self.where!r}"):
            return AutoTokenizer.from_pretrained(self.where, **self.arguments)

    def image_settings(self) -> dict[str, Any] | None:
        """The settings of the image processor that lies with the model, or `None`."""
        with explained(f"the image settings of {self.where!r}"):
            if path := self.file("preprocessor_config.json"):
                return dict(json.loads(path.read_text(encoding="utf-8")))
            path = self.file("processor_config.json")
            nested = json.loads(path.read_text(encoding="utf-8")).get("image_processor") if path else None
            return dict(nested) if nested else None


def find_source(options: CheckpointOptions) -> Source | None:
    """The checkpoint if there is one, or else the model; `None` for a model from a config alone.

    Raises:
        ModelError: if `checkpoint` is no folder.
    """
    if options.checkpoint is None:
        return _source(options.model, options.revision, options) if options.model else None
    folder = student_folder(Path(options.checkpoint))
    if not folder.is_dir():
        raise ModelError(f"checkpoint: there is no folder {options.checkpoint!r}; give a run folder, or a folder with "
                         "config.json and model.safetensors")  # fmt: skip
    return _source(str(folder), None, options)


def _source(where: str, revision: str | None, options: CheckpointOptions) -> Source:
    if options.trust_remote_code:
        _warn(where)
    return Source(where, revision, options.trust_remote_code)


@functools.cache
def _warn(where: str) -> None:
    """Once for each model."""
    logger.warning("%s: trust_remote_code is set, so Python code that comes with this model runs with your rights",
                   where)  # fmt: skip


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Inside, what transformers cannot load or build becomes a `ModelError` with the way out."""
    try:
        yield
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(
            f"{what} cannot be loaded: {_first_lines(error)}\nCheck the name, the connection and, for a gated model, "
            "`hf auth login`; or give a local folder as `model:` or `checkpoint:`. Only safetensors weights are read"
        ) from error
    except Exception as error:  # safetensors, tokenizers and torch have no common class for what they cannot read
        raise ModelError(f"{what} cannot be built: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4]) or type(error).__name__
