"""The method: tune the language model on prompts, write down its states, align the graph network's layers with them.

Source: Hu et al. 2025, "Large Language Model Meets Graph Neural Network in Knowledge Distillation" (arXiv 2402.05894).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lingugkd.features import Corpus, Features, assemble, find_corpus, votes
from kd_lingugkd.lm import build_teacher
from kd_lingugkd.losses import TEACHER, LinguGKDLoss, student_states
from kd_lingugkd.options import LinguGKDOptions
from kd_lingugkd.prompts import Prompts
from kd_lingugkd.tuning import Tune
from kd_pyg.graph import GraphData
from kdcore import Distill, Method, Roles, Run, Stage
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError, RecipeError
from kdcore.losses import TaskLoss, Weighted
from kdcore.metrics import Metrics, higher_is_better
from kdcore.models import Model

logger = logging.getLogger(__name__)


class LinguGKD(Method):
    """Three stages: `tune`, `features`, `distill`. The ablation is the student alone, on cross-entropy."""

    roles = Roles(teachers=None)
    stage_names = ("tune", "features", "distill")
    ablation: Mapping[str, Any] = {"method.distillation": False}
    cut: Mapping[str, Any] = {"stages.tune.train.optimizer": {"name": "sgd", "lr": 0.003}, "method.shard_size": 100}
    options: LinguGKDOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages.

        Raises:
            DataError: if the data is no graph, or nodes have no texts.
            ModelError: if the student has fewer layers than hops, or the teacher is no causal language model.
            RecipeError: if there is no teacher, or the best epoch would be told by the test.
        """
        o, data = self.options, run.data
        if not isinstance(data, GraphData):
            raise DataError("lingugkd needs a graph whose nodes have texts: data such as `planetoid` or `graph-files`")
        _check_selection(run, o)
        if o.distillation:
            _check_hops(run, o)
            if o.features:
                corpus = find_corpus(o.features, len(data.graph.y), o.hops, o.asks_for_answers)
            else:
                corpus = yield from self._ask(run)
            nodes = data.nodes("train").tolist()
            kept, states = assemble(corpus, nodes, data.graph.y, o.hops, o.feature_mode)
            if lost := len(nodes) - len(kept):
                logger.warning("%d of %d training nodes lack a state of the teacher and are left out", lost, len(nodes))
            loss: Weighted = Weighted(LinguGKDLoss(o, run.seed), name="lingugkd")
            stage = Align(run, loss, o, with_states(data, kept, states))
            _report_teacher(run, data, corpus, o)
        else:
            stage = Align(run, Weighted(TaskLoss(data.task), name="task"), o)
        trained = yield stage
        trained.restore_best()

    def _ask(self, run: Run) -> Generator[Stage, Any, Corpus]:
        """Tune the teacher, and compute its states."""
        o, data = self.options, run.data
        assert isinstance(data, GraphData)
        if not (data.labels("train") != IGNORE).any():
            raise DataError("no node of the split 'train' has a label")
        prompts = Prompts(data, o, run.seed)
        teacher = build_teacher(run, o, prompts)
        if o.tuning != "none":
            yield Tune(run, teacher, prompts, o)
        wanted: set[int] = set(data.nodes("train").tolist())
        if o.measure_teacher:
            wanted |= {node for split in run.recipe.eval.on if split in data for node in data.nodes(split).tolist()}
        labelled = [node for node in sorted(wanted) if prompts.labels[node] != IGNORE]
        corpus: Corpus = yield Features(teacher, prompts, labelled, o.asks_for_answers, o)
        return corpus


