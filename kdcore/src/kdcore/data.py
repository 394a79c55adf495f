"""Data: splits, the task they pose, and loaders whose order depends on the seed and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from kdcore.errors import DataError, did_you_mean
from kdcore.loading import IGNORE as IGNORE
from kdcore.loading import TARGET_KEYS as TARGET_KEYS
from kdcore.loading import Collate, Keyed, Steps, Stream, permutation, share
from kdcore.loading import derive_seed as derive_seed
from kdcore.loading import named_sample as named_sample
from kdcore.loading import seeded as seeded
from kdcore.models import Batch, Labels, map_tensors

BATCH_KEYS: dict[str, str] = {
    "image": "float [B, C, H, W] in [0, 1]; each model normalises its own input",
    "label": "int [B], or float [B, C] (multilabel) or [B] (regression)",
    "mask": "int [B, H, W]: the class of each pixel",
    "input_ids": "int [B, T]",
    "attention_mask": "int [B, T]: 1 where there is a token",
    "token_type_ids": "int [B, T]",
    "position_ids": "int [B, T]: given for rows that hold several texts; 0 where one begins, and then no mask",
    "labels": "int [B, T], aligned with the logits: position t holds what logits[:, t] should predict",
    "decoder_input_ids": "int [B, T]",
    "ranked_input_ids": "int [B, K, T]: K answers to a prompt with the prompt, the best one first",
    "ranked_attention_mask": "int [B, K, T]",
    "ranked_labels": "int [B, K, T], aligned like `labels`",
    "text": "list of B strings",
    "prompt": "list of B strings: what is to be answered",
    "completion": "list of B strings: the answer of the data",
    "video": "float [B, T, C, H, W] in [0, 1]",
    "audio": "float [B, T]",
    "imu": "float [B, T, C]",
    "series": "float [B, T, C]",
    "graph": "a graph object of the provider",
    "latents": "float [B, C, H, W]: images as a diffusion model's encoder gives them",
    "prompt_embeds": "float [B, T, D]: texts as its text encoders give them",
    "subclass": "int [B]: hidden subclasses, for analysis only",
    "index": "int [B]: the position of each sample in its split; always there",
}
"""The conventional keys of a batch. Ignored targets are `IGNORE` in all of them."""

TaskKind = Literal["classification", "multilabel", "segmentation", "token-classification", "causal-lm", "masked-lm",
                   "seq2seq", "regression", "unlabelled"]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What the data asks of a model.

    Args:
        kind: decides the default metrics and the heads of models.
        classes: class names in label order; may be empty where only their number is known.
        num_classes: number of classes, or the size of the vocabulary. Default: as many as `classes`.
        image: (channels, height, width) of the images, where they are all alike.
        tokenizer: the tokenizer behind `input_ids`, where there is one; anything with `decode(ids)`.
        vocabulary: its fingerprint.
    """

    kind: TaskKind
    classes: tuple[str, ...] = ()
    num_classes: int | None = None
    image: tuple[int, int, int] | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False)
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        if self.num_classes is None and self.classes:
            object.__setattr__(self, "num_classes", len(self.classes))

    @property
    def labels(self) -> Labels:
        """What the logits of a model for this task mean."""
        return Labels(self.num_classes, self.classes or None, self.vocabulary)

    @property
    def class_count(self) -> int:
        """The number of classes, for certain. Raises `DataError` where the task has none."""
        if self.num_classes is None:
            raise DataError(f"the data poses a task of kind {self.kind!r} without a number of classes")
        return self.num_classes


