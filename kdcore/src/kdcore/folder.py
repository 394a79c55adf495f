"""The run folder: one writer, atomic files, folders that are whole or not there, and a journal of metrics."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from kdcore.errors import RunFolderError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
"""Of run folders and manifests. A later one is refused, not guessed at."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_DISK_TEXTS = (
    r"No space left|os error (28|27|30|122)|file write failed|PytorchStreamWriter failed|Disk quota|File too large"
)


def disk_problem(error: BaseException) -> str | None:
    """What a storage said, where it is behind an error; torch and safetensors only say it in their texts."""
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, OSError) or not re.search(_DISK_TEXTS, str(error)):
        return None
    return str(error).splitlines()[0]


def unreadable(path: Path, error: BaseException) -> RunFolderError:
    """What is said of a file or folder that could not be read, whatever was raised."""
    said = next(iter(str(error).strip().splitlines()), "")
    return RunFolderError(f"{path} cannot be read: {type(error).__name__}{said and f': {said[:200]}'}")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it holds the old content or the new, never half of it. A link in its place is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove(folder: Path) -> None:
    """Take a folder away in one step, so that no half of it is ever seen."""
    if folder.exists():
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        os.rename(folder, temporary)
        shutil.rmtree(temporary)


def commit(temporary: Path, final: Path, facts: Mapping[str, Any] | None = None, recipe: str = "") -> None:
    """Make a finished folder permanent: digests of its files, `facts` and the fingerprint of the recipe it belongs to
    in a manifest, flushed, then renamed."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    manifest = {"format": FORMAT, "recipe": recipe, "facts": dict(facts or {}),
                "files": {str(p.relative_to(temporary)): _digest(p) for p in files}}  # fmt: skip
    write_text(temporary / MANIFEST, json.dumps(_sealed(manifest), indent=1))
    for path in [*files, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _flush(path)
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old.tmp"))
    os.rename(temporary, final)
    shutil.rmtree(final.with_name(f"{final.name}.old.tmp"), ignore_errors=True)
    _flush(final.parent)


def verify(folder: Path, recipe: str = "") -> dict[str, Any]:
    """Check a committed folder against its manifest and return its facts.

    Raises:
        RunFolderError: naming the file that is missing or changed, or if the folder belongs to another recipe or was
            written by a later version.
    """
    facts, files, theirs = _manifest(folder)
    if recipe and theirs != recipe:
        raise RunFolderError(f"{folder} belongs to a run of another recipe")
    for name, digest in files.items():
        _check_file(folder, name, digest)
    return facts


def verify_files(folder: Path) -> None:
    """Check what lies in a folder, where a manifest in it or up to two folders above names it.

    Raises:
        RunFolderError: as `verify`.
    """
    for root in (folder, *folder.resolve().parents[:2]):
        if (root / MANIFEST).is_file():
            below = "" if root == folder else f"{folder.resolve().relative_to(root)}/"
            for name, digest in _manifest(root)[1].items():
                if name.startswith(below):
                    _check_file(root, name, digest)
            return


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        _check_format(folder, int(manifest["format"]))
        _check_seal(manifest)
        return dict(manifest["facts"]), dict(manifest["files"]), str(manifest["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{folder} is damaged: {MANIFEST} is missing or unreadable") from None


def _sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with a digest over them, as the last entry."""
    return {**facts, "digest": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def _check_seal(facts: dict[str, Any]) -> None:
    """Take the digest out again. Raises `ValueError` if it is not that of the facts."""
    if facts.pop("digest", None) != _sealed(facts)["digest"]:
        raise ValueError("it does not match its digest")


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as JSON with a digest over them, as `write_text`."""
    write_text(path, json.dumps(_sealed({"format": FORMAT, **facts}), indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `RunFolderError` if it is missing, changed or of a later version."""
    try:
        facts = dict(json.loads(path.read_text()))
        _check_format(path, int(facts["format"]))
        _check_seal(facts)
        return facts
    except FileNotFoundError:
        raise RunFolderError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error})") from None


