"""Methods and the stages they are made of."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcore.data import DataModule, Task
from kdcore.errors import ModelError, RecipeError, did_you_mean
from kdcore.losses import Loss, Progress, TaskLoss, Weighted, named_terms
from kdcore.metrics import Metrics
from kdcore.models import Batch, Labels, Model, Outputs, Source, check_pair, map_tensors
from kdcore.processes import gather_with_grad, world_size
from kdcore.recipe import OptimizerOptions, Recipe, ScheduleOptions, TrainOptions
from kdcore.training import FUSED, OPTIMIZERS

if TYPE_CHECKING:
    from kdcore.runner import Run


class Stage:
    """One resumable unit of work with a name and an artifact.

    A stage that is neither trained nor fitted implements `execute` and `load`. `execute` runs on the main process
    only; it may keep partial work in `workspace`, which survives a kill, and writes the artifact's files into
    `artifact`, which is kept only if `execute` returns. Work that all processes share goes into `share`.
    """

    name: str = "stage"
    total_steps: int = 0
    """How many steps it announces by `kd_step_finished` in all, where that is known; known when the first is done."""
    note: str = ""
    """What is to be told when it starts, such as what it takes."""

    def share(self, run: Run, workspace: Path) -> None:
        """Do this process's part, before `execute`; every process is called, and what they leave is in `workspace`."""

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Do the work."""
        raise TypeError(f"{type(self).__name__} does not implement execute(run, workspace, artifact)")

    def load(self, run: Run, artifact: Path) -> Any:
        """Read the artifact of the finished stage: what `yield` hands back to the method."""
        raise TypeError(f"{type(self).__name__} does not implement load(run, artifact)")


class FitStage(Stage):
    """A closed-form stage: PCA, k-means, statistics. `fit` returns tensors; they are the artifact."""

    def fit(self, run: Run) -> dict[str, Tensor]:
        """Compute the tensors."""
        raise TypeError(f"{type(self).__name__} does not implement fit(run)")

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Fit, and write the tensors."""
        from safetensors.torch import save_file

        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.fit(run).items()}, artifact / "tensors.safetensors"
        )

    def load(self, run: Run, artifact: Path) -> dict[str, Tensor]:
        """The tensors, on the run's device."""
        from safetensors.torch import load_file

        return load_file(artifact / "tensors.safetensors", device=str(run.device))


