"""Every answer on disk, by what was asked; and a journal of what the answers cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd_openai.options import OpenAIOptions, Prices
from kdcore.errors import ModelError
from kdcore.folder import write_text
from kdcore.text import Answer

logger = logging.getLogger(__name__)


def cache_folder(options: OpenAIOptions) -> Path:
    """The folder of one model at one server, made if it is not there. Raises `ModelError` where it cannot be."""
    from platformdirs import user_cache_path

    root = Path(options.cache).expanduser() if options.cache else user_cache_path("kd", appauthor=False) / "openai"
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", options.model).strip("-.")[-40:]
    folder = root / f"{readable}-{_digest([options.base_url.rstrip('/'), options.model])[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cache: the folder {folder} cannot be made: {error.strerror}; name another one") from None
    return folder


@dataclass
class Entry:
    """What is known of one prompt.

    Args:
        answers: those that can be used, so far.
        draws: how many replies there were, those that could not be used included; each is drawn with its own seed.
    """

    answers: list[Answer] = field(default_factory=list)
    draws: int = 0


class AnswerCache:
    """One small JSON file per prompt, named by the digest of everything that an answer depends on.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")

    def path(self, request: Mapping[str, Any]) -> Path:
        """The file of a request."""
        digest = _digest(request)
        return self.folder / digest[:2] / f"{digest}.json"

    def read(self, request: Mapping[str, Any]) -> Entry:
        """What is kept of a request; nothing where its file is not there or damaged, which is told."""
        path = self.path(request)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["checksum"] != _digest([request, found["answers"], found["draws"]]):
                raise ValueError("it does not match its checksum, or belongs to another prompt")
            return Entry([Answer(**answer) for answer in found["answers"]], found["draws"])
        except FileNotFoundError:
            return Entry()
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); its prompt is asked again", path, error)
            return Entry()

    def write(self, request: Mapping[str, Any], entry: Entry) -> None:
        """Keep what is known of a request."""
        path = self.path(request)
        path.parent.mkdir(exist_ok=True)
        answers = [asdict(answer) for answer in entry.answers]
        checksum = _digest([request, answers, entry.draws])
        content = {"request": request, "answers": answers, "draws": entry.draws, "checksum": checksum}
        with self._lock:  # another process may write the same answer
            write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


@dataclass
class Spent:
    """What requests have cost.

    Args:
        requests: how many.
        input, output: tokens of prompts and of answers.
    """

    requests: int = 0
    input: int = 0
    output: int = 0

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.input + self.output

    def money(self, prices: Prices | None) -> float:
        """What they cost at these prices."""
        return (self.input * prices.input + self.output * prices.output) / 1e6 if prices else 0.0


class Ledger:
    """The cost of every request: a journal that several processes may append to and read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spent = Spent()
        self._read = 0

    def open(self) -> None:
        """Make the file, if it is not there. Raises `ModelError` where it cannot be written."""
        try:
            self._append(b"")
        except OSError as error:
            raise ModelError(f"cache: the folder {self.path.parent} cannot be written: {error.strerror}; name another "
                             "one") from None  # fmt: skip

    def add(self, inputs: int, outputs: int) -> None:
        """Count one request. A line begins and ends with a line break, so that one that was cut off spoils no other."""
        self._append(f"\n{json.dumps({'input': inputs, 'output': outputs})}\n".encode())

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)  # in one piece: other processes append too
        finally:
            os.close(descriptor)

    @property
    def spent(self) -> Spent:
        """All requests of all runs and processes so far."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self._read)
                whole, _, _ = file.read().rpartition(b"\n")
            self._read += len(whole)
            for line in whole.split(b"\n"):
                self._count(line)
        return self._spent

    def _count(self, line: bytes) -> None:
        try:
            costs = json.loads(line)
            inputs, outputs = int(costs["input"]), int(costs["output"])
        except (ValueError, KeyError, TypeError):
            if line.strip():
                logger.warning("%s has a damaged line, which is left out of what is spent", self.path)
            return
        self._spent.requests += 1
        self._spent.input += inputs
        self._spent.output += outputs


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
