"""Teacher caches, filled: a frozen teacher is asked once about each sample, and what it says is kept on disk."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader

from kdcore import folder
from kdcore.cache import DIGEST, FACTS, HEAD, VIEWS, Cached, Joined, Reader, read_facts, sample_digest, shard_path
from kdcore.data import DataModule, to_device
from kdcore.encoding import Encoded, Encoder
from kdcore.errors import DataError, Interrupted, RecipeError, RunFailed, RunFolderError
from kdcore.folder import disk_problem
from kdcore.loading import Collate, Drawn, Keyed, named_sample, seeded
from kdcore.models import Batch, Model
from kdcore.options import CacheOptions
from kdcore.stages import Stage

if TYPE_CHECKING:
    from kdcore.runner import Run

logger = logging.getLogger(__name__)

_SHARD = 2**28
"""Bytes of a shard, at most, about; a row is not divided."""
_SHARD_ROWS = 1024
_LOOKED_AT = 16
"""Samples of a split that its cache's key depends on; each is held against what the teacher saw when it is read."""


def serve(run: Run) -> None:
    """Put caches in the place of the teachers that are to have one, filling them first where they are not filled."""
    wanted = {role: spec.cache for role, spec in run.recipe.teachers.items() if spec.cache}
    wanted |= run.given.get("cache", {})
    made = {role: cached(run, role, options) for role, options in wanted.items()}
    if not made:
        return
    if len({(c.facts["views"]) for c in made.values()}) > 1:
        raise RecipeError("teachers: their caches hold different numbers of views; give all the same `cache.views`")
    run.data = copy.copy(run.data)
    run.data.splits = dict(run.data.splits)
    for split in {name for c in made.values() for name in c.facts["splits"]}:
        readers = {r: Reader(c.path, c.facts, split) for r, c in made.items() if split in c.facts["splits"]}
        for role, reader in readers.items():
            if reader.size != run.data.size(split):
                raise DataError(f"the cache of teacher {role!r} holds {reader.size} samples of split {split!r}, which "
                                f"has {run.data.size(split)}")  # fmt: skip
        run.data.splits[split] = Joined(run.data[split], run.data.keys, readers)
    run.models |= cast(dict[str, Any], made)


def cached(run: Run, role: str, options: CacheOptions) -> Cached:
    """A teacher's cache, filled where it is not.

    Raises:
        RecipeError, DataError, ModelError: if there can be none of this teacher and data.
        RunFolderError: if one that is to be taken as it is, is damaged.
        RunFailed: if the disk has too little room.
        Interrupted: after a signal; the shards that were written stay.
    """
    if options.filled:
        path = Path(options.filled).expanduser()
        facts = read_facts(path)
        _check_data(run, role, list(facts["splits"]), facts["views"])
        for split, shards in facts["shards"].items():
            for number in range(len(shards)):
                folder.verify(shard_path(path, split, number))
        return Cached(role, path, facts, lambda: cast(Model, run.fresh(role)))
    _check_data(run, role, options.splits, options.views)
    teacher = run.model(role)
    if not isinstance(teacher, Model):
        raise RecipeError(f"teachers.{role}.cache: a {type(teacher).__name__} cannot be cached here")
    stage = FillCache(run, role, teacher.freeze(), options)
    stage.fill()
    return Cached(role, stage.path, read_facts(stage.path), lambda: teacher)


def _check_data(run: Run, role: str, splits: list[str], views: int) -> None:
    key = f"teachers.{role}.cache"
    for split in splits:
        if split not in run.data:
            raise RecipeError(f"{key}.splits: the data has no split {split!r}; it has: {', '.join(run.data.splits)}")
        if run.data.size(split) is None:
            raise RecipeError(f"{key}: the split {split!r} is a stream, whose samples have no place to be kept under")
        if len({_digest_of(run.data, split, 0, seed) for seed in range(3)}) > 1:
            raise RecipeError(f"{key}: the samples of split {split!r} come out differently each time: a random "
                              "transform in the data set. Hand it over as `augment` and set `cache.views`")  # fmt: skip
    if run.data.augment is not None and not views:
        raise RecipeError(f"{key}: the data augments every sample at random, and what the teacher says of one picture "
                          "does not hold for another. Set `cache.views`: so many augmented views of each sample are "
                          "kept, and seen again in turn; or switch the augmentation off")  # fmt: skip
    if run.data.augment is None and views:
        raise RecipeError(f"{key}.views: the data is not augmented: leave it out")


