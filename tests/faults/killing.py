"""Runs that are killed at random moments, many times in a row, and gone on with by the same command. What comes out
must be what comes out of a run that nobody killed, bit for bit.

    python tests/faults/killing.py --kills 200

Each run is a `kd run` of a quickstart cut to a few steps. With `--warm` it is forked from a process that has already
imported what runs import. That saves most of the time and the kills that hit imports; and half of the kills come from
inside then, just before a random one of the run's operations on files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import comparing

from kdcore.testing.conformance import cut_recipe

IMPORTS = ["kd_cli.main", "kdcore.api", "accelerate", "torchmetrics", "sklearn.linear_model", "sklearn.datasets",
           "datasets", "transformers.models.gpt2.modeling_gpt2", "diffusers.models.transformers.transformer_sd3",
           "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm"]  # fmt: skip
PATIENCE = 300
"""Seconds that a run may take; it hangs if it takes longer."""

LONGEST = 12
"""So often a run is killed, then it is let through."""


@dataclass(frozen=True)
class Case:
    """What is run.

    Args:
        method: whose quickstart.
        processes: in how many processes.
        kinds: how it is killed: `kill`, `term` and `int` are signals to the process that was started, which of a run in
            several is their launcher; `rank` kills one that it launched, `all` kills these and it.
    """

    method: str
    processes: int = 1
    kinds: tuple[str, ...] = ("kill", "term", "int")

    def __str__(self) -> str:
        return self.method if self.processes == 1 else f"{self.method}-{self.processes}-processes"


CASES = [
    Case("kd", 2, ("rank", "all", "kill", "term", "int")),
    Case("kd"),
    Case("lelp"),
    Case("diswot"),
    Case("hierarchical-prune"),
    Case("symbolic-kd"),
]
SIGNALS = dict.fromkeys(("kill", "rank", "all"), signal.SIGKILL) | {"term": signal.SIGTERM, "int": signal.SIGINT}
ENDS = {"kill": -signal.SIGKILL, "all": -signal.SIGKILL, "term": 75, "int": 130, "rank": 1}
"""How the command ends when it is killed while the run is under way."""

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}
"""Operations on files, beside opening them to write, as Python's audit events name them."""

STRUCK = "killed before"


@dataclass
class Session:
    """One process of `kd run`, from its start to its end.

    Args:
        run: the run folder.
        pid: of the process that was started.
        status: its exit status, once it has ended.
    """

    run: Path
    pid: int
    status: Callable[[], int | None]
    before: int | None = None
    started: float = field(default_factory=time.monotonic)

    def alive(self) -> bool:
        """Whether it goes on. Waits a millisecond.

        Raises:
            TimeoutError: if it does not end.
        """
        if time.monotonic() > self.started + PATIENCE:
            for pid in family(self.pid):
                _kill(pid, signal.SIGKILL)
            raise TimeoutError(f"no end after {PATIENCE} s")
        time.sleep(0.001)
        return self.status() is None

    def begun(self) -> bool:
        """Whether the run is under way, and not only its imports."""
        return facts(self.run).get("pid") != self.before

    def end(self) -> int:
        """Wait for it; its exit status."""
        while self.alive():
            pass
        return self.status() or 0


@dataclass
class Reference:
    """A run that nobody killed.

    Args:
        recipe, run: its recipe and its folder.
        startup, working: seconds before and after the run began.
        changes: how often something in the folder was seen to change.
        operations: how many operations on files the run made, as far as they were counted.
    """

    recipe: Path
    run: Path
    startup: float
    working: float
    changes: int
    operations: int


