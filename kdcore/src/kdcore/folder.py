"""The run folder: one writer, atomic files, folders that are whole or not there, and a journal of metrics."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from kdcore.errors import RunFolderError

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it holds the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def commit(temporary: Path, final: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Make a finished folder permanent: digests of its files and `facts` in a manifest, flushed, then renamed."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {"facts": dict(facts or {}), "files": {str(p.relative_to(temporary)): _digest(p) for p in files}}
    write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
    for path in [*files, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _flush(final.parent)


def verify(folder: Path) -> dict[str, Any]:
    """Check a committed folder against its manifest and return its facts.

    Raises:
        RunFolderError: naming the file that is missing or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, str] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{folder} is damaged: {MANIFEST} is missing or unreadable") from None
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise RunFolderError(f"{folder} is damaged: {name} is missing")
        if _digest(folder / name) != digest:
            raise RunFolderError(f"{folder} is damaged: {name} does not match its digest")
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """A folder of one run, locked for one writer.

    Args:
        path: the folder; made if it is not there.
        recipe: the resolved recipe; the folder belongs to it.
        resume: whether a finished run may be opened again. An unfinished one of the same recipe is always gone on with.
        passing: key paths in which the recipe may differ from the folder's; the folder then gets the new one.

    Raises:
        RunFolderError: if the folder cannot be written, is in use, holds something else, a run of another recipe, or
            a finished run and `resume` is not set.
    """

    def __init__(
        self, path: Path, recipe: Mapping[str, Any], resume: bool = False, passing: Collection[str] = ()
    ) -> None:
        self.path, self.passing = path, passing
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except (FileExistsError, NotADirectoryError):
            raise RunFolderError(f"{path}: a file is in the way of the run folder; choose another --run-dir") from None
        except Timeout:
            raise RunFolderError(f"{path} is in use by another run (process {self.read().get('pid', 'unknown')}); "
                                 f"wait for it, or choose another --run-dir") from None  # fmt: skip
        except OSError as error:
            raise RunFolderError(f"{path}: the run folder cannot be written: {error.strerror}") from None
        try:
            self.resumed = self._open(recipe, resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, recipe: Mapping[str, Any], resume: bool) -> bool:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        status = self.read()
        if not status:
            strange = [
                p.name for p in self.path.iterdir() if p.name not in (".lock", "recipe.yaml") and p.suffix != ".tmp"
            ]
            if strange:
                raise RunFolderError(f"{self.path} is not a run folder: it holds {', '.join(sorted(strange)[:3])}; "
                                     "choose another --run-dir")  # fmt: skip
            write_text(self.path / "recipe.yaml", text)
            return False
        old = (self.path / "recipe.yaml").read_text() if (self.path / "recipe.yaml").is_file() else ""
        differences = _differences(yaml.safe_load(old) or {}, yaml.safe_load(text)) if old != text else {}
        if changed := ", ".join(f"{key}: {what}" for key, what in differences.items() if not self._passes(key)):
            raise RunFolderError(f"{self.path} holds a run of another recipe (different: {changed}); "
                                 f"choose a new folder, such as --run-dir {self.next_free()}")  # fmt: skip
        if status.get("status") == "finished" and not resume:
            raise RunFolderError(f"{self.path} holds a finished run: --resume shows its result again, "
                                 f"--run-dir {self.next_free()} starts a new one")  # fmt: skip
        write_text(self.path / "recipe.yaml", text)
        return True

    def _passes(self, key: str) -> bool:
        return any(f"{key}.".startswith(f"{passing}.") for passing in self.passing)

    def next_free(self) -> Path:
        """A name like this folder's that is not taken."""
        number = 2
        while (free := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        return free

    def read(self) -> dict[str, Any]:
        """`run.json`, or nothing where there is none yet."""
        try:
            content: dict[str, Any] = json.loads((self.path / "run.json").read_text())
            return content
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path / 'run.json'} is unreadable: {error}") from None

    def update(self, **facts: Any) -> None:
        """Change entries of `run.json`."""
        write_text(self.path / "run.json", json.dumps({**self.read(), **facts}, indent=1))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows of `metrics.jsonl` that are not to be kept, and a last line that was cut off."""
        path = self.path / "metrics.jsonl"
        rows = [row for line in path.read_text().splitlines() if (row := _row(line))] if path.exists() else []
        if rows or path.exists():
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows if keep(row)))

    def discard(self) -> None:
        """Take a new folder away again, unless a stage in it was finished or saved: its recipe was wrong."""
        if not self.resumed and not any(self.path.glob(f"stages/*/**/{MANIFEST}")):
            shutil.rmtree(self.path)

    def close(self) -> None:
        """Give up the lock."""
        self._lock.release()


def _row(line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        return row
    except ValueError:
        return {}


def _differences(old: Any, new: Any, key: str = "") -> dict[str, str]:
    """Both values at the key paths at which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in [*old, *(k for k in new if k not in old)] if old.get(k) != new.get(k)]
        parts = [_differences(old.get(k), new.get(k), f"{key}.{k}".lstrip(".")) for k in keys]
        return {path: what for part in parts for path, what in part.items()}
    return {key: f"{old!r} there, {new!r} now"}