class TrainStage(nn.Module, Stage):
    """A stage that trains. `forward(batch, objective)` returns the named, weighted terms of one objective.

    Its registered submodules are what is trained and what checkpoints hold: queues and prototypes are buffers, an EMA
    teacher is a registered module without gradient. Frozen models hang in `frozen`, which does not register them.

    Attributes:
        objectives: what one iteration optimises, in order; each has its own backward pass and optimizer step.
        splits: the data drawn together. With several, `forward` gets a dict of batches by split; an epoch is one of
            the first.
        augment: whether the training data is augmented.
        find_unused_parameters: whether a step may leave parameters without gradient (needed by DDP, costs time).
        shardable: whether `train.shard` may divide its parameters over the processes; not where `forward` calls parts
            of a network by themselves, or what is trained hangs in a model that is not registered.
        seed: for the order of the data and the random numbers, where it is not to be the run's.
        data: what the stage draws from and is measured on, where it is not the run's.
        frozen: models that are used but neither trained nor saved; moved to the device and kept in evaluation mode.
        exports: models saved in their native format with the artifact, by name.
        overrides: changes of the recipe's `train` section for this stage; `stages.<name>` has the last word.
        schedules: learning-rate schedules of single objectives, where they are not the recipe's.
        progress: how far the stage has come; current in every step.
        total_steps: how many steps it has, known when it starts.
        metrics: the last evaluation during training, by `split/metric`.
    """

    objectives: tuple[str, ...] = ("loss",)
    splits: tuple[str, ...] = ("train",)
    augment: bool = True
    find_unused_parameters: bool = False
    shardable: bool = True
    seed: int | None = None
    data: DataModule | None = None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.frozen: dict[str, Source] = {}
        self.exports: dict[str, Model] = {}
        self.overrides: Mapping[str, Any] = {}
        self.schedules: Mapping[str, ScheduleOptions] = {}
        self.progress = Progress()
        self.total_steps = 0
        self.metrics: dict[str, float] = {}

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The terms of an objective: scalars, each a mean over the units that `counts` counts."""
        raise TypeError(f"{type(self).__name__} does not implement forward(batch, objective)")

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """How many units each term is a mean over in this batch, by term name up to its first `/`. A term that is
        not named counts samples; `None` marks one that already spans all processes."""
        return {}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One optimizer per objective. Default: for the only objective, over all parameters with gradient."""
        if len(self.objectives) > 1:
            raise TypeError(f"{type(self).__name__} has several objectives and must implement optimizers(train)")
        return {self.objectives[0]: make_optimizer(self.parameters(), train.optimizer)}

    def setup(self, data: DataModule) -> None:
        """Called with the data before `prepare`, for a stage that must know more of it than a batch."""

    def prepare(self, batch: Batch) -> None:
        """One forward per objective on a sample batch, so that lazy adapters exist before the optimizers do."""
        for objective in self.objectives:
            self(batch, objective)

    def before_step(self, batches: list[Batch]) -> None:
        """Called with a step's micro-batches before anything is computed from them."""

    def after_step(self) -> None:
        """Called without gradient after the optimizers stepped: the place for EMA, queues and centring."""

    def evaluate(self, batch: Batch) -> Outputs | None:
        """Outputs to measure, or `None` for a stage that is not evaluated (the default)."""
        return None

    def make_metrics(self, task: Task, names: Sequence[str], device: torch.device) -> Metrics:
        """The metrics that `evaluate` feeds; default: the recipe's, or the task's own."""
        return Metrics(task, names, device)


