"""Methods compared on one recipe, over several seeds, each run in a process of its own."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcore.errors import Interrupted, KDError, RecipeError, RunFolderError, UserError
from kdcore.folder import unreadable, write_text
from kdcore.plugins import PluginManager
from kdcore.recipe import Recipe, find_recipe, load, resolve

ALONE = "supervised"
"""The method that trains a student on the labels alone: what the others are compared with."""


@dataclass(frozen=True)
class Trial:
    """One method with one seed.

    Args:
        name: the entry, as it was asked for.
        seed: of the run.
        path: of the run folder.
        recipe: what is run.
        teacher: whether it trains a teacher for the others.
        error: why it failed, if it did.
        facts: `metrics`, `seconds` of training, `peak_memory` in bytes and `higher_is_better` of a finished run.
    """

    name: str
    seed: int
    path: Path
    recipe: Mapping[str, Any] = field(repr=False, default_factory=dict)
    teacher: bool = False
    error: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """A line of the leaderboard.

    Args:
        method: the entry.
        metric: what is compared.
        values: by seed, of the runs that finished.
        mean, deviation: of these (deviation: of the sample; `None` for one value).
        gain: mean difference to the student alone with the same seed, in the metric's unit; positive is better.
        low, high: its 95 % confidence interval (t distribution over the pairs of seeds; `None` for one pair).
        seconds: mean training time of a run, without what its models were trained with before.
        peak_memory: largest of the runs, in bytes.
        errors: of the runs that failed, by seed.
    """

    method: str
    metric: str
    values: Mapping[int, float]
    mean: float | None
    deviation: float | None
    gain: float | None
    low: float | None
    high: float | None
    seconds: float | None
    peak_memory: int | None
    errors: Mapping[int, str]


def bench(
    methods: Sequence[str],
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    *,
    seeds: int | Sequence[int] = 3,
    run_dir: str | Path = "runs/bench",
    jobs: int | None = None,
    on_trial: Callable[[Trial, int], None] | None = None,
) -> list[Standing]:
    """Run every method with every seed on the same teacher, student, data and schedule; the best comes first.

    Models that the recipe trains first are trained once. A bench that was killed goes on where it stopped when it is
    called again; what is finished is not run again.

    Args:
        methods: entries `NAME[,key=value...]`: a method with changes of its options (`crd,negatives=1024`) or of other
            parts of the recipe (`kd,train.epochs=3`).
        recipe: what all share; its method and losses are used by the entries of that method only. Default: the
            quickstart of the first method.
        overrides: changes of the recipe for all entries.
        seeds: how many, from 0, or which.
        run_dir: folder of all runs.
        jobs: processes at a time. Default: one per device, or per CPU core where there is none.
        on_trial: called with each finished or failed trial, and how many there are.

    Raises:
        UserError: if a method or the recipe is wrong, before anything runs; or the folder holds another bench.
        Interrupted: on Ctrl-C, after each running process wrote a checkpoint.
    """
    manager = PluginManager()
    if not methods:
        raise UserError("name the methods to compare, such as kd dkd crd")
    base = load(find_recipe(recipe or methods[0].split(",")[0], manager)[0], overrides)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise UserError("at least one seed is needed")
    folder = Path(run_dir)
    entries = list(dict.fromkeys([ALONE, *methods]))
    shared = copy.deepcopy(base)
    first = list(_teachers(shared, folder))
    trials = [Trial(name, seed, folder / _slug(name) / f"seed-{seed}", _recipe(base, shared, name, seed))
              for name, seed in itertools.product(entries, numbers)]  # fmt: skip
    for trial in trials:
        _check(trial, base, manager)
    pool = _Pool(jobs, len(first) + len(trials), on_trial)
    taught = pool.run(first)
    if failed := [trial for trial in taught if trial.error]:
        raise RecipeError(f"the {failed[0].name} could not be trained: {failed[0].error}")
    return standings([*taught, *pool.run(trials)])


def standings(trials: Sequence[Trial]) -> list[Standing]:
    """The leaderboard of finished and failed trials, best first, failed entries last."""
    metric = next((next(iter(t.facts["metrics"]), "") for t in trials if t.facts and not t.teacher), "")
    sign = next((1 if t.facts["higher_is_better"] else -1 for t in trials if t.facts), 1)
    alone = {t.seed: t.facts["metrics"][metric] for t in trials if t.name == ALONE and t.facts}
    found = []
    for name in dict.fromkeys(t.name for t in trials):
        own = [t for t in trials if t.name == name]
        values = {t.seed: t.facts["metrics"][metric] for t in own if metric in t.facts.get("metrics", {})}
        pairs = [sign * (value - alone[seed]) for seed, value in values.items() if seed in alone]
        gain, low, high = (None, None, None) if name == ALONE or own[0].teacher else interval(pairs)
        seconds = [t.facts["seconds"] for t in own if t.facts]
        found.append(Standing(
            name, metric, values, statistics.mean(values.values()) if values else None,
            statistics.stdev(values.values()) if len(values) > 1 else None, gain, low, high,
            statistics.mean(seconds) if seconds else None,
            max((t.facts["peak_memory"] for t in own if t.facts), default=None),
            {t.seed: t.error for t in own if t.error},
        ))  # fmt: skip
    return sorted(found, key=lambda s: (s.mean is None, -sign * (s.mean or 0.0)))


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float | None, float | None, float | None]:
    """Mean and confidence interval of a few values, by Student's t; without an interval for a single one."""
    if len(values) < 2:
        return (values[0] if values else None), None, None
    from scipy.stats import t

    mean = statistics.mean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def _recipe(base: Mapping[str, Any], shared: Mapping[str, Any], name: str, seed: int) -> dict[str, Any]:
    """The recipe of one entry: the shared one with another method, and no stages of the old one."""
    method, *changes = re.split(r",(?![^\[{]*[\]}])", name)  # not at commas inside brackets
    made = {**copy.deepcopy(dict(shared)), "seed": seed}
    if method != base["method"]["use"]:
        made["method"] = {"use": method}
        made.pop("stages", None)
    known = {*Recipe.model_fields, "teacher", "student"}
    full = [c if c.split("=")[0].split(".")[0] in known else f"method.{c}" for c in changes]
    return load(made, full)


