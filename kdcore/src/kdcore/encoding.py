"""What a teacher says of a batch, as a cache holds it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import codecs, folder
from kdcore.cache import positions
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch, Model, Outputs
from kdcore.options import CacheOptions


@dataclass
class Encoded:
    """The arrays of a batch.

    Args:
        arrays: by signal and part, such as `logits.ids`: `[B, ...]`, or by position `[N, ...]`.
        along: for those by position, what the positions are of: `input` or `labels`.
        counts: positions of each sample, by what they are of.
        classes: the number of classes, where logits are held.
        map: whether the logits are `[B, C, H, W]`.
        errors: by signal: how far what is decoded is off.
    """

    size: int
    arrays: dict[str, Tensor] = field(default_factory=dict)
    along: dict[str, str] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    classes: int | None = None
    map: bool = False
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    @property
    def units(self) -> int:
        """Positions, or samples."""
        return sum(next(iter(self.counts.values()))) if self.counts else self.size

    @property
    def shape(self) -> dict[str, Any]:
        """What has to be alike for all batches."""
        arrays = {name: {"dtype": str(a.dtype).removeprefix("torch."), "shape": list(a.shape[1:]),
                         "along": self.along.get(name)} for name, a in self.arrays.items()}  # fmt: skip
        return {"arrays": arrays, "classes": self.classes, "map": self.map}

    def rows(self) -> dict[str, list[Any]]:
        """The bytes of each sample, by array."""
        found = {}
        for name, array in self.arrays.items():
            counts = self.counts[self.along[name]] if name in self.along else [1] * self.size
            found[name] = [_bytes(part) for part in torch.split(array.cpu(), counts)]
        return found

    def add(self, signal: str, parts: Mapping[str, Tensor], batch: Batch) -> None:
        """Add the arrays of a signal, `[B, ...]` each; of tokens, those that count."""
        for part, array in parts.items():
            name, along = f"{signal}.{part}", _along(array, batch)
            if along is not None:
                where = positions(batch, along)
                if len(where) != len(batch["index"]):
                    raise DataError("a cache has rows of a sample each, and this data joins several in a row of a "
                                    "batch: switch that off (`padding_free: false`)")  # fmt: skip
                array, self.along[name], self.counts[along] = array[where], along, where.sum(1).tolist()
            elif len(array) != self.size:
                raise ModelError(f"the {signal} of the teacher do not come by sample: {list(array.shape)} for a batch "
                                 f"of {self.size}; they cannot be cached")  # fmt: skip
            self.arrays[name] = array


class Encoder:
    """Turns outputs of a teacher into arrays.

    Args:
        teacher: the model; its taps are set.
        options: what is held, and how.
    """

    def __init__(self, teacher: Model, options: CacheOptions) -> None:
        self.teacher, self.options = teacher, options
        self.taps = {pattern: teacher.tap(pattern) for pattern in options.taps}
        self.head: nn.Linear | None = None

    def __call__(self, outputs: Outputs, batch: Batch, seeds: Sequence[int], *, measure: bool) -> Encoded:
        """The arrays of a batch's outputs; with `measure`, also how far they are off.

        Args:
            seeds: of each sample, for what is drawn.
        """
        found = Encoded(len(batch["index"]))
        if self.options.logits != "none":
            self._add_logits(found, outputs, batch, seeds, measure)
        tensors: dict[str, Any] = {"embedding": outputs.need("embedding")} if self.options.embedding else {}
        tensors |= {f"feature {n}": outputs.features.get(n) for names in self.taps.values() for n in names}
        for signal, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ModelError(f"the {signal} of the teacher is no tensor and cannot be cached")
            self._add_tensor(found, signal, tensor, batch, measure)
        return found

    def _add_tensor(self, found: Encoded, signal: str, tensor: Tensor, batch: Batch, measure: bool) -> None:
        parts = codecs.pack(tensor, self.options.dtype)
        found.add(signal, parts, batch)
        if measure:
            found.errors[signal] = codecs.tensor_error(tensor, codecs.unpack(parts))

    def _add_logits(self, found: Encoded, outputs: Outputs, batch: Batch, seeds: Sequence[int], measure: bool) -> None:
        logits, options = outputs.need("logits"), self.options
        found.map = logits.ndim == 4
        rows = logits.movedim(1, -1) if found.map else logits
        found.classes = rows.shape[-1]
        if options.logits in ("top-k", "sampled") and options.kept >= found.classes:
            raise ModelError(f"cache.k: the teacher has {found.classes} classes, and {options.kept} are as good as "
                             "all: take `logits: all`")  # fmt: skip
        decoder: nn.Module
        match options.logits:
            case "all":
                parts = codecs.pack(logits, options.dtype)
                decoded = codecs.unpack(parts).movedim(1, -1) if found.map else codecs.unpack(parts)
            case "top-k":
                parts, decoder = codecs.top_k(rows, options.kept, options.dtype), codecs.TopK(found.classes)
                decoded = decoder(decoder.codes(parts)) if measure else rows
            case "sampled":
                offsets = torch.stack([_offsets(rows.shape[1:-1], seed) for seed in seeds]).to(rows.device)
                parts, decoder = codecs.sample(rows, options.kept, offsets), codecs.Sampled(found.classes)
                decoded = decoder(decoder.codes(parts)) if measure else rows
            case _:
                hidden = outputs.need("embedding")
                self.head = self.head or self._find_head(outputs, hidden, rows)
                parts = codecs.pack(hidden, options.dtype)
                decoded = self.head(codecs.unpack(parts).to(self.head.weight.dtype)) if measure else rows
        found.add("logits", parts, batch)
        if measure:
            found.errors["logits"] = codecs.logit_error(rows, decoded)

    def _find_head(self, outputs: Outputs, hidden: Tensor, logits: Tensor) -> nn.Linear:
        """The last layer. Raises `ModelError` if the logits are not what it makes of the embedding."""
        head = outputs.head if isinstance(outputs.head, nn.Linear) else self.teacher.head[1]
        if not isinstance(head, nn.Linear) or not _makes(head, hidden, logits):
            raise ModelError("cache.logits: `hidden` needs logits that one linear layer makes of the embedding, and "
                             "this teacher's are made in another way: take `all` or `top-k`")  # fmt: skip
        return head

    def save_head(self, path: Path) -> None:
        """Write the last layer, where the logits are left to it."""
        if self.head is not None:
            from safetensors.torch import save_file

            temporary = path.with_name(f"{path.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            save_file({k: v.float().cpu().contiguous() for k, v in self.head.state_dict().items()},
                      temporary / "model.safetensors")  # fmt: skip
            folder.commit(temporary, path)


def _makes(head: nn.Linear, hidden: Tensor, logits: Tensor) -> bool:
    fits = head.in_features == hidden.shape[-1]
    return fits and torch.allclose(head(hidden).float(), logits.float(), rtol=1e-2, atol=1e-2)


def _along(array: Tensor, batch: Batch) -> str | None:
    """What the second dimension is of, where it is of tokens."""
    if array.ndim < 3 or "input_ids" not in batch:
        return None
    if "decoder_input_ids" in batch and array.shape[:2] == batch["labels"].shape:
        return "labels"
    return "input" if array.shape[:2] == batch["input_ids"].shape else None


def _offsets(shape: Sequence[int], seed: int) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed % 2**63))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
