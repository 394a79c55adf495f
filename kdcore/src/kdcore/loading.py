"""Samples into batches: by (epoch, index), the same whatever came before, whichever process asks."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from kdcore.errors import DataError
from kdcore.models import Batch

IGNORE = -100
"""The target value of positions that do not count, in every batch of every task."""

TARGET_KEYS = ("label", "mask", "labels")

HELD = "held"
"""Key of a split's sample for what a teacher cache holds of it. It comes into no batch."""


class Held(Protocol):
    """What caches hold of one sample: see `kdcore.cache`."""

    def seed(self, epoch: int) -> int | None:
        """By which the sample is to be augmented as it was for the cache; `None` where that is not said."""

    def at(self, epoch: int | None) -> Held:
        """The same of the sample as it is augmented in an epoch, or with `None` as it is."""

    def read(self, held: Sequence[Any], samples: Sequence[Mapping[str, Any]]) -> Callable[[Batch], Batch]:
        """Read what is held of samples before they are collated; the entries that it makes of their batch."""


class Drawn(NamedTuple):
    """A sample as it goes into a batch, its place in the split, and what caches hold of it."""

    sample: dict[str, Any]
    place: int
    held: Held | None


def derive_seed(*parts: object) -> int:
    """A seed that depends on all the parts and on nothing else, in `[0, 2**63)`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's (CPU), Python's and NumPy's global generators seeded inside, and as they were afterwards."""
    with _restored():
        _seed(seed)
        yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """The global generators afterwards as they were. (It takes 0.2 ms, most of it NumPy's: once for a batch.)"""
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def named_sample(sample: Any, keys: Sequence[str]) -> dict[str, Any]:
    """A sample by names: a mapping as it is, a tuple with these names for its entries."""
    named = type(sample) is dict or isinstance(sample, Mapping)
    return dict(sample) if named else dict(zip(keys, sample, strict=False))


@dataclass
class Collate:
    """Collates, and says what is wrong with samples that cannot be. (A class, so that worker processes can have it.)"""

    collate: Callable[[list[Any]], Batch]
    split: str
    classes: int | None

    def __call__(self, drawn: list[Drawn]) -> Batch:
        """The batch of some samples."""
        samples, places, held = (list(column) for column in zip(*drawn, strict=True))
        index = torch.tensor(places)
        entries = held[0].read(held, samples) if all(held) else None
        try:
            batch = self.collate(samples)
        except (TypeError, KeyError, RuntimeError) as error:
            raise DataError(f"samples of split {self.split!r} do not make a batch: {error}") from error
        for key in TARGET_KEYS:
            if self.classes and isinstance(target := batch.get(key), Tensor) and not target.is_floating_point():
                self._check(key, target, index, self.classes)
        return {**batch, **(entries(batch) if entries else {}), "index": index}

    def _check(self, key: str, target: Tensor, index: Tensor, classes: int) -> None:
        """Refuse classes that there are not: a loss would fail on them, or on an accelerator end the process."""
        low, high = target.aminmax()
        if int(low) >= 0 and int(high) < classes:
            return
        wrong = (target >= classes) | ((target < 0) & (target != IGNORE))
        if wrong.any():
            rows = wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
            where = index[rows] if len(rows) == len(index) else index  # a row of several texts
            raise DataError(f"split {self.split!r}, sample {int(where[0])}: {key} {int(target[wrong][0])}, but the "
                            f"{classes} classes are 0 to {classes - 1} ({IGNORE} is ignored)")  # fmt: skip


def read_many(split: Any, indices: list[int]) -> list[Any]:
    """Samples of a split, at once where it can (`__getitems__`, as torch's loader asks for them)."""
    at_once = getattr(split, "__getitems__", None)
    return list(at_once(indices)) if at_once else [split[index] for index in indices]


class Keyed(Dataset[Drawn]):
    """Samples by (epoch, index), augmented under generators seeded by (seed, epoch, index)."""

    def __init__(self, split: Any, keys: tuple[str, ...], seed: object, augment: Callable[[Any], Any] | None) -> None:
        self.split, self.keys, self.seed, self.augment = split, keys, seed, augment

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Drawn]:
        samples = read_many(self.split, [index for _, index in keys])
        return self.finish([(sample, *key) for sample, key in zip(samples, keys, strict=True)])

    def finish(self, found: Sequence[tuple[Any, int, int]]) -> list[Drawn]:
        """Samples of the split by (sample, epoch, index): augmented where they are to be."""
        with _restored() if self.augment is not None else contextlib.nullcontext():
            return [self._finish(*one) for one in found]

    def _finish(self, sample: Any, epoch: int, index: int) -> Drawn:
        sample = named_sample(sample, self.keys)
        held: Held | None = sample.pop(HELD, None)
        if self.augment is not None:
            replayed = held.seed(epoch) if held else None
            _seed(derive_seed(self.seed, epoch, index) if replayed is None else replayed)
            sample = dict(self.augment(sample))
        return Drawn(sample, index, held.at(None if self.augment is None else epoch) if held else None)


class Steps(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of each micro-batch from one step to another."""

    def __init__(self, size: int, batch_size: int, order: Callable[[int], Any],
                 shares: list[tuple[int, int]], start: int, stop: int) -> None:  # fmt: skip
        self.per_epoch = max(1, size // batch_size)
        self.batch_size, self.order, self.shares, self.start, self.stop = batch_size, order, shares, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, indices = -1, cast(Any, [])
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != current:
                current, indices = epoch, self.order(epoch)
            batch = indices[position * self.batch_size : (position + 1) * self.batch_size]
            for part, parts in self.shares:
                yield [(epoch, int(i)) for i in share(batch, part, parts)]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.shares)


class Stream(IterableDataset[Batch]):
    """Batches of an iterable data set, epoch after epoch; the samples before `start` are read and passed over."""

    def __init__(self, keyed: Keyed, collate: Collate, batch_size: int, shares: list[tuple[int, int]],
                 start: int = 0, last: int | None = None) -> None:  # fmt: skip
        self.keyed, self.collate = keyed, collate
        self.batch_size, self.shares, self.start, self.last = batch_size, shares, start, last

    def __iter__(self) -> Iterator[Batch]:
        step, epoch = 0, 0
        while self.last is None or epoch < self.last:
            if hasattr(self.keyed.split, "set_epoch"):
                self.keyed.split.set_epoch(epoch)
            group: list[tuple[int, Any]] = []
            for group in _groups(self.keyed.split, self.batch_size):
                if len(group) < self.batch_size and self.last is None:
                    continue
                if step >= self.start:
                    yield from self._batches(group, epoch)
                step += 1
            if not group or step == 0:
                raise DataError("the stream holds less than one batch of samples")
            epoch += 1

    def _batches(self, group: list[tuple[int, Any]], epoch: int) -> Iterator[Batch]:
        for part, parts in self.shares:
            if mine := share(group, part, parts):
                yield self.collate(self.keyed.finish([(sample, epoch, i) for i, sample in mine]))


def _groups(split: Any, size: int) -> Iterator[list[tuple[int, Any]]]:
    group: list[tuple[int, Any]] = []
    for pair in enumerate(split):
        group.append(pair)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def share(items: Any, part: int, parts: int) -> Any:
    """The part-th of `parts` contiguous pieces, as equal as can be."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def permutation(size: int, seed: int) -> np.ndarray[Any, Any]:
    """The numbers below `size` in an order that depends on the seed; 8 bytes each, which a list takes 36 for."""
    return cast("np.ndarray[Any, Any]", torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy())