class FillCache(Stage):
    """Asks the teacher about every sample of the splits, in shards that the processes share.

    A shard is on disk whole or not at all: what was killed goes on with those that are missing or damaged. (A stage for
    those who watch; what it leaves belongs to no run.)
    """

    def __init__(self, run: Run, role: str, teacher: Model, options: CacheOptions) -> None:
        self.name = f"{role}-cache"
        self.run, self.role, self.teacher, self.options = run, role, teacher, options
        self.batch_size = run.recipe.train.eval_batch_size or run.recipe.train.batch_size
        self.encoder = Encoder(teacher.to(run.device), options)
        self.identity = self._identity()
        self.key = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.path = cache_root(options) / self.key

    def _identity(self) -> dict[str, Any]:
        """All that a cache's content depends on; but for the samples, of which a few are looked at."""
        run, spec = self.run, self.run.recipe.teachers.get(self.role)
        made, data = (run.resolved.options.get(key) for key in (f"teachers.{self.role}", "data"))
        return {
            "format": folder.FORMAT,
            "teacher": spec.use if spec else type(self.teacher.module).__qualname__,
            "made": made.model_dump(mode="json", exclude={"checkpoint"}) if made else {},
            "weights": weights_digest(self.teacher),
            "data": data.model_dump(mode="json") if data else {},
            "samples": {split: _some_digests(run.data, split) for split in self.options.splits},
            "precision": run.recipe.train.precision,
            "options": self.options.model_dump(mode="json", exclude={"folder", "filled"}),
        }

    def fill(self) -> None:
        """Fill the cache, unless it is filled.

        Raises:
            RunFailed: if the disk has too little room.
            Interrupted: after a signal; the shards that were written stay.
        """
        run, lock = self.run, FileLock(self.path / ".lock")
        with run.together(), _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if run.accelerator.is_main_process:
                _acquire(lock)
        try:
            self.shards = self._divide()
            missing = {key: rows for key, rows in self.shards.items() if not self._whole(*key)}
            run.accelerator.wait_for_everyone()  # all have looked before one writes
            if missing or not self._has_facts():
                self.total_steps = len(missing)
                with run.together():
                    self._announce(sum(map(len, missing.values())))
                with run.together(), _writing(self.path):
                    self._write_shards(missing)
                with run.together(), _writing(self.path):
                    if run.accelerator.is_main_process:
                        self._write_facts()
        finally:
            lock.release()
        self.teacher.to("cpu")

    def _divide(self) -> dict[tuple[str, int], range]:
        """The rows of each shard, by split and number; how many depends on the first samples alone."""
        found: dict[tuple[str, int], range] = {}
        for split in self.options.splits:
            size = cast(int, self.run.data.size(split))
            first = range(min(size, 2))
            each = next(self._asked(split, first))[1].bytes // len(first)
            step, total = max(1, min(_SHARD_ROWS, _SHARD // max(each, 1))), size * max(self.options.views, 1)
            found |= {(split, n): range(n * step, min((n + 1) * step, total)) for n in range(-(-total // step))}
        return found

    def _announce(self, missing: int) -> None:
        """Tell size and time, from the time of a batch."""
        run, split = self.run, self.options.splits[0]
        size = min(self.batch_size, run.data.size(split) or 1)
        start = time.perf_counter()
        count = next(self._asked(split, range(size)))[1].bytes / size
        each = (time.perf_counter() - start) / size
        rows = sum(map(len, self.shards.values()))
        seconds = each * missing / run.accelerator.num_processes
        self.note = f"{missing} of {rows} rows to be made, {_size(count * rows)}, about {seconds:.0f} s: {self.path}"
        logger.info("%s: %s", self.name, self.note)
        run.notify("kd_stage_started", stage=self)
        if count * missing > (free := shutil.disk_usage(self.path).free):
            raise RunFailed(f"the cache of teacher {self.role!r} takes {_size(count * missing)} more, and "
                            f"{self.path} has room for {_size(free)}: `logits: top-k`, a smaller `dtype` or "
                            "another `folder` help")  # fmt: skip

    def _write_shards(self, missing: Mapping[tuple[str, int], range]) -> None:
        run, rank, world = self.run, self.run.accelerator.process_index, self.run.accelerator.num_processes
        with run.signals() as signals:
            for number, ((split, shard), rows) in enumerate(missing.items()):
                if number % world != rank:
                    continue
                self._write(shard_path(self.path, split, shard), split, rows)
                run.notify("kd_step_finished", stage=self, step=number + 1, terms={})
                if signals:
                    raise Interrupted(f"interrupted while the cache of teacher {self.role!r} was filled; what is there "
                                      "stays, and the same command goes on from here")  # fmt: skip

    def _write(self, path: Path, split: str, rows: range) -> None:
        from datasets import Dataset, Features, Value

        columns: dict[str, list[Any]] = {}
        facts: dict[str, Any] = {"rows": len(rows), "bytes": 0, "units": 0}
        start = time.perf_counter()
        for digests, found in self._asked(split, rows):
            for name, values in {DIGEST: digests, **found.rows()}.items():
                columns.setdefault(name, []).extend(values)
            if facts.setdefault("shape", found.shape) != found.shape:
                raise DataError(f"the cache of teacher {self.role!r}: what it says of different samples of split "
                                f"{split!r} differs in shape; only what is given by token may")  # fmt: skip
            facts |= {"bytes": facts["bytes"] + found.bytes, "units": facts["units"] + found.units}
            facts.setdefault("errors", found.errors)
        kinds = {name: Value("int64" if name == DIGEST else "large_binary") for name in columns}
        temporary = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(str(temporary))
        folder.commit(temporary, path, {**facts, "seconds": time.perf_counter() - start}, self.key)

    def _asked(self, split: str, rows: range) -> Iterator[tuple[list[int], Encoded]]:
        """The digests of samples, and what the teacher says of them, batch after batch; errors with the first."""
        run, data = self.run, self.run.data
        numbers = [divmod(row, cast(int, data.size(split))) for row in rows]
        batches = [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]
        samples = Keyed(data[split], data.keys, VIEWS, data.augment if self.options.views else None)
        loader = DataLoader(samples, batch_sampler=cast(Any, batches), collate_fn=_Noting(data.collator(split)),
                            num_workers=run.recipe.train.workers, generator=torch.Generator())  # fmt: skip
        for number, batch in enumerate(loader):
            digests = batch.pop(DIGEST)
            batch = to_device(batch, run.device)
            with torch.no_grad(), run.accelerator.autocast():
                outputs = self.teacher(batch)
                yield digests, self.encoder(outputs, batch, digests, measure=number == 0)

    def _whole(self, split: str, number: int) -> bool:
        path = shard_path(self.path, split, number)
        if not path.exists():
            return False
        try:
            folder.verify(path, self.key)
        except RunFolderError as error:
            logger.warning("%s; the teacher is asked again", error)
            return False
        return True

    def _has_facts(self) -> bool:
        try:
            if self.options.logits == "hidden":
                folder.verify(self.path / HEAD)
            return bool(read_facts(self.path))
        except RunFolderError:
            return False

    def _write_facts(self) -> None:
        """Put together what the shards say, as the last thing: a cache with facts is filled."""
        told = {key: folder.verify(shard_path(self.path, *key), self.key) for key in self.shards}
        shapes = [facts["shape"] for facts in told.values()]
        if any(shape != shapes[0] for shape in shapes):
            raise DataError(f"the cache of teacher {self.role!r}: what it says of different samples differs in shape")
        units = sum(facts["units"] for facts in told.values())
        labels, errors = self.teacher.labels, [facts["errors"] for facts in told.values()]
        self.encoder.save_head(self.path / HEAD)
        folder.write_sealed(self.path / FACTS, {
            "role": self.role, **self.identity, **shapes[0],
            "labels": {"count": labels.count, "names": labels.names, "vocabulary": labels.vocabulary},
            "options": self.options.model_dump(mode="json"), "taps": self.encoder.taps, "views": self.options.views,
            "splits": {split: self.run.data.size(split) for split in self.options.splits},
            "shards": {s: [f["rows"] for (name, _), f in told.items() if name == s] for s in self.options.splits},
            "errors": {signal: {name: sum(e[signal][name] for e in errors) / len(errors) for name in found}
                       for signal, found in errors[0].items()},
            "bytes": (total := sum(facts["bytes"] for facts in told.values())), "bytes_per_unit": total / max(units, 1),
            "seconds": sum(facts["seconds"] for facts in told.values()),
        })  # fmt: skip


@dataclass
class _Noting:
    """Collates, and notes the digests of the samples before."""

    collate: Collate

    def __call__(self, drawn: list[Drawn]) -> Batch:
        digests = [sample_digest(one.sample) for one in drawn]
        return {**self.collate(drawn), DIGEST: digests}


def _size(count: float) -> str:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(f"{count / unit:.1f} {name}" for unit, name in units if count >= unit or unit == 1e3)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Inside, what storage refuses is told as such."""
    try:
        yield
    except Exception as error:
        if not (problem := disk_problem(error)) and not isinstance(error, OSError):
            raise
        raise RunFailed(f"the cache {path} cannot be written: {problem or error}. What is there is whole: name another "
                        "`cache.folder`, or make room and give the same command again") from error  # fmt: skip


def _acquire(lock: FileLock) -> None:
    """Lock a cache, after another run that fills it."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.warning("another run fills %s; waiting for it", Path(lock.lock_file).parent)
        lock.acquire()


def cache_root(options: CacheOptions) -> Path:
    """Where caches lie."""
    from platformdirs import user_cache_path

    return Path(options.folder).expanduser() if options.folder else user_cache_path("kd", appauthor=False) / "teachers"


def weights_digest(model: Model) -> str:
    """32 hexadecimal digits over the names, types, shapes and values of a model's parameters and buffers."""
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    found = hashlib.blake2b(digest_size=16)
    state = get_state_dict_offloaded_model(model.module) if model.placed else model.module.state_dict()
    for name, tensor in sorted(state.items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _some_digests(data: DataModule, split: str) -> list[int]:
    size = cast(int, data.size(split))
    return [_digest_of(data, split, i) for i in torch.linspace(0, size - 1, min(size, _LOOKED_AT)).long().tolist()]


def _digest_of(data: DataModule, split: str, index: int, seed: int = 0) -> int:
    with seeded(seed):
        return sample_digest(named_sample(data[split][index], data.keys))