@dataclass
class Outcome:
    """What became of runs that were killed.

    Args:
        hits: for each kill, what it hit.
        resumes: how often a run was gone on with.
        problems: what is wrong; nothing should be.
    """

    hits: list[str] = field(default_factory=list)
    resumes: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Faults:
    """Starts runs and kills them.

    Args:
        where: a folder for all of them.
        warm: whether runs are forked from a process that has the imports behind it.
    """

    def __init__(self, where: Path, warm: bool) -> None:
        self.where, self.warm = where, warm
        self._references: dict[str, Reference] = {}

    def reference(self, case: Case) -> Reference:
        """The run of a case that nobody kills; it is made once."""
        if str(case) not in self._references:
            self._references[str(case)] = self._make_reference(case)
        return self._references[str(case)]

    def _make_reference(self, case: Case) -> Reference:
        folder = self.where / str(case)
        folder.mkdir(parents=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**cut_recipe(case.method), "trackers": []}))
        session, begun = self.start(case, recipe, folder / "whole"), 0.0
        last, changes = look(session.run), 0
        while session.alive():
            begun = begun or session.begun() * time.monotonic()
            changes, last = changes + (last != (now := look(session.run))), now
        if session.end() != 0:
            raise RuntimeError(f"{case} fails even if nobody kills it: {log(session.run)[-2000:]}")
        operations = int(log(session.run).rpartition("operations: ")[2]) if self.warm and case.processes == 1 else 0
        return Reference(recipe, session.run, begun - session.started, time.monotonic() - begun, changes, operations)

    def start(self, case: Case, recipe: Path, run: Path, number: int = 0, operation: int = 0) -> Session:
        """Give the command. Forked, the run may get a signal just before one of its operations on files."""
        command = ["run", str(recipe), "--run-dir", str(run), "--resume", "--quiet", "--grace", "20"]
        command += ["--processes", str(case.processes)] if case.processes > 1 else []
        before, output = facts(run).get("pid"), run.with_suffix(".log")
        if self.warm:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(IMPORTS)
            process = context.Process(target=as_command, args=(command, output, run, number, operation))
            process.start()
            return Session(run, process.pid or 0, lambda: process.exitcode, before)
        with open(output, "a") as file:
            cold = subprocess.Popen([sys.executable, "-m", "kd_cli", *command], stdout=file, stderr=file)
        return Session(run, cold.pid, cold.poll, before)

    def series(self, case: Case, kinds: Sequence[str], kills: int, seed: int = 0) -> Outcome:
        """Kill runs of a case so many times, in these ways by turns. A run is killed again and again until it gets
        through, and is compared then."""
        whole = self.reference(case)
        rng = random.Random(f"{case} {kinds} {seed}")
        outcome, started = Outcome(), time.monotonic()
        for chain in range(3 * kills):
            run = whole.run.with_name(f"{'-'.join(kinds)}-{seed}-{chain}")
            try:
                through = self._chain(case, whole, run, kinds, min(kills, len(outcome.hits) + LONGEST), rng, outcome)
            except TimeoutError as error:
                outcome.problems.append(f"{run}: {error}")
                break
            if through:
                outcome.problems += [f"{run}: {what}" for what in comparing.differences(whole.run, run)]
            if not any(str(run) in problem for problem in outcome.problems):
                shutil.rmtree(run)
            if len(outcome.hits) >= kills:
                break
        outcome.seconds = time.monotonic() - started
        return outcome

    def _chain(
        self, case: Case, whole: Reference, run: Path, kinds: Sequence[str], kills: int, rng: random.Random,
        outcome: Outcome,
    ) -> bool:  # fmt: skip
        """Kill one run until there are so many kills in all, then let it through; whether it got through."""
        while True:
            kind = kinds[len(outcome.hits) % len(kinds)] if len(outcome.hits) < kills else ""
            inside = rng.randint(1, whole.operations) if kind and whole.operations and rng.random() < 0.5 else 0
            said = log(run).count(STRUCK)
            session = self.start(case, whole.recipe, run, SIGNALS.get(kind, 0), inside)
            outcome.resumes += session.before is not None
            pids = [session.pid]
            if struck := kind != "" and not inside and until(session, whole, rng):
                pids = family(session.pid)
                strike(pids, kind, rng)
            status = session.end()
            if struck or log(run).count(STRUCK) > said:
                hit = describe(run, session.begun())
                outcome.hits.append(hit)
                found = comparing.invalid(run)
                if status != ENDS[kind] and hit not in ("start", "end"):
                    found.append(f"ended with {status}, not {ENDS[kind]}: {log(run)[-500:]}")
                found += [f"process {pid} is still there" for pid in survivors(pids)]
                outcome.problems += [f"{run}: {kind} in {hit}: {what}" for what in found]
            elif status:
                outcome.problems.append(f"{run}: ended with {status} by itself: {log(run)[-2000:]}")
                return False
            if status == 0:
                wrong = [line for line in log(run).splitlines() if "damaged" in line or "begins again" in line]
                outcome.problems += [f"{run}: {line}" for line in wrong]
                return True