class DataModule:
    """Splits, how their samples become batches, and the task.

    Args:
        splits: map-style or iterable data sets by name; `train` is trained on. A sample is a dict, or a tuple whose
            entries are named by `keys`.
        task: what is asked of a model.
        collate: samples -> batch. Default: torch's.
        augment: `sample -> sample`, applied to the training split only. It may draw from torch's, Python's and NumPy's
            global generators: they are seeded by (seed, epoch, index) around it.
        keys: names of the entries of tuple samples.
        orders: for a split, `epoch -> indices`, where not every sample is to come once in random order.
    """

    def __init__(
        self,
        splits: Mapping[str, Any],
        task: Task,
        *,
        collate: Callable[[list[Any]], Batch] = default_collate,
        augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        keys: Sequence[str] = ("image", "label"),
        orders: Mapping[str, Callable[[int], Sequence[int]]] | None = None,
    ) -> None:
        self.splits = dict(splits)
        self.task = task
        self.collate = collate
        self.augment = augment
        self.keys = tuple(keys)
        self.orders = dict(orders or {})
        for name, split in self.splits.items():
            if isinstance(split, Sized) and len(split) == 0:
                raise DataError(f"the split {name!r} is empty")

    def __getitem__(self, name: str) -> Any:
        """The data set of a split. Raises `DataError` where there is none of this name."""
        if name not in self.splits:
            raise DataError(f"the data has no split {name!r}; {did_you_mean(name, self.splits, 'splits')}")
        return self.splits[name]

    def __contains__(self, name: str) -> bool:
        return name in self.splits

    def size(self, name: str) -> int | None:
        """Samples in a split; `None` for a stream."""
        split = self[name]
        return None if isinstance(split, IterableDataset) or not hasattr(split, "__len__") else len(split)

    def labels(self, name: str) -> Tensor:
        """The `label` of every sample of a split, `[N]`; read from the column by itself where the data set can give
        one (`column(name)`), or else from all samples.

        Raises:
            DataError: for a stream, or samples without labels.
        """
        split, size = self[name], self.size(name)
        if size is None:
            raise DataError(f"the split {name!r} is a stream: its labels are not known beforehand")
        try:
            read = getattr(split, "column", None)
            found = read("label") if read else [named_sample(split[i], self.keys)["label"] for i in range(size)]
        except KeyError:
            raise DataError(f"the samples of split {name!r} have no label") from None
        return found if isinstance(found, Tensor) else torch.stack([torch.as_tensor(value) for value in found])

    def steps_per_epoch(self, name: str, batch_size: int) -> int | None:
        """Whole batches in a split, at least one; `None` for a stream. What is left over waits for another epoch."""
        size = self.size(name)
        return None if size is None else max(1, size // batch_size)

    def share_sizes(self, name: str, batch_size: int, accumulation: int, world: int) -> list[tuple[int, ...]]:
        """The samples that each process holds of each micro-batch of a training step: they differ where a split has
        less than a batch, or an odd one."""
        size, parts = min(batch_size, self.size(name) or batch_size), accumulation * world
        sizes = [len(share(range(size), part, parts)) for part in range(parts)]
        return [tuple(sizes[i : i + world]) for i in range(0, parts, world)]

    def sample(self, name: str, size: int = 2) -> Batch:
        """The first samples of a split as a batch: for shapes, checks and measurements."""
        if (total := self.size(name)) is None:
            return cast(Batch, next(iter(self.eval_loader(name, size))))
        first = [(0, index) for index in range(min(size, total))]
        return self.collator(name)(self._keyed(self[name], 0, None).__getitems__(first))

    def eval_loader(
        self, name: str, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> DataLoader[Any]:
        """Every sample of a split once, in order, without augmentation; this process's share of them."""
        split = self[name]
        if self.size(name) is None:
            stream = Stream(
                self._keyed(split, 0, None), self.collator(name), batch_size * world, [(rank, world)], last=1
            )
            return DataLoader(stream, batch_size=None, generator=torch.Generator())
        indices = [(0, i) for i in range(len(split))][rank::world]
        keyed = self._keyed(split, 0, None)
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        return DataLoader(keyed, batch_sampler=cast(Any, batches), collate_fn=self.collator(name),
                          num_workers=workers, generator=torch.Generator())  # fmt: skip

    def train_loader(
        self, name: str, batch_size: int, *, seed: int, start: int, stop: int, accumulation: int = 1,
        rank: int = 0, world: int = 1, workers: int = 0, augment: bool = True, pin_memory: bool = False,
    ) -> DataLoader[Any]:  # fmt: skip
        """The micro-batches of steps `start` to `stop`: `accumulation` of them per step, this process's share of each.

        Step s is the same batch of the same augmented samples whatever came before it, and the shares of all
        processes and micro-batches together are the batch that one process would see.
        """
        split = self[name]
        shares = [(micro * world + rank, world * accumulation) for micro in range(accumulation)]
        transform = self.augment if augment else None
        if self.size(name) is None:
            stream = Stream(self._keyed(split, seed, transform), self.collator(name), batch_size, shares, start=start)
            return DataLoader(stream, batch_size=None, generator=torch.Generator())
        if len(split) < len(shares) * world:
            raise DataError(
                f"the split {name!r} has {len(split)} samples: too few for {len(shares) * world} micro-batches"
            )
        order: Callable[[int], Any] = self.orders.get(name) or (
            lambda epoch: permutation(len(split), derive_seed(seed, name, epoch))
        )
        return DataLoader(
            self._keyed(split, seed, transform),
            batch_sampler=Steps(len(split), batch_size, order, shares, start, stop),
            collate_fn=self.collator(name),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # of its own: a loader draws a seed when it is iterated
        )

    def collator(self, name: str) -> Collate:
        """What makes batches of a split's samples."""
        return Collate(self.collate, name, self.task.num_classes)

    def _keyed(self, split: Any, seed: int, augment: Callable[[Any], Any] | None) -> Keyed:
        return Keyed(split, self.keys, seed, augment)


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits over every token and its id (`tokenizer.get_vocab()`)."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).hexdigest()


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device, and whatever else knows how to go there (a graph, say); copies from
    pinned memory do not block."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if not isinstance(batch, Tensor) and hasattr(batch, "to"):
        return batch.to(device)
    return map_tensors(batch, lambda t: t if t.device == device else t.to(device, non_blocking=True))
