"""What Python users call: run a recipe, distil two modules, plan, evaluate, load."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from kdcore import caching, folder
from kdcore.adopt import as_data_module
from kdcore.card import run_facts
from kdcore.checkpoint import reading
from kdcore.components import Component
from kdcore.data import DataModule, Task
from kdcore.errors import (
    DataError,
    Interrupted,
    KDError,
    ModelError,
    RecipeError,
    RunFailed,
    RunFolderError,
    UserError,
    shown,
)
from kdcore.folder import RunFolder, disk_problem
from kdcore.hookspecs import hookimpl
from kdcore.models import FromColumns, Model, Source
from kdcore.options import CacheOptions, Download, Options
from kdcore.plugins import PluginManager
from kdcore.recipe import Resolved, explain, find_recipe, load, resolve
from kdcore.runner import Result, Run
from kdcore.signals import GRACE
from kdcore.stages import Method, Supervised, check_roles


def run(
    recipe: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    plugins: PluginManager | None = None,
    grace: float = GRACE,
) -> Result:
    """Run a recipe: a file, a mapping, or `method/recipe` for one that a plugin ships.

    A run that was killed or interrupted goes on where it stopped when it is called again with the same folder and
    recipe. A finished one is only opened with `resume`.

    Args:
        recipe: what to run.
        overrides: `key=value` changes, such as `train.epochs=3`.
        run_dir: the run folder; default: `runs/<name of the recipe>`.
        resume: show the result of a finished run instead of refusing its folder.
        plugins: a manager with further plugins registered.
        grace: seconds in which the run has to end after SIGTERM.

    Raises:
        UserError: on wrong input, before anything is written where it can be known then.
        RunFailed: if training goes wrong, or the disk is full.
        Interrupted: on SIGINT, after a checkpoint; its subclass `Terminated` on SIGTERM.
    """
    manager = plugins or PluginManager()
    source, name = find_recipe(recipe, manager)
    resolved = resolve(load(source, overrides), manager, _source(recipe))
    return _run(resolved, manager, Path(run_dir or Path("runs") / name), resume, grace=grace)


def distill(
    teacher: Any,
    student: Any,
    data: Any,
    method: str | Mapping[str, Any] = "kd",
    *,
    task: Task | None = None,
    keys: Sequence[str] = ("image", "label"),
    train: Mapping[str, Any] | None = None,
    eval: Mapping[str, Any] | None = None,
    losses: Sequence[Mapping[str, Any]] = (),
    cache: bool | Mapping[str, Any] = False,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    plugins: PluginManager | None = None,
    **options: Any,
) -> Result:
    """Distil a teacher into a student, both ordinary `nn.Module`s; the student is trained in place.

    Args:
        teacher, student: modules (called with the batch's first entry, or by the names their `forward` takes) or
            `kdcore.Model`s. `teacher` may be `None` or a mapping of roles to modules.
        data: a data set or `DataLoader`, a pair (train, val), or a mapping of splits to either.
        method: its name, and `options` its options; or both as in a recipe: `{"use": "kd", "temperature": 4}`.
        task: what the data asks; guessed from a batch if not given.
        keys: names of the entries of tuple samples, in order.
        train, eval, losses, seed: as in a recipe.
        cache: whether what the teachers say is kept on disk; or how, as a recipe's `teacher.cache`.
        run_dir, resume, plugins: as for `run`.

    Raises:
        UserError: on wrong input.
    """
    manager = plugins or PluginManager()
    module = as_data_module(data, task, keys)
    teachers = teacher if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    given: dict[str, Any] = {"data": module, "teachers": {k: _as_model(v) for k, v in teachers.items()},
             "students": {"student": _as_model(student)}}  # fmt: skip
    if cache:
        given["cache"] = dict.fromkeys(given["teachers"], _cache_options({} if cache is True else cache))
    if module.task.num_classes is None and module.task.kind not in ("regression", "unlabelled"):
        known = [*given["teachers"].values(), given["students"]["student"]]  # a student's head may be a wider one
        module.task = _with_classes(module, next(m for m in known if isinstance(m, Model)))
    named = {"use": method} if isinstance(method, str) else dict(method)
    recipe = {"method": {**named, **options}, "data": "given:given", "train": dict(train or {}),
              "eval": dict(eval or {}), "losses": list(losses), "seed": seed}  # fmt: skip
    if not plugins or not any(info.name == "given" for info in manager.plugins()):
        manager.register(_Given, name="given")
    resolved = resolve(recipe, manager, "distill()")
    return _run(resolved, manager, Path(run_dir or Path("runs") / str(named.get("use"))), resume, given)


def fill_cache(
    recipe: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    role: str | None = None,
    options: Mapping[str, Any] | None = None,
    plugins: PluginManager | None = None,
) -> dict[str, Path]:
    """Fill the caches of a recipe's teachers, unless they are filled. A run of the recipe with the same `cache` then
    asks no teacher.

    Args:
        recipe, overrides, plugins: as for `run`.
        role: the teacher; default: all that have a `cache`, or the only one.
        options: changes of its `cache`.

    Returns:
        The folder of each cache, by role; its `cache.json` says what it holds.

    Raises:
        UserError: on wrong input; for a teacher that the recipe trains first.
        RunFailed, Interrupted: as `run`.
    """
    manager = plugins or PluginManager()
    source, name = find_recipe(recipe, manager)
    overrides = list(overrides)
    teachers = resolve(load(source, overrides), manager, _source(recipe)).recipe.teachers
    marked = [r for r, spec in teachers.items() if spec.cache]
    roles = [role] if role else marked or (list(teachers) if len(teachers) == 1 else [])
    if not roles or roles[0] not in teachers:
        raise RecipeError(f"name the teacher whose cache is to be filled, one of: {', '.join(teachers) or 'none'}")
    changes = [f"teachers.{r}.cache={json.dumps(dict(options or {}))}" for r in roles]
    resolved = resolve(load(source, [*overrides, *changes]), manager, _source(recipe))
    wanted = {r: cast(CacheOptions, resolved.recipe.teachers[r].cache) for r in roles}
    for r in wanted:
        if resolved.recipe.teachers[r].train is not None:
            raise RecipeError(f"teachers.{r}.train: the recipe trains this teacher first, and its cache is filled by "
                              "the run (`cache: true`); or name the trained one by `checkpoint`")  # fmt: skip
    run = Run(resolved, manager, Path("runs") / name)
    with _guarded(run):
        return {r: caching.cached(run, r, cache).path for r, cache in wanted.items()}


def _cache_options(given: Mapping[str, Any]) -> CacheOptions:
    try:
        return CacheOptions.model_validate(dict(given))
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, CacheOptions, "cache"))) from None


def _run(
    resolved: Resolved, manager: PluginManager, path: Path, resume: bool, given: Mapping[str, Any] | None = None,
    grace: float = GRACE,
) -> Result:  # fmt: skip
    run = Run(resolved, manager, path, given, grace)
    with _guarded(run):
        try:
            return _opened(run, resolved, resume, given)
        except (KDError, KeyboardInterrupt):
            raise
        except Exception as error:
            if (problem := disk_problem(error)) is None:
                raise
            raise RunFailed(f"the run folder {path} cannot be written any more: {problem}. What was saved before is "
                            "whole: make room, and give the same command again") from error  # fmt: skip


@contextlib.contextmanager
def _guarded(run: Run) -> Iterator[None]:
    """Inside, signals are handled, and told as what they are; processes leave their group when the program ends."""
    atexit.unregister(_leave_processes)
    atexit.register(_leave_processes)
    with run.watch.handled():
        try:
            yield
        except (KeyboardInterrupt, Interrupted) as error:
            raise run.watch.explain(error) from error


def _opened(run: Run, resolved: Resolved, resume: bool, given: Mapping[str, Any] | None) -> Result:
    path, status = run.path, _open_folder(run, resolved, resume)
    wrong = False
    try:
        if status.get("recipe", mine := resolved.fingerprint) != mine:
            raise RunFolderError(f"{path / 'run.json'} belongs to a run of another recipe; put the right one back")
        if status.get("status") == "finished":
            student = run.method.restore(_load_given(path, given), path / "student") if given else None
            return Result(path, status.get("metrics", {}), status.get("rows", []), student)
        if run.folder:
            run.folder.update(**run_facts(run, status))
        run.accelerator.init_trackers("tracker")
        result = run.execute()
    except BaseException as error:
        wrong = isinstance(error, UserError)
        if run.folder:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            said = {"status": "interrupted" if stopped else "failed", "error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError, RunFolderError):  # the disk may be what is wrong
                run.folder.update(**said)
        raise
    finally:
        for tracker in run.accelerator.trackers:  # end_training() would end the process group, which a next run needs
            tracker.finish()
        if run.folder:
            if wrong:
                run.folder.discard()
            run.folder.close()
    return result


def _open_folder(run: Run, resolved: Resolved, resume: bool) -> dict[str, Any]:
    """Lock the run folder on the main process; every process learns what `run.json` says, or why there is no folder."""
    found: list[Any] = [None]
    if run.accelerator.is_main_process:
        try:
            run.folder = RunFolder(run.path, resolved.dump(), resume, resolved.passing)
            found = [run.folder.read()]
        except RunFolderError as error:
            found = [error]
    (status,) = broadcast_object_list(found)
    if isinstance(status, RunFolderError):
        raise status
    return cast(dict[str, Any], status)


def _leave_processes() -> None:
    """At the end of the program, not of a run: the next run of this program needs the process group again."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # what still refers to the group would keep its threads, which may not outlive Python


@dataclass(frozen=True)
class Plan:
    """What a recipe would do: the resolved recipe, and what would be downloaded, by key path."""

    resolved: Resolved
    downloads: dict[str, list[Download]]


def plan(recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), *,
         plugins: PluginManager | None = None) -> Plan:  # fmt: skip
    """Validate a recipe as far as it can be without its models and data, and list what it would download.

    Raises:
        UserError: as `run`.
    """
    manager = plugins or PluginManager()
    source, _ = find_recipe(recipe, manager)
    resolved = resolve(load(source, overrides), manager, _source(recipe))
    found = {key: _downloads(key, options) for key, options in resolved.options.items() if options is not None}
    method: Method = manager.get("method", resolved.recipe.method.use).load_target()(resolved.options["method"])
    check_roles(method, resolved.recipe, {})
    return Plan(resolved, {key: downloads for key, downloads in found.items() if downloads})