def _check_format(path: Path, form: int) -> None:
    if form > FORMAT:
        raise RunFolderError(f"{path} was written by a later version of kdcore (format {form}; this one knows "
                             f"{FORMAT}): update kdcore")  # fmt: skip


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        raise RunFolderError(f"{folder} is damaged: {name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunFolderError(f"{folder} is damaged: {name} is a link that leads out of it")
    if _digest(path) != digest:
        raise RunFolderError(f"{folder} is damaged: {name} does not match its digest")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_status(path: Path, way_out: str = "") -> dict[str, Any]:
    """`run.json` of a run folder, or nothing where there is none yet.

    Raises:
        RunFolderError: if it is damaged, or was written by a later version.
    """
    try:
        status = dict(json.loads((path / "run.json").read_text()))
        _check_format(path, int(status.get("format", FORMAT)))
        _check_seal(status)
        return status
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{path / 'run.json'} is damaged ({error}){way_out}") from None


def check_recipe_file(path: Path) -> None:
    """Raises `RunFolderError` if the recipe of a run folder is not the one that the run left there."""
    if _digest(path / "recipe.yaml") != read_status(path).get("recipe_file"):
        raise RunFolderError(f"{path / 'recipe.yaml'} is damaged, or was changed after the run: put it back")


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
            _check_links(path)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except (FileExistsError, NotADirectoryError):
            raise RunFolderError(f"{path}: a file is in the way of the run folder; choose another --run-dir") from None
        except Timeout:
            raise RunFolderError(f"{path} is in use by another run (process {self.read().get('pid', 'unknown')}); "
                                 f"wait for it, or choose another --run-dir") from None  # fmt: skip
        except NotImplementedError:
            raise RunFolderError(f"{path}: the file system cannot lock files; choose another --run-dir") from None
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            _check_storage(path)
            self.resumed = self._open(recipe, resume)
            _sweep(path)
        except OSError as error:
            self._lock.release()
            raise _unwritable(path, error) from None
        except BaseException:
            self._lock.release()
            raise

    def _open(self, recipe: Mapping[str, Any], resume: bool) -> bool:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        status = self.read()
        if not status:
            known = (".lock", ".probe", "recipe.yaml")
            strange = [p.name for p in self.path.iterdir() if p.name not in known and p.suffix != ".tmp"]
            if strange:
                raise RunFolderError(f"{self.path} is not a run folder: it holds {', '.join(sorted(strange)[:3])}; "
                                     "choose another --run-dir")  # fmt: skip
            write_text(self.path / "recipe.yaml", text)
            return False
        if (lost := status.get("rows", 0) - self._rows()) > 0:
            logger.warning("%s is damaged: %d of its rows are gone", self.path / "metrics.jsonl", lost)
        differences = _differences(self._old_recipe(), yaml.safe_load(text))
        if changed := ", ".join(f"{key}: {what}" for key, what in differences.items() if not self._passes(key)):
            raise RunFolderError(f"{self.path} holds a run of another recipe (different: {changed}); "
                                 f"choose a new folder, such as --run-dir {self.next_free()}")  # fmt: skip
        if status.get("status") == "finished" and not resume:
            raise RunFolderError(f"{self.path} holds a finished run: --resume shows its result again, "
                                 f"--run-dir {self.next_free()} starts a new one")  # fmt: skip
        write_text(self.path / "recipe.yaml", text)
        self.update()  # of the digest of the recipe
        return True

    def _old_recipe(self) -> dict[str, Any]:
        path = self.path / "recipe.yaml"
        try:
            return dict(yaml.safe_load(path.read_text()))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            raise RunFolderError(f"{path} is missing or damaged, so that nobody can tell what the folder holds; put it "
                                 f"back, or choose a new folder, such as {self.next_free()}") from None  # fmt: skip

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
        return read_status(self.path, f"; put it back, or choose a new folder, such as {self.next_free()}")

    def update(self, **facts: Any) -> None:
        """Change entries of `run.json`."""
        now = {"format": FORMAT, **self.read(), **facts, "rows": self._rows(),
               "recipe_file": _digest(self.path / "recipe.yaml")}  # fmt: skip
        write_text(self.path / "run.json", json.dumps(_sealed(now), indent=1))

    def _rows(self) -> int:
        journal = self.path / "metrics.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows of `metrics.jsonl` that are not to be kept, and a last line that was cut off. Lines that are no
        rows are named in a warning, and dropped."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        rows = [_row(line) for line in lines[:-1]]
        if damaged := [number for number, row in enumerate(rows, 1) if not row]:
            logger.warning("%s is damaged: line %s cannot be read and is left out", path, ", ".join(map(str, damaged)))
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row and keep(row)))

    def discard(self) -> None:
        """Take a new folder away again, unless a stage in it was finished or saved: its recipe was wrong."""
        if not self.resumed and not any(self.path.glob(f"stages/*/**/{MANIFEST}")):
            shutil.rmtree(self.path)

    def close(self) -> None:
        """Give up the lock."""
        self._lock.release()


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path}: the run folder cannot be written: {error.strerror}")


def _row(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def _check_links(path: Path) -> None:
    """Refuse links that lead out of the folder: what a run writes and sweeps away would be elsewhere."""
    for found in path.rglob("*"):
        if found.is_symlink() and not found.resolve().is_relative_to(path.resolve()):
            raise RunFolderError(
                f"{found} is a link that leads out of the run folder; put what it leads to in its place"
            )


def _check_storage(path: Path) -> None:
    """Refuse a file system on which a file cannot take another's place: a kill could then leave half a file."""
    probe = path / ".probe"
    write_text(probe, "")
    try:
        write_text(probe, "again")
    except OSError as error:
        if error.errno in _DISK - {errno.EACCES, errno.EPERM}:
            raise
        raise RunFolderError(
            f"{path}: the file system cannot put a file in another's place ({error.strerror}), which "
            "checkpoints need; choose a --run-dir on a local disk, or on NFS or Lustre"
        ) from None
    probe.unlink()


def _sweep(path: Path) -> None:
    """Remove what a run that was killed had half written."""
    for folder in (path, path / "students", *path.glob("stages/*"), *path.glob("stages/*/*")):
        for left in folder.glob("*.tmp") if folder.name != "artifact" and folder.is_dir() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _differences(old: Any, new: Any, key: str = "") -> dict[str, str]:
    """Both values at the key paths at which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in [*old, *(k for k in new if k not in old)] if old.get(k) != new.get(k)]
        parts = [_differences(old.get(k), new.get(k), f"{key}.{k}".lstrip(".")) for k in keys]
        return {path: what for part in parts for path, what in part.items()}
    return {key: f"{old!r} there, {new!r} now"}
