"""Several texts in one row: packed rows, and batches without padding.

`position_ids` start at 0 again with each text, and there is no `attention_mask`: by that a model sees them apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from kd_datasets.pictures import Sample
from kdcore.data import IGNORE
from kdcore.models import Batch

PACKED_KEYS = ("input_ids", "labels", "position_ids")


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of texts that fit into `capacity` tokens: the longest text first, each into the fullest group that has
    room (Ding et al. 2024, Fewer Truncations Improve Language Modeling). No text is longer than `capacity`.
    """
    groups: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once: what some group has left
    with_room: dict[int, list[int]] = {}  # room -> groups
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room = rooms[at]
            group = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        groups[group].append(i)
        if left := room - lengths[i]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(group)
    return groups


def alone(sample: Sample) -> Sample:
    """A sample whose tokens are told from their neighbours by `position_ids`, int `[T]`, and not by a mask."""
    rest = {key: value for key, value in sample.items() if key != "attention_mask"}
    return {**rest, "position_ids": torch.arange(len(sample["input_ids"]))}


def joined(samples: Sequence[Sample]) -> Sample:
    """The tokens of several samples end to end, `[sum of T]`. The last label of each is ignored already."""
    return {key: torch.cat([sample[key] for sample in samples]) for key in PACKED_KEYS}


def laid_out(samples: Sequence[Sample], pad: int, padding_free: bool) -> Batch:
    """A batch of samples with `position_ids`: int `[B, T]`, where the padding of a row is a text of its own at its end,
    or int `[1, sum of T]` without padding."""
    if padding_free:
        return {key: row[None] for key, row in joined(samples).items()}
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [joined([sample, _padding(longest - len(sample["input_ids"]), pad)]) for sample in samples]
    return {key: torch.stack([row[key] for row in rows]) for key in PACKED_KEYS}


def _padding(length: int, pad: int) -> Sample:
    ids = torch.full((length,), pad)
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "position_ids": torch.arange(length)}


class Packed(Dataset[Sample]):
    """Rows of several texts.

    Args:
        rows: samples of one text each, with `position_ids`.
        groups: the indices of the texts of each row.
    """

    def __init__(self, rows: Dataset[Sample], groups: list[list[int]]) -> None:
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Sample:
        return joined([self.rows[i] for i in self.groups[index]])