def _check(trial: Trial, base: Mapping[str, Any], manager: PluginManager) -> None:
    """Refuse what cannot run, and leave the recipe's losses to the methods that take them.

    Raises:
        UserError: naming the entry.
    """
    from kdcore.stages import check_roles

    recipe: dict[str, Any] = trial.recipe  # type: ignore[assignment]
    method = recipe["method"]["use"]
    try:
        target = manager.get("method", method).load_target()
        if target.roles.losses is False:  # type: ignore[attr-defined]
            recipe.pop("losses", None)
        resolved = resolve(recipe, manager, "the recipe")
        check_roles(target(resolved.options["method"]), resolved.recipe, {})
    except UserError as error:
        raise type(error)(f"{trial.name}: {error}") from None


def _teachers(shared: dict[str, Any], folder: Path) -> Iterable[Trial]:
    """A trial for each teacher that the recipe trains first; in the recipe, its checkpoint stands instead."""
    for role, spec in (shared.get("teachers") or {}).items():
        train = spec.pop("train", None)
        if train is None or train is False:
            continue
        path = folder / role
        teacher = {**copy.deepcopy(spec), "train": train}
        recipe = {**copy.deepcopy(shared), "method": {"use": ALONE}, "teachers": {role: teacher}, "students": {}}
        for key in ("losses", "stages"):
            recipe.pop(key, None)
        spec["checkpoint"] = str(path / "stages" / f"01-{role}" / "artifact" / role)
        yield Trial(role, shared.get("seed", 0), path, recipe, teacher=True)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", name)


