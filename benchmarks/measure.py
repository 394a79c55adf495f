"""What the benchmarks share: sides that take turns, medians of ratios, peak memory, and results as JSON."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "accelerate", "transformers", "datasets", "timm", "torchdistill", "trl", "sentence-transformers",
            "liger-kernel", "typer", "rich", "pydantic", "pluggy")  # fmt: skip


@dataclass
class Row:
    """One case: medians by side, and the quartiles of ratios between sides.

    The ratios are those of one round each, so that what slows the machine for a while slows both sides of them.
    """

    case: str
    unit: str
    medians: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[Any]]:
    """Every side once a round, in the other order every other round; the first `warm` rounds are thrown away."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(rounds + warm):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            value = sides[name]()
            if number >= warm:
                found[name].append(value)
    return found


def row(case: str, unit: str, found: Mapping[str, Sequence[float]], base: str = "", **facts: Any) -> Row:
    """Medians, and the ratios of the first side to the others; with a base, of all others to it."""
    first = next(iter(found))
    pairs = [(name, base) for name in found if name != base] if base else [(first, n) for n in found if n != first]
    ratios = {f"{a} / {b}": quartiles([x / y for x, y in zip(found[a], found[b], strict=True)])
              for a, b in pairs if all(found[b])}  # fmt: skip
    return Row(
        case,
        unit,
        {name: statistics.median(values) for name, values in found.items()},
        ratios,
        len(found[first]),
        facts,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def show(found: Row) -> None:
    """Print a row: each side, and the ratios."""
    print(f"{found.case} ({found.unit})" + "".join(f"   {name}: {value}" for name, value in found.facts.items()))
    print("    " + "   ".join(f"{name} {value:.4g}" for name, value in found.medians.items()))
    for name, (low, middle, high) in found.ratios.items():
        print(f"    {name} = {middle:.3f}  ({low:.3f} to {high:.3f})", flush=True)


def peak() -> int:
    """The largest resident memory of this process since it was last reset, in bytes (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Begin the peak anew, and say what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def last_terms(run: Path) -> dict[str, float]:
    """The terms of a run's last logged step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = next(row["terms"] for row in reversed(rows) if "terms" in row)
    return found


def keep_heap() -> None:
    """Have glibc keep what is freed: what it gives back to the system, and gets again with the next step, depends on
    what happens to lie at the heap's end, and is worth 5 % of a step on either side."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that there is


def forked(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives in a process of its own that has everything already imported (before torch uses threads)."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(call(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{getattr(call, '__name__', call)}{arguments} gave nothing") from None
    finally:
        process.join()


def child(script: str | Path, *arguments: Any) -> dict[str, Any]:
    """What a script prints as JSON in its last line, run as a process of its own."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="alternating rounds that count")
    made.add_argument("--only", default="", help="only the cases whose names hold this; nothing is written then")
    made.add_argument("--threads", type=int, default=1, help="of torch, on all sides")
    return made


def begin(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments given; torch has its threads from here on, and the libraries are quiet."""
    import torch

    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.disable(logging.WARNING)
    return given


def write(area: str, rows: Sequence[Row], given: argparse.Namespace) -> None:
    """Write `results/<area>.json`, unless only some cases were measured."""
    if given.only:
        return
    RESULTS.mkdir(exist_ok=True)
    name = Path(sys.argv[0]).name
    facts = {"area": area, "command": " ".join(["python", f"benchmarks/{name}", *sys.argv[1:]]),
             "date": datetime.date.today().isoformat(), "rounds": given.rounds, "threads": given.threads,
             "machine": machine(), "versions": versions(), "rows": [asdict(found) for found in rows]}  # fmt: skip
    (RESULTS / f"{area}.json").write_text(json.dumps(facts, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The processor, its cores, and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": named[0] if named else platform.processor(), "cores": os.cpu_count(),
            "memory_gb": round(memory / 1e9, 1), "system": platform.system(), "load": os.getloadavg()[2]}  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python, and of whatever is installed that the benchmarks use or compare with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
