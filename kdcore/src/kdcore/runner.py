"""Runs: a recipe becomes stages, stages become artifacts, artifacts a student and a result."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed

from kdcore import caching, engine, evaluation, folder
from kdcore.card import model_card, now
from kdcore.checkpoint import reading
from kdcore.components import Kind
from kdcore.data import DataModule, derive_seed, seeded
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError
from kdcore.folder import RunFolder
from kdcore.losses import Loss, Weighted
from kdcore.metrics import higher_is_better, metric_names
from kdcore.models import Model, Source, check_pair
from kdcore.plugins import PluginManager
from kdcore.processes import make_accelerator, together
from kdcore.recipe import Resolved, with_changes
from kdcore.signals import GRACE, Signals
from kdcore.stages import Method, Stage, Supervised, TrainStage, check_roles
from kdcore.text import TextTeacher

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run ends with.

    Args:
        path: the run folder.
        metrics: `split/metric` of the student at the end.
        rows: lines of a comparison table, where the method made one; each a mapping of column to value.
        student: the trained student (the first, where there are several).
    """

    path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    student: Model | None = field(default=None, repr=False)


class Run:
    """One execution of a recipe: what a method and its stages work with.

    Attributes:
        recipe: the validated recipe.
        data: the data module.
        folder: the run folder; `None` on processes other than the main one.
        accelerator, device, seed: of this run.
        stop_reason: why the stage under way is to end early; set by `request_stop`.
        rows: lines of a comparison table that the method may add to.
    """

    def __init__(
        self, resolved: Resolved, manager: PluginManager, path: Path, given: Mapping[str, Any] | None = None,
        grace: float = GRACE,
    ) -> None:  # fmt: skip
        self.resolved, self.recipe, self.manager, self.path = resolved, resolved.recipe, manager, path
        self.given = dict(given or {})
        self.seed = self.recipe.seed
        self.accelerator = make_accelerator(self.recipe, path)
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.folder: RunFolder | None = None
        self.watch = Signals(grace)
        self.stop_reason: str | None = None
        self.rows: list[dict[str, Any]] = []
        self.extra_metrics: dict[str, tuple[float, bool]] = {}
        self.timings: dict[str, dict[str, float]] = {}
        self.models: dict[str, Source] = {}
        make = self._target("data", self.recipe.data.use)
        self.data: DataModule = self.given.get("data") or make(self.resolved.options["data"])
        self.method: Method = self._target("method", self.recipe.method.use)(self.resolved.options["method"])
        check_roles(self.method, self.recipe, self.given)
        self._check_splits()
        self._index, self._adopted, self._seen = 0, dict[str, Model](), set[str]()

    # -- what a method asks for ----------------------------------------------------------------------------------

    def model(self, role: str, key: str | None = None) -> Model:
        """The model of a role, built once; with a `key`, one more of its kind, kept under that name. Its initial
        weights depend on the run's seed and this name only.

        Raises:
            ModelError: if the recipe does not name the role, or the model does not fit the data.
        """
        name = key or role
        if name not in self.models:
            self.models[name] = self.fresh(role, name)
        return cast(Model, self.models[name])

    def fresh(self, role: str, name: str | None = None) -> Source:
        """The model of a role before anything is done with it, not kept."""
        with seeded(derive_seed(self.seed, name or role)):
            return self._build(role)

    def variant(self, role: str, **changes: Any) -> Model:
        """One more model of a role with some of its options changed, not kept: what a search tries. Its initial
        weights depend on the run's seed, the role and the changes only.

        Raises:
            ModelError, RecipeError: if there is no such model, or its component takes no such options.
        """
        with seeded(derive_seed(self.seed, role, sorted(changes.items()))):
            return cast(Model, self._build(role, changes))

    @property
    def teacher(self) -> Model:
        """The model of the role `teacher`."""
        return self.model("teacher")

    @property
    def student(self) -> Model:
        """The model of the role `student`."""
        return self.model("student")

    def teachers(self) -> dict[str, Source]:
        """All teachers of the recipe, by role."""
        return {role: self.model(role) for role in [*self.recipe.teachers, *self.given.get("teachers", ())]}

    def text_teacher(self, role: str = "teacher") -> TextTeacher:
        """The teacher of a role that answers with text.

        Raises:
            ModelError: if it is of another kind.
        """
        found: Any = self.model(role)
        if not isinstance(found, TextTeacher):
            spec = self.recipe.teachers.get(role)
            raise ModelError(f"method {self.recipe.method.use!r} asks its teacher for text, which "
                             f"teachers.{role} ({spec.use if spec else type(found).__name__}) does not give; "
                             "teachers that do: kd list teacher --tag text-teacher")  # fmt: skip
        return found

    def adopt(self, role: str, model: Model) -> None:
        """From here on the student of a role is this model: one that the method found, or made of a teacher."""
        self.models[role] = model
        self._adopted[role] = model

    def losses(self) -> list[Weighted]:
        """The recipe's `losses:` list."""
        return [Weighted(self.loss(spec.use, self.resolved.options[f"losses.{i}"]), spec.weight, spec.name or spec.use,
                         spec.warmup, spec.teacher) for i, spec in enumerate(self.recipe.losses)]  # fmt: skip

    def loss(self, name: str, options: Any = None) -> Loss:
        """A loss component by name, with its options or the defaults."""
        component = self.manager.get("loss", name)
        model = component.load_options()
        made: Loss = component.load_target()(options if options is not None or model is None else model())
        return made

    @property
    def metric_names(self) -> list[str]:
        """The metrics of the recipe, or the task's default; the first is the one that comparisons use."""
        return metric_names(self.data.task, self.recipe.eval.metrics)

    def request_stop(self, reason: str) -> None:
        """End the training stage under way after this step, as if it had reached its last."""
        self.stop_reason = reason

    def evaluate(self, stage: TrainStage, split: str) -> dict[str, float]:
        """The metrics of what a stage evaluates on a split, by `split/metric`."""
        evaluation.prepare(self, stage)
        size = self.recipe.train.eval_batch_size or self.recipe.train.batch_size
        return {f"{split}/{k}": v for k, v in evaluation.evaluate(self, stage, split, size).items()}

    def add_row(self, name: str, model: Model) -> None:
        """Add a line to the comparison table: a model's metrics on the splits of `eval.on`."""
        self.rows.append({"model": name, **self._final_metrics(model)})

    def add_metric(self, name: str, value: float, higher_is_better: bool = True) -> None:
        """Add a metric to the result that the task's do not have, as `split/name`; the same on every process."""
        self.extra_metrics[name] = (value, higher_is_better)

    # -- what the engine asks for --------------------------------------------------------------------------------

    def notify(self, event: str, **arguments: Any) -> None:
        """Tell every observing plugin."""
        self.manager.notify(event, run=self, **arguments)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the journal and the trackers."""
        if self.folder:
            self.folder.log(row)
        values = {f"{row['stage']}/{k}": v for k, v in {**row.get("terms", {}), **row.get("metrics", {})}.items()}
        self.accelerator.log(values, step=row["step"])

    def report_metrics(self, stage: TrainStage, step: int, metrics: dict[str, float]) -> None:
        """Keep, log and announce an evaluation."""
        stage.metrics.update(metrics)
        self.log({"stage": stage.name, "step": step, "metrics": metrics})
        self.notify("kd_evaluated", stage=stage, metrics=metrics)

    def forget_rows_after(self, stage: str, step: int) -> None:
        """Drop journal rows of this stage beyond a step, and of stages not finished: they will be written again."""
        if self.folder:
            done = {path.name.partition("-")[2] for path in self.stage_folders() if (path / "artifact").exists()}
            self.folder.keep_rows(
                lambda row: row.get("stage") in done or (row.get("stage") == stage and row.get("step", 0) <= step)
            )

    def note_checkpoint(self, stage: str, step: int) -> None:
        """Write down in `run.json` how far the saved work of a stage goes, so that what is missing later is missed."""
        if self.folder:
            self.folder.update(checkpoints={**self.folder.read().get("checkpoints", {}), stage: step})

    def last_checkpoint(self, stage: str) -> int:
        """What `note_checkpoint` wrote down last; 0 if nothing."""
        return int(self.folder.read().get("checkpoints", {}).get(stage, 0)) if self.folder else 0

    def stage_folders(self) -> list[Path]:
        """The folders of the stages begun so far, in order."""
        found = (self.path / "stages").glob("[0-9]*-*")
        return sorted(found, key=lambda path: int(path.name.partition("-")[0]))

    def signals(self) -> AbstractContextManager[list[int]]:
        """Inside, SIGINT and SIGTERM are collected in the list that this gives; see `Signals`."""
        return self.watch.collected()

    def together(self) -> AbstractContextManager[None]:
        """Inside, processes work apart; afterwards they wait for each other, and what went wrong in one ends all."""
        return together(self.accelerator, self.watch)

    def commit(self, temporary: Path, final: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Make a finished folder of this run permanent: see `kdcore.folder.commit`."""
        folder.commit(temporary, final, facts, self.resolved.fingerprint)

    def verify(self, path: Path) -> dict[str, Any]:
        """The facts of a folder that `commit` wrote; it must be whole, and of this recipe."""
        return folder.verify(path, self.resolved.fingerprint)

    # -- execution -----------------------------------------------------------------------------------------------

    def execute(self) -> Result:
        """Run all stages, those finished earlier excepted, then save the student and the result."""
        self.notify("kd_run_started")
        for role in self.student_roles:  # one that cannot be had is told before a teacher is trained
            self.model(role)
        for role, spec in (*self.recipe.teachers.items(), *self.recipe.students.items()):
            if spec.train is not None and not (spec.cache and spec.cache.filled):
                self._train_role(role, spec.train)
        caching.serve(self)
        program = self.method.stages(self)
        artifact: Any = None
        with contextlib.suppress(StopIteration):
            while True:
                set_seed(derive_seed(self.seed, "method", self._index) % 2**31)  # for the modules that a method makes
                artifact = self._stage(program.send(artifact))
        return self._finish()

    def _train_role(self, role: str, overrides: Mapping[str, Any]) -> None:
        if not isinstance(model := self.model(role), Model):
            raise RecipeError(f"{role}.train: a {type(model).__name__} cannot be trained; leave `train` out")
        stage = Supervised(model, self.data.task, name=role, role=role)
        stage.overrides = overrides
        self._stage(stage)

    def _stage(self, stage: Stage) -> Any:
        """Execute or load one stage; its artifact."""
        self._index += 1
        if not re.fullmatch(r"\w[\w.-]*", stage.name):
            raise RecipeError(f"a stage cannot be named {stage.name!r}: letters, digits, '_', '-' and '.' make a name")
        if self.watch.received:
            raise Interrupted(f"interrupted before stage {stage.name!r}; the same command goes on from here")
        if stage.name in self._seen:
            raise RecipeError(f"two stages of this run are named {stage.name!r}; their names must differ")
        self._seen.add(stage.name)
        where = self.path / "stages" / f"{self._index:02d}-{stage.name}"
        artifact = where / "artifact"
        if not artifact.exists():
            if self.folder and stage.name in self.folder.read().get("artifacts", []):
                logger.warning("stage %s is run again: its artifact %s is gone", stage.name, artifact)
            self.notify("kd_stage_started", stage=stage)
            if self.accelerator.is_main_process:
                where.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            self._execute(stage, where)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:  # here, since a kill may come between artifact and tidying up
            folder.remove(where / "checkpoints")
        facts = self.verify(artifact)
        if self.folder and stage.name not in (done := self.folder.read().get("artifacts", [])):
            self.folder.update(artifacts=[*done, stage.name])
        with reading(artifact):
            if isinstance(stage, TrainStage):
                return evaluation.restore(self, stage, artifact, facts)
            return stage.load(self, artifact)

    def _execute(self, stage: Stage, where: Path) -> None:
        facts: dict[str, Any] = {}
        if isinstance(stage, TrainStage):
            engine.train(self, stage, where)
            facts["metrics"] = stage.metrics
        else:
            set_seed(derive_seed(self.seed, stage.name) % 2**31)
            with self.together():
                stage.share(self, where)
        with self.together():
            if self.accelerator.is_main_process:
                self._write(stage, where, facts)

    def _write(self, stage: Stage, where: Path, facts: Mapping[str, Any]) -> None:
        temporary = where / "artifact.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if isinstance(stage, TrainStage):
            engine.write(stage, temporary)
        else:
            stage.execute(self, where, temporary)
        self.commit(temporary, where / "artifact", facts)

    def _finish(self) -> Result:
        students = {role: cast(Model, m) for role, m in self.models.items() if role in self.student_roles}
        result = Result(self.path, rows=self.rows, student=students.get("student", next(iter(students.values()), None)))
        if result.student is not None:
            result.metrics = self._final_metrics(result.student)
        result.metrics |= {name: value for name, (value, _) in self.extra_metrics.items()}
        if self.folder:
            for role, model in students.items():
                where = self.path / "student" if len(students) == 1 else self.path / "students" / role
                temporary = where.with_name(f"{where.name}.tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                model.save(temporary)
                self.commit(temporary, where, {"role": role})
            folder.write_text(self.path / "README.md", model_card(self, result.metrics))
            self.folder.update(status="finished", finished=now(), metrics=result.metrics, rows=result.rows,
                               higher_is_better=self._higher_is_better(result.metrics),
                               timings={**self.folder.read().get("timings", {}), **self.timings})  # fmt: skip
        self.accelerator.wait_for_everyone()
        self.notify("kd_run_finished", result=result)
        return result

    def _higher_is_better(self, metrics: Mapping[str, float]) -> bool:
        """Whether more is better of the first metric."""
        first = next(iter(metrics), "")
        if first in self.extra_metrics:
            return self.extra_metrics[first][1]
        return not self.metric_names or higher_is_better(self.data.task, self.metric_names[0])

    def _final_metrics(self, student: Model) -> dict[str, float]:
        final = Supervised(student, self.data.task, name="final")
        final._predict = self.method.predict
        if not self.metric_names:
            return {}
        splits = [split for split in self.recipe.eval.on if split in self.data]
        return {k: v for split in splits for k, v in self.evaluate(final, split).items()}

    # -- building ------------------------------------------------------------------------------------------------

    @property
    def student_roles(self) -> list[str]:
        """The roles of the students: those of the recipe in its order, then those that the method adopted."""
        return list(dict.fromkeys([*self.recipe.students, *self.given.get("students", {}), *self._adopted]))

    def _build(self, role: str, changes: Mapping[str, Any] | None = None) -> Source:
        given = {**self.given.get("teachers", {}), **self.given.get("students", {})}
        if role in given:
            return cast(Source, given[role])
        kind: Kind = "teacher" if role in self.recipe.teachers else "student"
        task = self.data.task if kind == "teacher" else self.method.student_task(self.data.task)
        specs = self.recipe.teachers if kind == "teacher" else self.recipe.students
        if role not in specs:
            raise ModelError(f"the method needs a model with the role {role!r}; the recipe names: "
                             f"{', '.join([*self.recipe.teachers, *self.recipe.students]) or 'none'}")  # fmt: skip
        plain = self.resolved.options[f"{kind}s.{role}"]
        options = with_changes(plain, changes, f"{kind}s.{role}") if changes else plain
        model: Source = self._target(kind, specs[role].use)(options, task)
        if kind == "student" or not self.method.own_tokens:
            check_pair(model.labels, task.labels, (f"{kind}s.{role}", "the data"))
        return model

    def _target(self, kind: Kind, name: str) -> Callable[..., Any]:
        return self.manager.get(kind, name).load_target()

    def _check_splits(self) -> None:
        for split in self.method.roles.splits:
            if split not in self.data:
                raise DataError(f"method {self.recipe.method.use!r} needs a split {split!r}; "
                                f"the data has: {', '.join(self.data.splits)}")  # fmt: skip
        for split in self.recipe.eval.on:
            if split not in self.data and "on" in self.recipe.eval.model_fields_set:
                raise DataError(f"eval.on: the data has no split {split!r}; it has: {', '.join(self.data.splits)}")
        if self.recipe.eval.window and self.data.task.kind != "segmentation":
            raise RecipeError(f"eval.window: it slides over the images of a segmentation; a task of kind "
                              f"{self.data.task.kind!r} has none")  # fmt: skip
        _ = self.metric_names  # refuses names that are not there
