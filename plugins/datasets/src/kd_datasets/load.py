"""Where the rows come from: the Hub, a file, a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets

from kd_datasets.options import SUFFIXES, DatasetsOptions, is_local
from kdcore.errors import DataError, did_you_mean

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SAVED = ("dataset_dict.json", "state.json")


def load_splits(options: DatasetsOptions) -> dict[str, Any]:
    """The rows of each split under our names: `datasets.Dataset`, or `datasets.IterableDataset` if streaming.

    Raises:
        DataError: if the data cannot be found or read, or has no such split.
    """
    available = _load_local(options) if is_local(options.path) else _load_hub(options)
    if options.splits is None:
        splits = _usual_splits(available, options.path)
    else:
        splits = {ours: _split(available, spec, options) for ours, spec in options.splits.items()}
    if options.val_fraction is not None:
        splits = _cut_val(splits, options)
    return splits


def base_folder(options: DatasetsOptions) -> Path:
    """The folder to which the paths of picture files in the data are relative."""
    path = Path(options.path).expanduser()
    return path if path.is_dir() else path.parent


def _load_hub(options: DatasetsOptions) -> dict[str, Any]:
    try:
        return _as_splits(
            datasets.load_dataset(options.path, options.name, revision=options.revision, streaming=options.streaming)
        )
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        raise DataError(f"data {options.path!r}: there is no such file or folder, and it could not be fetched from the "
                        f"Hugging Face Hub ({cause}). Check the id and `name:`; without a connection, give the path of "
                        "a local copy (`save_to_disk` of datasets makes one)") from error  # fmt: skip


def _load_local(options: DatasetsOptions) -> dict[str, Any]:
    path = Path(options.path).expanduser()
    if not path.exists():
        raise DataError(f"data {options.path!r}: there is no such file or folder")
    try:
        if any((path / name).is_file() for name in SAVED):
            _check_names(path)
            return _streamed(datasets.load_from_disk(str(path)), options.streaming)
        arguments = _folder_arguments(path) if path.is_dir() else _file_arguments(path)
        return _as_splits(datasets.load_dataset(**arguments, streaming=options.streaming))
    except DataError:
        raise
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(f"data {options.path!r} cannot be read: {cause}") from error


def _check_names(path: Path) -> None:
    """Refuse a saved data set whose own files name others outside of its folder."""
    split_list, state = (path / name for name in SAVED)
    if split_list.is_file():
        names = json.loads(split_list.read_text(encoding="utf-8"))["splits"]
    else:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"data {str(path)!r} names {name!r}, which is outside of its folder")
        if split_list.is_file():
            _check_names(path / name)


def _file_arguments(path: Path) -> dict[str, Any]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"data {str(path)!r}: files of this kind are not read; these are: {', '.join(SUFFIXES)}")
    separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return {"path": SUFFIXES[path.suffix], "data_files": str(path), **separator}


def _folder_arguments(path: Path) -> dict[str, Any]:
    """How a folder is read: class folders of pictures, under split folders or not, or else as a Hub data set is."""
    if not any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        return {"path": str(path)}
    names = {name for names in SPLIT_NAMES.values() for name in names}
    splits = [folder.name for folder in path.iterdir() if folder.is_dir() and folder.name in names]
    files = {name: f"{name}/**" for name in sorted(splits)} or {"train": "**"}
    return {"path": "imagefolder", "data_dir": str(path), "data_files": files}


def _as_splits(loaded: Any) -> dict[str, Any]:
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _streamed(loaded: Any, streaming: bool) -> dict[str, Any]:
    splits = _as_splits(loaded)
    return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits


def _usual_splits(available: dict[str, Any], path: str) -> dict[str, Any]:
    found = {
        ours: available[name] for ours, names in SPLIT_NAMES.items() for name in reversed(names) if name in available
    }
    if not found and len(available) == 1:
        return {"train": next(iter(available.values()))}
    if "train" not in found:
        raise DataError(f"data {path!r} has no split 'train'; choose with `splits:` among: {', '.join(available)}")
    return found


def _split(available: dict[str, Any], spec: str, options: DatasetsOptions) -> Any:
    """One split by its name, or slices of splits in the notation of datasets, such as `train[:80%]+test`."""
    for name in re.findall(r"(?:^|\+)\s*([^\[+\s]+)", spec):
        if name not in available:
            raise DataError(f"splits: data {options.path!r} has no split {name!r}; "
                            f"{did_you_mean(name, available, 'splits')} (all: {', '.join(available)})")  # fmt: skip
    if spec in available:
        return available[spec]
    if options.streaming:
        raise DataError(
            f"splits: a stream has no slices, and {spec!r} is one; name whole splits or set `streaming: false`"
        )
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(
            {name: len(rows) for name, rows in available.items()}
        )
    except (ValueError, AssertionError) as error:
        raise DataError(f"splits: {spec!r} is no split and no slice: {error}") from error
    return datasets.concatenate_datasets([available[p.splitname].select(range(p.from_, p.to)) for p in parts])


def _cut_val(splits: dict[str, Any], options: DatasetsOptions) -> dict[str, Any]:
    if options.streaming:
        raise DataError("val_fraction: nothing can be cut off a stream; name a split for val in `splits:`")
    if "val" in splits:
        raise DataError(
            "val_fraction: the data has a split for val; leave val_fraction out, or leave val out of `splits:`"
        )
    parts = splits["train"].train_test_split(test_size=options.val_fraction, seed=options.seed)
    return {**splits, "train": parts["train"], "val": parts["test"]}
