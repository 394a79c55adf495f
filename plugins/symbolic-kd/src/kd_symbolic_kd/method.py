"""The method: events, tails, critic, filter, student.

Source: West et al. 2022, "Symbolic Knowledge Distillation: from General Language Models to Commonsense Models" (arXiv
2110.07178). The student minimises -E[log p(tail | head, relation)] over what the teacher writes and the critic accepts.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kd_symbolic_kd.critic import Critic, Reader, TrainCritic, make_critic
from kd_symbolic_kd.data import TripleData
from kd_symbolic_kd.options import SymbolicKDOptions
from kd_symbolic_kd.prompts import tail_prompter
from kd_symbolic_kd.stages import Answers, Events, Filter, inferences, labelled_splits, shown_examples
from kd_symbolic_kd.student import with_special_tokens
from kdcore import Method, Roles, Run, Stage
from kdcore.data import DataModule, Task, derive_seed
from kdcore.errors import DataError, RunFailed
from kdcore.stages import Supervised


class SymbolicKD(Method):
    """Six stages: `events` and `inferences` are the teacher's corpus, `critic` and `filter` what is kept of it,
    `distill` is the student, `answers` what it says about held-out heads.

    A second teacher with the role `inferences`, if the recipe names one, writes the tails. The ablation keeps as many
    triples as the critic would, at random.
    """

    roles = Roles(splits=("train",))
    stage_names = ("events", "inferences", "critic", "filter", "distill", "answers")
    ablation: Mapping[str, Any] = {"method.filter": "random"}
    options: SymbolicKDOptions

    def student_task(self, task: Task) -> Task:
        """The task without its vocabulary: a student that was trained before gets the special tokens only later."""
        return replace(task, num_classes=None, vocabulary=None)

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. What is wrong with data or templates is told before the teacher is asked anything.

        Raises:
            DataError: if the data holds no triples, or none that a stage needs.
            ModelError: if the teacher gives no text, or the student cannot take the special tokens.
        """
        o, data = self.options, triple_data(run)
        teacher = run.text_teacher()
        second = run.text_teacher("inferences") if "inferences" in run.recipe.teachers else teacher
        labelled = {} if o.filter == "none" else labelled_splits(data)
        student = with_special_tokens(run.student, data.task, derive_seed(run.seed, "special tokens"))
        run.adopt("student", student)
        tail_prompter(o, shown_examples(o, data["train"], run.seed), run.seed)

        events = yield Events(o, teacher, seed_events(o, data, run.seed), run.seed)
        corpus = yield inferences(o, second, data, events, run.seed)
        judge: tuple[Critic, Reader, float] | None = None
        if labelled:
            critic, reader = make_critic(o, data.task, labelled["train"], run.seed)
            trained = yield TrainCritic(critic, reader, labelled["train"], labelled["val"], run.recipe.eval.on[0])
            held_out = {split: labelled[split] for split in ("val", "test")}
            corpus, threshold = yield Filter(o, trained.chosen(), reader, held_out, corpus)
            judge = (trained.chosen(), reader, threshold)
        written = training_triples(corpus)
        yield distill_stage(run, data, written)
        pairs = set(zip(written["head"], written["relation"], strict=True))
        metrics = yield Answers(o, student, data, [s for s in run.recipe.eval.on if s in data], pairs, judge)
        for name, value in metrics.items():
            run.add_metric(name, value)


def triple_data(run: Run) -> TripleData:
    """The run's data. Raises `DataError` if it is of another kind."""
    if not isinstance(run.data, TripleData):
        raise DataError("symbolic-kd needs triples of head, relation and tail: `data: {use: triples, path: ...}`, or a "
                        "kd_symbolic_kd.data.TripleData")  # fmt: skip
    return run.data


def seed_events(options: SymbolicKDOptions, data: TripleData, seed: int) -> list[str]:
    """Different training heads to show in prompts, drawn at random. Raises `DataError` if none has the prefix."""
    heads = sorted({row["head"] for row in data["train"] if row["head"].startswith(options.event_prefix)})
    if not heads:
        raise DataError(f"no head of the training data begins with {options.event_prefix!r}; see method.event_prefix")
    return random.Random(derive_seed(seed, "seed events")).sample(heads, min(options.seed_events, len(heads)))


def training_triples(corpus: Any) -> Any:
    """The training split of what was kept, without where it comes from. Raises `RunFailed` if it is empty."""
    rows = np.flatnonzero(np.array(corpus["split"][:]) == "train")
    if not rows.size:
        raise RunFailed(f"of {len(corpus)} triples that the teacher wrote none is of the training split: raise "
                        "method.event_prompts, or its share in method.fractions")  # fmt: skip
    return corpus.select(rows).select_columns(["head", "relation", "tail"])


def distill_stage(run: Run, data: TripleData, written: Any) -> Supervised:
    """The student on the corpus, measured on the data's own triples: cross-entropy of the tail's tokens."""
    stage = Supervised(run.student, data.task, name="distill")
    splits = {split: data[split] for split in run.recipe.eval.on if split in data}
    stage.data = DataModule({**splits, "train": written}, data.task, collate=data.batch)
    return stage
