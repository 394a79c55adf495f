"""Video files as clips: a folder of them, or CSV files that list them. Decoding is PyAV's."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from kd_discovr.options import ClipsOptions
from kdcore.data import DataModule, Task
from kdcore.errors import DataError

SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
SPLITS = ("train", "val", "test")


def clips(options: ClipsOptions) -> DataModule:
    """Splits of `video` `[frames, 3, size, size]` in [0, 1] and, where they are known, `label`; a task without
    predictions, whose classes name the labels.

    Training clips are random windows, cropped at random scales; those of other splits the middle of the video.

    Raises:
        DataError: if there are no splits, or a CSV file does not list videos.
    """
    root = Path(options.path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: there is no folder {root}")
    there = [name for name in SPLITS if (root / f"{name}.csv").is_file() or (root / name).is_dir()]
    listed = {name: listing(root, name) for name in options.splits or there}
    if not listed:
        raise DataError(f"data.path: {root} holds, for none of {', '.join(SPLITS)}, a CSV file or a folder of videos; "
                        "name other splits in data.splits")  # fmt: skip
    labels = sorted({entry.label for entries in listed.values() for entry in entries if entry.label is not None})
    classes = sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels
    splits = {name: Videos(entries, classes, options) for name, entries in listed.items()}
    window = Window(options, random=True)
    task = Task("unlabelled", tuple(classes), image=(3, options.size, options.size))
    return DataModule(splits, task, augment=window, collate=Collate(options))


@dataclass(frozen=True)
class Entry:
    """A video: its file, how many of its frames count (all, if `None`), and its label."""

    path: Path
    frames: int | None = None
    label: str | None = None


def listing(root: Path, split: str) -> list[Entry]:
    """The videos of a split, from `<split>.csv` or the folder `<split>`.

    Raises:
        DataError: if there is neither, it lists no video, or some but not all have labels.
    """
    file, folder = root / f"{split}.csv", root / split
    if not file.is_file() and not folder.is_dir():
        raise DataError(f"data.splits: there is neither {file} nor a folder {folder}")
    found = from_csv(file) if file.is_file() else from_folder(folder)
    where = file if file.is_file() else folder
    if not found:
        raise DataError(f"{where} lists no videos (files ending in {', '.join(SUFFIXES)})")
    if len({entry.label is None for entry in found}) > 1:
        raise DataError(f"{where}: some videos have a label and some have none; label all of them or none")
    return found


def from_csv(file: Path) -> list[Entry]:
    """Rows of columns `path` and, if they are there, `frames` and `label`; paths are relative to the file.

    Raises:
        DataError: if the file cannot be read, has no column `path`, or a row is wrong or names no file.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream, skipinitialspace=True)
            rows, columns = list(table), table.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if "path" not in columns:
        raise DataError(f"{file}: no column `path`; its columns are: {', '.join(columns) or 'none'}")
    entries = []
    for number, row in enumerate(rows, start=2):
        path, frames, label = ((row.get(key) or "").strip() for key in ("path", "frames", "label"))
        if not path or (frames and not (frames.isdecimal() and int(frames))):
            raise DataError(f"{file}, line {number}: expected a path and, if any, a number of frames, not {row}")
        if not (file.parent / path).is_file():
            raise DataError(f"{file}, line {number}: there is no file {file.parent / path}")
        entries.append(Entry(file.parent / path, int(frames) if frames else None, label or None))
    return entries


def from_folder(folder: Path) -> list[Entry]:
    """The videos in a folder, without labels, or in its subfolders, whose names are the labels."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    return [Entry(p, label=None if p.parent == folder else p.relative_to(folder).parts[0]) for p in files]


class Videos(Dataset[dict[str, Any]]):
    """Every `stride`-th frame of each video, `[L, 3, H, W]` uint8, with its label."""

    def __init__(self, entries: Sequence[Entry], classes: Sequence[str], options: ClipsOptions) -> None:
        self.entries, self.options = list(entries), options
        self.number = {name: i for i, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        sample: dict[str, Any] = {"video": decode(entry, self.options.stride)}
        return sample if entry.label is None else {**sample, "label": self.number[entry.label]}

    def column(self, name: str) -> Tensor:
        """All labels. Raises `KeyError` for anything else, or where there are none."""
        labels = [entry.label for entry in self.entries]
        if name != "label" or None in labels:
            raise KeyError(name)
        return torch.tensor([self.number[label] for label in labels if label is not None])


def decode(entry: Entry, stride: int) -> Tensor:
    """Every `stride`-th frame of a video, `[L, 3, H, W]` uint8.

    Raises:
        DataError: if PyAV is not installed, or the file cannot be decoded.
    """
    try:
        import av
    except ImportError:
        raise DataError("decoding videos needs PyAV: pip install 'kd-discovr[clips]'") from None
    frames = []
    try:
        with av.open(str(entry.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if entry.frames is not None and number >= entry.frames:
                    break
                if number % stride == 0:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DataError(f"video {entry.path} cannot be decoded: {error}") from None
    if not frames:
        raise DataError(f"video {entry.path} has no frames")
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()


@dataclass
class Window:
    """Cuts a clip out of a video: `[L, 3, H, W]` uint8 to `[frames, 3, size, size]` in [0, 1].

    Args:
        options: length, size and scales of crops.
        random: start and crop at random, drawn from torch's generator; else the middle of both.
    """

    options: ClipsOptions
    random: bool = False

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its clip."""
        video: Tensor = sample["video"]
        wanted = self.options.frames
        video = video.repeat(-(-wanted // len(video)), 1, 1, 1)
        start = self._place(len(video) - wanted)
        video = video[start : start + wanted]
        height, width = self._crop(min(video.shape[-2:]))
        top, left = self._place(video.shape[-2] - height), self._place(video.shape[-1] - width)
        video = video[..., top : top + height, left : left + width].float() / 255
        size = (self.options.size, self.options.size)
        return {**sample, "video": F.interpolate(video, size, mode="bilinear", antialias=True).clamp(0, 1)}

    def _place(self, room: int) -> int:
        return int(torch.randint(room + 1, ())) if self.random else room // 2

    def _crop(self, side: int) -> tuple[int, int]:
        """Height and width of the crop: two scales of the list that stand at most one place apart."""
        scales = self.options.scales
        if not self.random or not scales:
            return side, side
        first = int(torch.randint(len(scales), ()))
        near = [i for i in range(len(scales)) if abs(i - first) <= 1]
        second = near[int(torch.randint(len(near), ()))]
        return round(side * scales[first]), round(side * scales[second])


@dataclass
class Collate:
    """Samples to a batch; what no augmentation has cut yet gets the middle of its video."""

    options: ClipsOptions

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        middle = Window(self.options)
        batch: dict[str, Any] = default_collate([s if s["video"].is_floating_point() else middle(s) for s in samples])
        return batch