class Align(Distill):
    """The student's training, after which it can be what it was when it did best on val.

    Args:
        run: for student, data and metrics.
        loss: of the method, or the task's alone.
        options: for the selection.
        data: with the teacher's states, where it is not the run's.
    """

    best_value: Tensor

    def __init__(self, run: Run, loss: Weighted, options: LinguGKDOptions, data: DataModule | None = None) -> None:
        super().__init__(run.student, [loss], name="distill")
        self.data = data
        self.names = run.metric_names
        self.best: Model | None = None
        if options.selection == "best":
            self.exports = {}  # its last weights; the best ones are saved at the end of the run
            self.best = copy.deepcopy(run.student).freeze()
            self.register_buffer("best_value", torch.tensor(-torch.inf))

    def make_metrics(self, task: Task, names: Sequence[str], device: torch.device) -> Metrics:
        """Metrics that, computed, keep the student if it is the best so far."""
        return _Watched(task, self.names, device, self)

    def keep_if_best(self, value: float) -> None:
        """Keep a copy of the student's weights if the value is greater than before."""
        if self.best is not None and value > self.best_value.item():
            self.best_value.fill_(value)
            self.best.module.load_state_dict(self.student.module.state_dict())

    def restore_best(self) -> None:
        """Give the student the weights that were kept, if any were."""
        if self.best is not None and self.best_value.isfinite():
            self.student.module.load_state_dict(self.best.module.state_dict())


class _Watched(Metrics):
    """Tells a stage the first metric."""

    def __init__(self, task: Task, names: Sequence[str], device: torch.device, stage: Align) -> None:
        super().__init__(task, names, device)
        self.stage, self.sign = stage, 1.0 if higher_is_better(task, names[0]) else -1.0

    def compute(self) -> dict[str, float]:
        """The values over all batches and processes."""
        found = super().compute()
        self.stage.keep_if_best(self.sign * next(iter(found.values())))
        return found


class WithStates(Dataset[dict[str, Any]]):
    """Samples of a split with the teacher's states `[L, D]`.

    Args:
        split: map-style.
        rows: which of its samples.
        states: of these, `[n, L, D]`.
    """

    def __init__(self, split: Any, rows: Sequence[int], states: Tensor) -> None:
        self.split, self.rows, self.states = split, rows, states

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.split[self.rows[index]], TEACHER: self.states[index]}

    def column(self, name: str) -> Tensor:
        """A column of all samples."""
        found: Tensor = self.split.column(name)[self.rows]
        return found


def with_states(data: DataModule, rows: Sequence[int], states: Tensor) -> DataModule:
    """The data with the teacher's states beside the training nodes, of which only `rows` are left."""
    splits = {**data.splits, "train": WithStates(data["train"], rows, states)}
    return DataModule(splits, data.task, collate=data.collate, augment=data.augment)


def _check_hops(run: Run, options: LinguGKDOptions) -> None:
    with torch.no_grad():
        student_states(run.student.eval()(run.data.sample("train", 2)), options.hops + 1)


def _check_selection(run: Run, options: LinguGKDOptions) -> None:
    split = run.recipe.eval.on[0]
    if options.selection == "best" and split == "test":
        raise RecipeError("method.selection=best would pick the student by its test nodes: put val first in eval.on, "
                          "or set selection to last")  # fmt: skip
    if options.selection == "best" and split not in run.data:
        raise RecipeError(f"method.selection=best picks the student by the split {split!r}, which the data does not "
                          "have: put one that it has first in eval.on, or set selection to last")  # fmt: skip


def _report_teacher(run: Run, data: GraphData, corpus: Corpus, options: LinguGKDOptions) -> None:
    """Lines of the comparison table: the teacher's accuracy by hop, and by majority over the hops."""
    if not options.measure_teacher:
        return
    for hop in (*range(options.hops + 1), None):
        found, asked = votes(corpus, data.task.class_count, hop)
        row = {f"{split}/accuracy": _accuracy(data, split, found, asked) for split in run.recipe.eval.on
               if split in data and asked[data.nodes(split)].any()}  # fmt: skip
        if row:
            run.rows.append({"model": "teacher, all hops" if hop is None else f"teacher, hop {hop}", **row})


def _accuracy(data: GraphData, split: str, found: Tensor, asked: Tensor) -> float:
    """Share of the nodes asked about whose majority is right; a node without a vote for any class is wrong."""
    nodes = data.nodes(split)
    nodes = nodes[asked[nodes]]
    right = (found[nodes].argmax(1) == data.graph.y[nodes]) & (found[nodes].amax(1) > 0)
    return float(right.float().mean())
