"""Teacher caches, read: what a teacher said of each sample, from disk, in place of the teacher.

A cache holds one row for each sample of a split, or one for each of its augmented views. `Joined` puts a sample's place
in the cache beside the sample, so that it follows it into subsets and other data modules; where samples become a batch,
their rows are read and become entries of the batch; `Cached` makes outputs of these. A row is read only for the input
that it was made of.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcore import folder
from kdcore.codecs import Sampled, TopK, unpack
from kdcore.errors import DataError, ModelError, RunFolderError
from kdcore.loading import HELD, IGNORE, TARGET_KEYS, derive_seed, named_sample, read_many
from kdcore.models import Batch, Labels, Model, Outputs

FACTS = "cache.json"
HEAD = "head"
DIGEST = "digest"
VIEWS = "views"
"""What augmentation is seeded by, with view and position, where it is to be replayed."""
_NOT_INPUTS = frozenset([*TARGET_KEYS, "index", HELD])
_CHECKED = 8
"""Batches whose inputs are held against those that rows were read for; who changes inputs, does so from the start."""


def read_facts(path: Path) -> dict[str, Any]:
    """What is known of a filled cache.

    Raises:
        RunFolderError: if there is none, or it is damaged.
    """
    return folder.read_sealed(path / FACTS)


def shard_path(path: Path, split: str, number: int) -> Path:
    """A shard of a cache: a `datasets.Dataset`, saved."""
    return path / split / f"{number:06d}"


def view_seed(view: int, position: int) -> int:
    """By which the view of a sample is augmented, for the cache and again from it."""
    return derive_seed(VIEWS, view, position)


def sample_digest(sample: Mapping[str, Any]) -> int:
    """63 bits over a sample's inputs: everything but its targets."""
    found = xxhash.xxh3_64()
    for key in sorted(sample):
        if key not in _NOT_INPUTS:
            found.update(key.encode())
            _feed(found.update, sample[key])
    return found.intdigest() >> 1