class Distill(TrainStage):
    """Teachers forward without gradient, student forward, weighted sum of losses.

    Args:
        student: the model that is trained.
        losses: the terms of the objective.
        teachers: models, or columns of the data, by role; a single one has the role `teacher`.
        name: the stage's name.
        predict: turns the student's outputs into those that are measured, as `Method.predict`.

    Raises:
        ModelError: if a loss needs a role that is not there, or teacher and student do not fit together.
    """

    def __init__(
        self,
        student: Model,
        losses: Sequence[Weighted],
        teachers: Source | Mapping[str, Source] | None = None,
        *,
        name: str = "distill",
        predict: Any = None,
    ) -> None:
        super().__init__(name)
        self.student = student
        self.teachers: dict[str, Source] = (
            dict(teachers) if isinstance(teachers, Mapping) else {"teacher": teachers} if teachers is not None else {}
        )
        self.frozen = {role: teacher.freeze() for role, teacher in self.teachers.items()}
        self.exports = {"student": student}
        self.weighted = _unique_names(losses)
        self.losses = nn.ModuleDict({w.name: w.loss for w in self.weighted})
        self._predict = predict
        for item in self.weighted:
            self._bind(item)

    def setup(self, data: DataModule) -> None:
        """Hand the data to the losses."""
        for item in self.weighted:
            item.loss.setup(data, self.splits[0])

    def _bind(self, item: Weighted) -> None:
        teacher = self.teachers.get(item.teacher)
        needs = item.loss.needs
        if needs.get("teachers") and not self.teachers:
            raise ModelError(f"loss {item.name!r} needs teachers, and the recipe names none (`teachers:`)")
        if needs.get("teacher") and teacher is None:
            raise ModelError(f"loss {item.name!r} needs a teacher with the role {item.teacher!r}; "
                             f"the recipe names: {', '.join(self.teachers) or 'none'}")  # fmt: skip
        for role in self._roles(item):
            if _both_logits(item.loss):
                check_pair(self.teachers[role].labels, self.student.labels, (role, "student"))
        item.loss.bind(self.student, teacher)

    def _roles(self, item: Weighted) -> list[str]:
        """The teachers whose outputs a loss is given."""
        return list(self.teachers) if "teachers" in item.loss.needs else [r for r in self.teachers if r == item.teacher]

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms, by loss."""
        return self.terms(*self.outputs(batch), batch)

    def outputs(self, batch: Batch) -> tuple[Outputs, dict[str, Outputs]]:
        """What the student and, without gradient, each teacher says. (Teachers first: what they need in between is
        then given back before the student's activations stay.)"""
        with torch.no_grad():
            teachers = {role: teacher(batch) for role, teacher in self.teachers.items()}
        return self.student(batch), teachers

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of these outputs, by loss."""
        terms: dict[str, Tensor] = {}
        for item in self.weighted:
            item.loss.progress = self.progress
            theirs = teachers if "teachers" in item.loss.needs else teachers.get(item.teacher, Outputs())
            inputs = (student, theirs, batch)
            if item.loss.relational and world_size() > 1:
                inputs = map_tensors(inputs, functools.partial(gather_with_grad, shares=self.progress.shares))
            factor = item.factor(self.progress)
            for name, value in named_terms(item.name, item.loss(*inputs)).items():
                terms[name] = value if factor == 1.0 else value * factor
        return terms

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Each loss's own count; none for one that spans all processes."""
        return {w.name: None if w.loss.relational else w.loss.count(batch) for w in self.weighted}

    def prepare(self, batch: Batch) -> None:
        """Check that every source gives the signals its losses need, then make the adapters."""
        given = {"student": self.student(batch), **{role: t(batch) for role, t in self.teachers.items()}}
        for item in self.weighted:
            for role in self._roles(item) if _both_logits(item.loss) else ():
                theirs, ours = (Labels(given[r].classes, None, m.labels.vocabulary)
                                for r, m in ((role, self.teachers[role]), ("student", self.student)))  # fmt: skip
                check_pair(theirs, ours, (role, "student"))
            for side, signals in item.loss.needs.items():
                for role in [side] if side == "student" else self._roles(item):
                    source = self.student if role == "student" else self.teachers[role]
                    _check_signals(item.name, role, given[role], signals, getattr(source, "hint", ""))
        super().prepare(batch)

    def evaluate(self, batch: Batch) -> Outputs:
        """The student's outputs, as the method predicts with them."""
        outputs: Outputs = self.student(batch)
        return self._predict(outputs, batch) if self._predict else outputs


class Supervised(Distill):
    """A model trained on the task's own loss: how a teacher is made, or a student trained alone."""

    def __init__(self, model: Model, task: Task, *, name: str, role: str = "student") -> None:
        super().__init__(model, [Weighted(TaskLoss(task), name="supervised")], name=name)
        self.exports = {role: model}


@dataclass(frozen=True)
class Roles:
    """What a method asks the recipe for.

    Args:
        teachers, students: roles; `None` for any.
        splits: splits that the data must have.
        losses: whether the recipe must give a `losses:` list; `None` if it may.
    """

    teachers: tuple[str, ...] | None = ("teacher",)
    students: tuple[str, ...] | None = ("student",)
    splits: tuple[str, ...] = ("train",)
    losses: bool | None = False


class Method:
    """A paper's procedure: a generator of stages. Each `yield` hands back that stage's artifact.

    Attributes:
        roles: what the recipe must name.
        stage_names: names of the stages the method yields, for checking `stages:` in a recipe.
        ablation: recipe overrides that switch the method's idea off: what it has to beat.
        cut: recipe overrides that shorten its quickstart for the conformance suite, where fewer steps do not.
        own_tokens: whether teachers may have another tokenizer than the data.
    """

    roles: Roles = Roles()
    stage_names: tuple[str, ...] = ()
    ablation: Mapping[str, Any] = {}
    cut: Mapping[str, Any] = {}
    own_tokens: bool = False

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages, in order."""
        raise TypeError(f"{type(self).__name__} does not implement stages(run)")

    def student_task(self, task: Task) -> Task:
        """The task as the students' heads see it, where it is not the data's."""
        return task

    def restore(self, student: Model | None, folder: Path) -> Model:
        """The trained student of a finished run, where the method saved more into its `folder` than the model that the
        recipe names; `student` is that one, with its weights, or `None` where the method made the student itself."""
        if student is None:
            raise ModelError(f"{type(self).__name__} does not say how the student in {folder} is loaded")
        return student

    def predict(self, outputs: Outputs, batch: Batch) -> Outputs:
        """Turn the student's outputs into predictions, where the two are not the same."""
        return outputs


def check_roles(method: Method, recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse a recipe that does not name what its method asks for, or overrides a stage that there is not.

    Raises:
        RecipeError: naming the key.
    """
    name = recipe.method.use
    for kind, wanted in (("teacher", method.roles.teachers), ("student", method.roles.students)):
        named = [*getattr(recipe, f"{kind}s"), *given.get(f"{kind}s", {})]
        for role in wanted or ():
            if role not in named:
                raise RecipeError(f"method {name!r} needs a {kind} with the role {role!r} (`{kind}s.{role}:`); "
                                  f"the recipe names: {', '.join(named) or f'no {kind}'}")  # fmt: skip
    if recipe.losses and method.roles.losses is False:
        raise RecipeError(f"method {name!r} has losses of its own and takes no `losses:` list")
    if method.roles.losses and not recipe.losses:
        raise RecipeError(
            f"method {name!r} needs a `losses:` list, such as `losses: [{{use: cross-entropy}}, {{use: kd}}]`"
        )
    trained = [r for r, s in (*recipe.teachers.items(), *recipe.students.items()) if s.train is not None]
    for stage in recipe.stages if method.stage_names else ():
        if stage not in (*method.stage_names, *trained):
            raise RecipeError(f"stages.{stage}: there is no such stage; "
                              f"{did_you_mean(stage, [*trained, *method.stage_names], 'stages')}")  # fmt: skip


def make_optimizer(parameters: Any, options: OptimizerOptions) -> Optimizer:
    """The torch optimizer of a recipe, over the parameters (or parameter groups) that have a gradient."""
    names = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam",
             "rmsprop": "RMSprop", "adagrad": "Adagrad"}  # fmt: skip
    given = options.model_dump(exclude_none=True, include=OPTIMIZERS[options.name])
    groups = [_listed(p) if isinstance(p, dict) else p for p in parameters if isinstance(p, dict) or p.requires_grad]
    if not groups:
        raise RecipeError("there is nothing to train: every parameter is frozen")
    if options.fused is None and options.name in ("adam", "adamw"):
        trained = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
        given["fused"] = all(p.device.type in FUSED and p.is_floating_point() for p in trained)
    return cast(Optimizer, getattr(torch.optim, names[options.name])(groups, lr=options.lr, **given))


def _listed(group: dict[str, Any]) -> dict[str, Any]:
    """A group whose parameters can be gone over twice."""
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def _both_logits(loss: Loss) -> bool:
    """Whether a loss compares logits of student and teacher class by class."""
    theirs = (*loss.needs.get("teacher", ()), *loss.needs.get("teachers", ()))
    return loss.same_labels and "logits" in loss.needs.get("student", ()) and "logits" in theirs


def _check_signals(loss: str, role: str, given: Outputs, signals: Sequence[str], hint: str) -> None:
    for signal in signals:
        if not given.gives(signal):
            has = [s for s in ("logits", "embedding", "features") if given.gives(s)]
            raise ModelError(f"loss {loss!r} needs the {role}'s {signal}, which it does not give "
                             f"(it gives: {', '.join(has) or 'nothing'}){hint}")  # fmt: skip


def _unique_names(losses: Sequence[Weighted]) -> list[Weighted]:
    seen: dict[str, int] = {}
    for item in losses:
        base = item.name or type(item.loss).__name__.lower()
        seen[base] = seen.get(base, 0) + 1
        item.name = base if seen[base] == 1 else f"{base}-{seen[base]}"
    return list(losses)