def _source(recipe: str | Path | Mapping[str, Any]) -> str:
    return "the recipe" if isinstance(recipe, Mapping) else str(recipe)


def _downloads(key: str, options: Options) -> list[Download]:
    try:
        return options.downloads()
    except UserError as error:
        raise type(error)(f"{key}: {error}") from None
    except (OSError, RuntimeError) as error:  # a path that no file can have, a folder closed to us, no such home
        named = f"{shown(error.filename)}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise RecipeError(f"{key}: cannot be looked up: {named}") from None


def evaluate(run_dir: str | Path, split: str | None = None, overrides: Iterable[str] = (),
             plugins: PluginManager | None = None) -> dict[str, float]:  # fmt: skip
    """Load the student of a finished run and measure it again on a split (default: those of the recipe's `eval.on`).

    Raises:
        RunFolderError: if the folder holds no finished run.
    """
    path = Path(run_dir)
    run, model = load_student(path, overrides, plugins)
    final = Supervised(model, run.data.task, name="final")
    final._predict = run.method.predict
    return {k: v for name in ([split] if split else run.recipe.eval.on) for k, v in run.evaluate(final, name).items()}


def load_student(run_dir: str | Path, overrides: Iterable[str] = (),
                 plugins: PluginManager | None = None, role: str | None = None) -> tuple[Run, Model]:  # fmt: skip
    """The run of a folder, not executed, and its trained student; of several, `student`, or the first of the recipe."""
    path = Path(run_dir)
    if not os.path.isfile(path / "recipe.yaml"):
        raise RunFolderError(f"{path} is not a run folder: it has no recipe.yaml")
    manager = plugins or PluginManager()
    data = load(path / "recipe.yaml", overrides)
    roles = ("student", *data.get("students", {}))
    role = role or next((name for name in roles if (path / "students" / name).is_dir()), "student")
    where = student_folder(path, role)
    folder.verify(where)
    folder.check_recipe_file(path)
    if data["data"]["use"] == "given:given":
        raise RunFolderError(f"{path} was made from Python objects; load {where} in Python instead")
    if named := role in data.get("students", {}):
        data["students"][role] = {**data["students"][role], "checkpoint": str(where)}
    run = Run(resolve(data, manager, str(path / "recipe.yaml")), manager, path)
    return run, run.method.restore(run.model(role) if named else None, where)


