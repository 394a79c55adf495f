"""What of diffusers is loaded from where, and what is said when it cannot be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

from kd_diffusers.options import DENOISERS, DiffusersOptions
from kdcore.errors import ModelError


class NetworkConfig(diffusers.ConfigMixin):
    """Reads the `config.json` of any network. (`AutoModel.load_config` reads another file once a model was loaded.)"""

    config_name = "config.json"


@contextlib.contextmanager
def explained(what: str, where: str) -> Iterator[None]:
    """Inside, what diffusers cannot load or build becomes a `ModelError` with the way out."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if any(isinstance(cause, GatedRepoError) for cause in causes(error)):
            raise ModelError(
                f"{what} is gated: accept its licence at https://huggingface.co/{where} while logged in, then run "
                "`hf auth login` here with a token of that account"
            ) from error
        if isinstance(error, OSError | EntryNotFoundError):
            raise ModelError(
                f"{what} cannot be loaded: {first_lines(error)}\nCheck the name, `subfolder`, `variant` and the "
                "connection, or give a local folder. Only safetensors weights are read"
            ) from error
        raise ModelError(f"{what} cannot be built: {first_lines(error)}") from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def first_lines(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


def pipeline_index(where: str, revision: str | None) -> dict[str, Any]:
    """The `model_index.json` of a pipeline; nothing where there is none, as in the folder of a denoiser alone.

    Raises:
        ModelError: if the place cannot be read at all.
    """
    local = Path(where).expanduser()
    if local.is_dir() and not (local / "model_index.json").is_file():
        return {}
    with explained(f"the model {where!r}", where):
        try:
            found: dict[str, Any] = diffusers.DiffusionPipeline.load_config(where, revision=revision)
            return found
        except OSError as error:
            if any(isinstance(cause, EntryNotFoundError) for cause in causes(error)):
                return {}
            raise


def denoiser_name(index: dict[str, Any], options: DiffusersOptions) -> str:
    """What a pipeline calls its denoiser: the subfolder it lies in; empty for a denoiser alone.

    Raises:
        ModelError: if the pipeline has none of the usual ones.
    """
    if options.subfolder is not None:
        return options.subfolder
    names = [name for name in DENOISERS if index.get(name, [None])[0]]
    if index and not names:
        parts = ", ".join(key for key in index if isinstance(index[key], list))
        raise ModelError(f"the pipeline {options.rest!r} has neither a transformer nor a unet: name what it has with "
                         f"`subfolder:`, among: {parts}")  # fmt: skip
    return names[0] if names else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none. Raises `ModelError` if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