def _devices() -> list[str]:
    """Names of the CUDA devices that trials may have, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


class _Pool:
    """Runs trials, so many at a time, each in its own process and on a device of its own where there are several."""

    def __init__(self, jobs: int | None, total: int, on_trial: Callable[[Trial, int], None] | None) -> None:
        self.devices = _devices()
        self.jobs = jobs or len(self.devices) or os.cpu_count() or 1
        self.total, self.on_trial = total, on_trial
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:  # the imports, which take seconds, are then made once
            self.context.set_forkserver_preload(["kdcore.api"])

    def run(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials with their facts or errors, in order."""
        for trial in trials:
            _write_recipe(trial)
        done: dict[Path, Trial] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._one, trial, number) for number, trial in enumerate(trials)]
            try:
                for future in as_completed(futures):
                    trial = future.result()
                    done[trial.path] = trial
                    if self.on_trial:
                        self.on_trial(trial, self.total)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise Interrupted("interrupted; the same command goes on from here") from None
        return [done[trial.path] for trial in trials]

    def _one(self, trial: Trial, number: int) -> Trial:
        facts = trial.path / "bench.json"
        if not facts.is_file():
            device = self.devices[number % len(self.devices)] if len(self.devices) > 1 else None
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            process = self.context.Process(target=work, args=(_recipe_file(trial), trial.path, threads, device))
            process.start()
            process.join()
            if process.exitcode == Interrupted.exit_code:
                raise KeyboardInterrupt
            if process.exitcode or not facts.is_file():
                lines = _log_file(trial.path).read_text(encoding="utf-8").strip().splitlines()
                return replace(trial, error=lines[-1] if lines else f"it ended with status {process.exitcode}")
        return replace(trial, facts=_read_json(facts))


def _recipe_file(trial: Trial) -> Path:
    return trial.path.with_name(f"{trial.path.name}.yaml")


def _log_file(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.log")


def _write_recipe(trial: Trial) -> None:
    """Write a trial's recipe beside its run folder.

    Raises:
        RunFolderError: if another one stands there.
    """
    import yaml

    text, path = yaml.safe_dump(dict(trial.recipe), sort_keys=False, allow_unicode=True), _recipe_file(trial)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise RunFolderError(f"{path.parent} belongs to another bench, with other settings of {trial.name!r}; "
                             "remove it, or name another folder")  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise RunFolderError(f"{path.parent} cannot be written: {error.strerror}") from None


def compare(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Finished runs side by side, the best first by the first one's first metric.

    Each row holds `run`, the metrics, `seconds` of training, and those keys of the recipes that differ.

    Raises:
        RunFolderError: if a folder is no run, or one has no results yet.
    """
    rows, recipes, signs = [], [], []
    for path in map(Path, run_dirs):
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no run.json")
        status = _read_json(path / "run.json")
        if not status.get("metrics"):
            raise RunFolderError(f"{path} has no results yet (it is {status.get('status', 'new')}); finish it first")
        seconds = sum(timing["seconds"] for timing in status["timings"].values())
        rows.append({"run": str(path), **status["metrics"], "seconds": seconds})
        recipes.append(_flat(load(path / "recipe.yaml")))
        signs.append(1 if status["higher_is_better"] else -1)
    for key in dict.fromkeys(itertools.chain.from_iterable(recipes)):
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row[key] = value
    metric = next((key for row in rows for key in row if key != "run"), "")
    return sorted(rows, key=lambda row: (metric not in row, -signs[0] * row.get(metric, 0.0)))


def curves(run_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics measured during a run, by `stage split/metric`: steps and values.

    Raises:
        RunFolderError: if there is no journal, or it is damaged.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    path = Path(run_dir) / "metrics.jsonl"
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for name, value in row.get("metrics", {}).items():
                found.setdefault(f"{row['stage']} {name}", []).append((int(row["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """A nested recipe as one level of dotted keys."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if not items and key:
        return {key: node}
    return {k: v for part, value in items for k, v in _flat(value, f"{key}.{part}" if key else str(part)).items()}


def work(recipe: Path, run_dir: Path, threads: int, device: str | None) -> None:
    """Run one trial in this process, write its facts into its folder, and end the process.

    Args:
        recipe, run_dir: what to run, and where. What is printed goes into a file beside the folder.
        threads: of torch, unless OMP_NUM_THREADS says how many.
        device: the only CUDA device it may see, where there are several.
    """
    import resource

    with _log_file(run_dir).open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    from kdcore import api

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    try:
        result = api.run(recipe, run_dir=run_dir)
    except KDError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    status = json.loads((result.path / "run.json").read_text())
    measured = {name.split()[1]: points[-1][1] for name, points in curves(result.path).items()}
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    unit = 1 if sys.platform == "darwin" else 1024
    facts = {
        "metrics": result.metrics or measured,  # a teacher is measured during its training only
        "higher_is_better": status["higher_is_better"],
        "seconds": sum(timing["seconds"] for timing in status["timings"].values()),
        "peak_memory": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    write_text(result.path / "bench.json", json.dumps(facts, indent=2))
