"""What a run folder must hold at any moment, and how the folders of two runs differ where they must not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kdcore import folder
from kdcore.errors import RunFolderError

OF_THE_RUN = {"pid", "started", "finished", "resumed", "timings", "git", "checkpoints", "digest"}
"""Entries of `run.json` that say how a run went, not what came out."""

UNIMPORTANT = re.compile(r"seconds|latency_ms|.*time|.*path|_fingerprint")
"""Keys of JSON files that may differ from run to run."""


def invalid(run: Path) -> list[str]:
    """What a run that was killed must not leave in sight: half a file under its name, or a folder that does not hold
    what its manifest says."""
    found = []
    for path in run.rglob(folder.MANIFEST):
        if not any(part.endswith(".tmp") for part in path.relative_to(run).parts):
            try:
                folder.verify(path.parent)
            except RunFolderError as error:
                found.append(f"in sight after the kill: {str(error).replace(f'{run}/', '')}")
    for path in run.glob("run.json"):
        if not _is_json(path.read_text()):
            found.append("in sight after the kill: run.json is damaged")
    return found


def differences(whole: Path, killed: Path) -> list[str]:
    """How a run that was killed and gone on with differs from one that was not."""
    ours, theirs = ({str(p.relative_to(run)) for p in run.rglob("*")} - {".lock"} for run in (whole, killed))
    found = [f"missing: {name}" for name in _topmost(ours - theirs)]
    found += [f"left over: {name}" for name in _topmost(theirs - ours)]
    for name in sorted(ours & theirs):
        if (whole / name).is_file():
            found += [f"{name}: {what}" for what in _unlike(whole / name, killed / name)]
    rows = [json.loads(line) for line in _lines(killed / "metrics.jsonl") if _is_json(line)]
    kinds = Counter((row["stage"], row["step"], "metrics" in row) for row in rows)
    return found + [f"metrics.jsonl: {row} stands there {n} times" for row, n in kinds.items() if n > 1]


def _topmost(names: set[str]) -> list[str]:
    return sorted(name for name in names if str(Path(name).parent) not in names)


def _unlike(one: Path, two: Path) -> Iterator[str]:
    if one.read_bytes() == two.read_bytes():
        return
    if one.name == "run.json":
        of_both = ({k: v for k, v in _json(p).items() if k not in OF_THE_RUN} for p in (one, two))
        yield from _unlike_values(*map(_important, of_both))
    elif one.name == folder.MANIFEST:  # the digests are those of files that are compared themselves
        yield from _unlike_values(*({**_json(p), "files": sorted(_json(p)["files"]), "digest": ""} for p in (one, two)))
    elif one.suffix == ".json":
        yield from _unlike_values(_important(_json(one)), _important(_json(two)))
    elif one.suffix == ".safetensors":
        yield from _unlike_tensors(load_file(one), load_file(two))
    elif one.suffix == ".arrow":
        if _table(one) != _table(two):
            yield "other rows"
    elif one.suffix == ".jsonl":
        yield from _unlike_lines(_lines(one), _lines(two))
    else:
        yield "other bytes"


def _unlike_values(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*one, *two}):
        if one.get(key) != two.get(key):
            yield f"{key} is {two.get(key)!r}, not {one.get(key)!r}"


def _unlike_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> Iterator[str]:
    for key in sorted({*one, *two}):
        if key not in one or key not in two or _bits(one[key]) != _bits(two[key]):
            yield f"the tensor {key} differs"


def _unlike_lines(one: list[str], two: list[str]) -> Iterator[str]:
    for line in sorted({*one, *two}, key=[*one, *two].index):
        if line and one.count(line) != two.count(line):
            yield f"{two.count(line)} times, not {one.count(line)}: {line}"
    if sorted(one) == sorted(two):
        yield "the lines are in another order"


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _table(path: Path) -> list[Any]:
    from datasets import Dataset

    return list(Dataset.from_file(str(path)).to_list())


def _important(value: Any) -> Any:
    if isinstance(value, list):
        return [_important(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _important(v) for k, v in value.items() if not UNIMPORTANT.fullmatch(k)}


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n") if path.exists() else []


def _is_json(text: str) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False