def _feed(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        update(f"{value.dtype.char}{value.shape}".encode())
        update(value if value.flags.c_contiguous and value.size else value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            update(str(key).encode())
            _feed(update, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(update, item)
    else:
        plain = isinstance(value, str | bytes | int | float | None)
        update((repr(value) if plain else type(value).__qualname__).encode())


class Reader:
    """The rows of one split, memory-mapped.

    Args:
        path: the cache's folder.
        facts: what `read_facts` says of it.
        split: which.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], split: str) -> None:
        from datasets import concatenate_datasets, load_from_disk

        self.split, self.views, self.arrays = split, int(facts["views"]), facts["arrays"]
        self.size = int(facts["splits"][split])
        shards = sorted((path / split).glob("[0-9]*[0-9]"))
        if sum(facts["shards"][split]) != self.size * max(self.views, 1) or len(shards) != len(facts["shards"][split]):
            raise RunFolderError(f"{path / split} is damaged: shards are missing")
        self.data = concatenate_datasets([load_from_disk(str(shard)) for shard in shards]).with_format("arrow")

    def read(self, role: str, rows: list[int], samples: Sequence[Mapping[str, Any]]) -> Callable[[Batch], Batch]:
        """The rows of some samples; the entries that they are in their batch.

        Raises:
            DataError: if a sample is not the one that the teacher saw.
        """
        table = self.data[rows]
        for row, sample, digest in zip(rows, samples, table[DIGEST].to_pylist(), strict=True):
            if sample_digest(sample) != digest:
                raise DataError(f"sample {row % self.size} of split {self.split!r} is not what the teacher {role!r} "
                                "saw when its cache was filled: the data or its transform has changed. Fill another "
                                "cache: leave `cache.filled` out, or give another `cache.folder`")  # fmt: skip

        def entries(batch: Batch) -> Batch:
            found = {name: _tensor(table[name], spec, batch, role) for name, spec in self.arrays.items()}
            return {f"{role}.{name}": value for name, value in {**found, "inputs": input_sums(batch)}.items()}

        return entries


def _tensor(column: Any, spec: Mapping[str, Any], batch: Batch, role: str) -> Tensor:
    """A column of bytes as a tensor `[B, ...]`; values by position go where the batch has that position."""
    raw = bytearray(b"".join(column.to_pylist()))
    shape, dtype = list(spec["shape"]), getattr(torch, spec["dtype"])
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    if spec["along"] is None:
        return flat.view(len(column), *shape)
    where, flat = positions(batch, spec["along"]), flat.view(-1, *shape)
    if int(where.sum()) != len(flat):
        raise DataError(f"the cache of teacher {role!r} holds {len(flat)} positions of a batch that has "
                        f"{int(where.sum())}: it is of texts that were cut or joined in another way")  # fmt: skip
    found = flat.new_zeros(*where.shape, *shape)
    found[where] = flat
    return found


def positions(batch: Batch, along: str) -> Tensor:
    """Which positions `[B, T]` a cache holds: tokens that are no padding, or labels that count."""
    if along == "labels":
        return cast(Tensor, batch["labels"] != IGNORE)
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def input_sums(batch: Batch) -> Tensor:
    """A number for each row of a batch's inputs, `[B]`: to tell whether they are still the same."""
    size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
    tensors = [v for k, v in sorted(batch.items()) if k not in _NOT_INPUTS and "." not in k
               and isinstance(v, Tensor) and len(v) == size]  # fmt: skip
    total = torch.zeros(size, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    for tensor in tensors:
        flat = tensor.reshape(size, -1)
        if not tensor.is_floating_point():  # the order of tokens counts
            flat = flat.double() * torch.arange(1, flat.shape[1] + 1, device=flat.device).double().sqrt()
        total += flat.sum(1, dtype=torch.float64)
    return total


@dataclass(slots=True)
class Place:
    """Where caches hold what teachers say of a sample.

    Args:
        readers: by role.
        views, size: of each cache: augmented views of a sample, and samples.
        position: of the sample in its split.
        row: of the caches; `None` where they hold no such row.
    """

    readers: Mapping[str, Reader]
    views: int
    size: int
    position: int
    row: int | None = None

    def seed(self, epoch: int) -> int | None:
        """As `kdcore.loading.Held`."""
        return view_seed(epoch % self.views, self.position) if self.views else None

    def at(self, epoch: int | None) -> Place:
        """As `kdcore.loading.Held`."""
        row = None
        if (epoch is None) != bool(self.views):
            row = self.position if epoch is None else epoch % self.views * self.size + self.position
        return Place(self.readers, self.views, self.size, self.position, row)

    def read(self, held: Sequence[Place], samples: Sequence[Mapping[str, Any]]) -> Callable[[Batch], Batch]:
        """As `kdcore.loading.Held`: nothing where one of the samples has no row."""
        rows = [place.row for place in held if place.row is not None and place.readers is self.readers]
        if len(rows) < len(samples):
            return lambda batch: {}
        made = [reader.read(role, rows, samples) for role, reader in self.readers.items()]
        return lambda batch: {k: v for entries in made for k, v in entries(batch).items()}


class Joined(Dataset[Any]):
    """A split whose samples know their place in the caches of teachers; in all else the split that it is given."""

    def __init__(self, split: Any, keys: Sequence[str], readers: Mapping[str, Reader]) -> None:
        self.split, self.keys, self.readers = split, keys, readers
        first = next(iter(readers.values()))
        self.views, self.size = first.views, first.size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return self.split[index]
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        samples = [named_sample(sample, self.keys) for sample in read_many(self.split, indices)]
        for sample, index in zip(samples, indices, strict=True):
            sample[HELD] = Place(self.readers, self.views, self.size, index)
        return samples

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "split":
            raise AttributeError(name)
        return getattr(self.split, name)


class Cached(nn.Module):
    """A teacher whose outputs are read from a cache: its signals for batches of `Joined` samples.

    Batches that the cache does not hold, such as those of another split, are given to the teacher itself, and what is
    asked of it otherwise (its modules, what it writes) is asked of the teacher itself.

    Args:
        role: of the teacher.
        path: the cache's folder.
        facts: what `read_facts` says of it.
        live: gives the teacher itself.
    """

    hint = "; it is read from a cache: fill one with `kd cache`, `--embedding` and `--taps` say what it holds"
    """How to get what is missing."""

    def __init__(self, role: str, path: Path, facts: Mapping[str, Any], live: Callable[[], Model]) -> None:
        super().__init__()
        self.role, self.facts, self.path = role, facts, path
        given = facts["labels"]
        self.labels = Labels(given["count"], given["names"] and tuple(given["names"]), given["vocabulary"])
        self.decoder = _decoder(path, facts)
        self.register_buffer("place", torch.empty(0), persistent=False)  # where the outputs are wanted
        self._live, self._patterns, self._taps = functools.cache(live), dict[str, None](), dict[str, None]()
        self._checks = 0

    def forward(self, batch: Batch) -> Outputs:
        """The outputs of a batch, from the entries that were read with it."""
        prefix = f"{self.role}."
        arrays = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
        if not arrays:
            return cast(Outputs, self.live()(batch))
        self._check(batch, arrays.pop("inputs"))
        outputs = Outputs()
        if part := _part(arrays, "embedding"):
            outputs.embedding = unpack(part)
        if part := _part(arrays, "logits"):
            self._add_logits(outputs, part)
        outputs.features = {name: unpack(_part(arrays, f"feature {name}")) for name in self._taps}
        return outputs

    def _add_logits(self, outputs: Outputs, part: dict[str, Tensor]) -> None:
        match self.facts["options"]["logits"]:
            case "all":
                outputs.logits = unpack(part)
            case "hidden":
                outputs.embedding, outputs.head = unpack(part), self.decoder
            case _:
                decoder = cast("TopK | Sampled", self.decoder)
                outputs.head, outputs.codes = decoder, decoder.codes(part)
                if self.facts["map"]:
                    outputs.logits = decoder(outputs.codes).movedim(-1, 1)

    def _check(self, batch: Batch, sums: Tensor) -> None:
        if self._checks < _CHECKED and not torch.allclose(input_sums(batch), sums, rtol=1e-4, atol=1e-5):
            raise ModelError(f"the method changes what the teacher {self.role!r} is given (it makes, mixes or noises "
                             "its inputs); the cache holds what it said of the data: leave `cache` out")  # fmt: skip
        self._checks += 1

    def live(self) -> Model:
        """The teacher itself, frozen."""
        model = self._live().freeze().to(self.place.device)
        model.tap(*self._patterns)
        return model

    def tap(self, *patterns: str) -> list[str]:
        """The names of the cached activations that match, as `Model.tap`.

        Raises:
            ModelError: if the cache does not hold them.
        """
        known: dict[str, list[str]] = self.facts["taps"]
        held = [name for names in known.values() for name in names]
        found: list[str] = []
        for pattern in patterns:
            names = known.get(pattern) or [name for name in held if fnmatch.fnmatchcase(name, pattern)]
            if not names:
                raise ModelError(f"the cache of teacher {self.role!r} holds {', '.join(self.holds)}, not {pattern}: "
                                 f"fill one with `kd cache --taps {pattern}`")  # fmt: skip
            found += names
        self._patterns |= dict.fromkeys(patterns)
        self._taps |= dict.fromkeys(found)
        return list(dict.fromkeys(found))

    @property
    def holds(self) -> list[str]:
        """What the cache holds, for people."""
        options = self.facts["options"]
        what = [] if options["logits"] == "none" else ["logits"]
        what += ["embedding"] if options["embedding"] or options["logits"] == "hidden" else []
        return [*what, *(name for names in self.facts["taps"].values() for name in names)]

    def freeze(self) -> Cached:
        """Nothing to freeze; returns itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        return getattr(self.live(), name)


def _part(arrays: Mapping[str, Tensor], signal: str) -> dict[str, Tensor]:
    prefix = f"{signal}."
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _decoder(path: Path, facts: Mapping[str, Any]) -> nn.Module | None:
    """What makes logits of what is held, where that is not the logits."""
    match facts["options"]["logits"]:
        case "top-k":
            return TopK(int(facts["classes"]))
        case "sampled":
            return Sampled(int(facts["classes"]))
        case "hidden":
            from safetensors.torch import load_file

            folder.verify(path / HEAD)
            weights = load_file(path / HEAD / "model.safetensors")
            outputs, inputs = weights["weight"].shape
            head = nn.Linear(inputs, outputs, bias="bias" in weights)
            head.load_state_dict(weights)
            return head.requires_grad_(False)
    return None
