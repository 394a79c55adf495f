"""Training stages: what those of one student share; a weighted sum of losses on texts of the data, the teacher or the
student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_llm_kd_suite.options import SuiteOptions
from kd_llm_kd_suite.texts import Buffer, Schedule
from kdcore import Distill, Outputs, TrainStage
from kdcore.generation import Sampler, join_rows, row_seeds, split_rows
from kdcore.losses import Weighted
from kdcore.models import Batch, Model, Source
from kdcore.options import Sampling


class StudentStage(TrainStage):
    """A stage that trains one student, which may write in it; what is measured and kept is the student.

    Args:
        student: the model that is trained.
        options: of the suite.
        name: the stage's name.
        seed: of the run.
        sampler: who writes, where it is not the student in this process.
    """

    def __init__(self, student: Model, options: SuiteOptions, name: str, seed: int = 0,
                 sampler: Sampler | None = None) -> None:  # fmt: skip
        super().__init__(name)
        self.student, self.options, self.run_seed = student, options, seed
        self.exports = {"student": student}
        self._sampler: list[Sampler] = [sampler or student]  # in a list, so that the student is not registered twice

    @property
    def sampler(self) -> Sampler:
        """Who writes."""
        return self._sampler[0]

    def evaluate(self, batch: Batch) -> Outputs:
        """The student's outputs."""
        outputs: Outputs = self.student(batch)
        return outputs


class SequenceDistill(Distill):
    """Distillation of a language model on texts that a schedule chooses, step by step.

    Args:
        student: the model that is trained.
        losses: the terms on every text.
        teachers: as in `Distill`.
        sampling: how texts are written.
        schedule: which texts a step is on.
        capacity: of the buffer of the student's texts.
        seed: of the run.
        gold: terms on the data's own texts only, in steps that are on them.
        sampler: who writes the student's texts, where it is not the student in this process.
        name: the stage's name.
    """

    def __init__(
        self, student: Model, losses: Sequence[Weighted], teachers: Source | Mapping[str, Source] | None, *,
        sampling: Sampling, schedule: Schedule, capacity: int, seed: int, gold: Sequence[Weighted] = (),
        sampler: Sampler | None = None, name: str = "distill",
    ) -> None:  # fmt: skip
        super().__init__(student, [*losses, *gold], teachers, name=name)
        self.buffer = Buffer(capacity)
        self.sampling, self.schedule, self.run_seed = sampling, schedule, seed
        self._sampler: list[Sampler] = [sampler or student]  # in a list, so that the student is not registered twice
        self.gold = {item.name for item in gold}
        self.kind = "data"

    @property
    def sampler(self) -> Sampler:
        """Who writes the student's texts."""
        return self._sampler[0]

    def before_step(self, batches: list[Batch]) -> None:
        """Put the chosen texts in the place of the data's."""
        step, parts = self.progress.step, (self.run_seed, self.name, self.progress.step)
        self.schedule.watch(self.buffer, next((v for k, v in self.metrics.items() if k.endswith("/perplexity")), None))
        self.kind = self.schedule.choose(self.buffer, self.progress.fraction, *parts)
        if self.kind == "data":
            return
        self.sampler.follow(self.student, step)
        for batch in batches if self.kind != "old" else ():
            _replace(batch, self._written(batch))
        for batch in batches if self.kind != "teacher" and self.schedule.replay else ():
            _replace(batch, self.buffer.draw(batch, *parts, "old"))

    def _written(self, batch: Batch) -> Batch:
        """A batch with answers of the teacher or, revised, of the student in the place of its own."""
        writer: Any = self.teachers["teacher"] if self.kind == "teacher" else self.sampler
        prompts, _ = split_rows(batch)
        seeds = row_seeds(batch, self.run_seed, self.name, self.progress.step)
        answers = writer.write(prompts, self.sampling, seeds)
        if self.kind == "new":
            answers = self.revise(prompts, answers, seeds)
            if self.schedule.replay:
                self.buffer.push([{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
        return join_rows(prompts, answers, batch)

    def revise(self, prompts: list[list[int]], answers: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """What is made of the student's answers before it learns from them: nothing."""
        return answers

    def terms(self, student: Outputs, teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        """The weighted terms; those on the data's texts are 0 in a step on others."""
        if self.kind == "data" or not self.gold or not self.training:
            return super().terms(student, teachers, batch)
        whole, self.weighted = self.weighted, [item for item in self.weighted if item.name not in self.gold]
        try:
            found = super().terms(student, teachers, batch)
        finally:
            self.weighted = whole
        nothing = torch.zeros((), device=batch["input_ids"].device)
        return {**found, **dict.fromkeys(sorted(self.gold), nothing)}


def _replace(batch: Batch, other: Batch) -> None:
    batch.clear()
    batch.update(other)