def as_command(arguments: list[str], output: Path, run: Path, number: int, operation: int) -> None:
    """Be the process of a command, and count its operations on files in the run folder. Before the one that is told, if
    any, it gets a signal."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    count = 0

    def watch(event: str, details: tuple[object, ...]) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and _writes(details)):
            relative = event in ("os.remove", "os.rmdir") and details[-1] != -1  # in a folder that is removed
            if relative or str(details[0]).startswith(str(run)):
                count += 1
                if count == operation:
                    os.write(1, f"{STRUCK} operation {count}, {event} {details[0]}\n".encode())
                    os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    sys.argv = ["kd", *arguments]
    try:
        runpy.run_module("kd_cli", run_name="__main__", alter_sys=True)
    finally:
        os.write(1, f"operations: {count}\n".encode())


def _writes(details: tuple[object, ...]) -> bool:
    return isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))


def until(session: Session, usual: Reference, rng: random.Random) -> bool:
    """Wait for a random moment: one before the run begins, one while it works, or the very moment at which something in
    its folder changes. Whether it is still there then."""
    moment = rng.choices(("start", "work", "change"), (1, 5, 5))[0]
    share = rng.random()
    if moment == "start":
        return _sleep(session, share * usual.startup)
    while not session.begun():
        if not session.alive():
            return False
    if moment == "work":
        return _sleep(session, share * usual.working)
    last, left = look(session.run), 1 + int(share * usual.changes)
    while left and session.alive():
        left, last = left - (last != (now := look(session.run))), now
    return session.status() is None


def _sleep(session: Session, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while session.alive() and time.monotonic() < end:
        pass
    return session.status() is None


def strike(pids: Sequence[int], kind: str, rng: random.Random) -> None:
    """Kill the first of these processes, or those of the others that the kind of kill says."""
    workers = [pid for pid in pids[1:] if "kd_cli" in command_line(pid)]
    victims = {"all": pids, "rank": [rng.choice(workers)] if workers else pids[:1]}.get(kind, pids[:1])
    for victim in victims:
        _kill(victim, SIGNALS[kind])


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def survivors(pids: Sequence[int], seconds: float = 30) -> list[int]:
    """Processes that are there even after a while."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if command_line(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def command_line(pid: int) -> str:
    """Of a process; empty if there is none any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def facts(run: Path) -> dict[str, object]:
    """`run.json` as far as it can be read."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / "run.json").read_text()))
    return {}


def look(folder: Path) -> set[tuple[str, int]]:
    """What is in a folder: files with their sizes, and folders."""
    return set(_entries(str(folder)))


def _entries(folder: str) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir():
                yield entry.path, 0
                yield from _entries(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat().st_size


def describe(run: Path, begun: bool) -> str:
    """Where a run was when it was killed: the start, a stage, or the end; `*` if it was writing just then."""
    if not begun:
        return "start"
    if facts(run).get("status") == "finished":
        return "end"
    writing = "*" * any(path.endswith(".tmp") for path, _ in look(run))
    stages = sorted((run / "stages").glob("[0-9]*-*"))
    unfinished = [path.name.partition("-")[2] for path in stages if not (path / "artifact").exists()]
    return f"{unfinished[0] if unfinished else 'between'}{writing}"


def log(run: Path) -> str:
    """All that the processes of a run said."""
    path = run.with_suffix(".log")
    return path.read_text().strip() if path.exists() else ""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Kill runs, go on with them, compare what comes out.")
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--warm", action="store_true", help="fork runs from a process that has imported everything")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    series = [(case, kind) for case in CASES for kind in case.kinds if options.only in str(case)]
    weights = [1 / case.processes**2 for case, _ in series]  # those in several processes take longest
    where = Path(tempfile.mkdtemp(prefix="kd-faults-"))
    faults, outcomes, row = Faults(where, options.warm), [], "{:20}{:6}{:>6}{:>9}{:>9}  {:9}{}".format
    print(row("method", "kill", "kills", "resumes", "seconds", "verdict", "hit (* while writing)"))
    for (case, kind), weight in zip(series, weights, strict=True):
        out = faults.series(case, [kind], math.ceil(options.kills * weight / sum(weights)), options.seed)
        hits = ", ".join(f"{hit} {n}" for hit, n in Counter(out.hits).most_common())
        verdict = f"{len(out.problems)} wrong" if out.problems else "the same"
        print(row(str(case), kind, len(out.hits), out.resumes, round(out.seconds), verdict, hits), flush=True)
        outcomes.append(out)
    kills, resumes = sum(len(out.hits) for out in outcomes), sum(out.resumes for out in outcomes)
    print(row("all", "", kills, resumes, round(sum(out.seconds for out in outcomes)), "", ""))
    problems = [problem for out in outcomes for problem in out.problems]
    print(*problems, sep="\n", end="")
    if not problems:
        shutil.rmtree(where)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