def student_folder(path: Path, role: str = "student") -> Path:
    """The folder of a trained student: of a run folder, the student in it; any other folder is taken as it is. Files
    that a manifest names must be as they were written.

    Raises:
        RunFolderError: if one is not, or the run is not finished.
    """
    if status := folder.read_status(path):
        for where in (path / "student", path / "students" / role):
            if where.is_dir():
                folder.verify(where, status.get("recipe", ""))
                return where
        if several := sorted(where.name for where in (path / "students").glob("*") if where.suffix != ".tmp"):
            raise RunFolderError(f"{path}: the run has several students ({', '.join(several)}): name the folder of "
                                 f"one, such as {path / 'students' / several[0]}")  # fmt: skip
        raise RunFolderError(f"{path}: the run has no finished student yet; finish it with the same command")
    if path.is_dir():
        folder.verify_files(path)
    return path


class _Given:
    """Makes `use: given` a valid name in the recipes that `distill` writes."""

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "given", target=_refuse_given, summary="data handed over in Python")]


def _refuse_given(options: Any) -> DataModule:
    raise DataError("this recipe was made by kdcore.distill() from Python objects and cannot run without them")


def _load_given(path: Path, given: Mapping[str, Any]) -> Model:
    """The student handed over, with the weights that a finished run left."""
    from safetensors.torch import load_model

    student: Model = given["students"]["student"]
    folder.verify(path / "student")
    with reading(path / "student"):
        load_model(student.module, path / "student" / "model.safetensors")
    return student


def _as_model(value: Any) -> Source:
    if not isinstance(value, torch.nn.Module):
        raise ModelError(f"a {type(value).__name__} is no model; give an nn.Module or a kdcore.Model")
    return value if isinstance(value, Model | FromColumns) else Model(value)


def _with_classes(data: DataModule, model: Model) -> Task:
    training = model.training
    with torch.no_grad():
        logits = model.eval()(data.sample("train")).need("logits")
    model.train(training)
    return replace(data.task, num_classes=logits.shape[-1 if logits.ndim == 3 else 1])
