"""Distillation on texts that are revised before the student learns from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from kd_llm_kd_suite.stages import SequenceDistill
from kd_llm_kd_suite.texts import Buffer, Kind, Schedule
from kd_mgsr_llm.losses import DACKL
from kd_mgsr_llm.options import MGSROptions
from kd_mgsr_llm.revision import correct_and_regenerate
from kdcore.data import derive_seed
from kdcore.generation import Sampler
from kdcore.losses import Weighted
from kdcore.models import Batch, Model
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class Mixed(Schedule):
    """Steps on texts of the student are on new ones or on the buffer's schedule, with equal chance."""

    def choose(self, buffer: Buffer, done: float, *parts: object) -> Kind:
        """What a step is on; says in `replay` whether it goes through the buffer."""
        self.replay = random.Random(derive_seed(*parts, "policy")).random() < 0.5
        return super().choose(buffer, done, *parts)


class RevisedDistill(SequenceDistill):
    """Distillation on the data's texts and on texts of the student that the teacher has corrected.

    Args:
        student: the model that is trained.
        teacher: the model that it learns from, and that corrects it.
        losses: the terms on every text.
        gold: the terms on the data's texts only.
        options: of the method.
        seed: of the run.
        sampler: who writes the student's texts, where it is not the student in this process.
    """

    def __init__(
        self, student: Model, teacher: Model, losses: Sequence[Weighted], gold: Sequence[Weighted],
        options: MGSROptions, seed: int, sampler: Sampler | None = None,
    ) -> None:  # fmt: skip
        make = Mixed if options.policy == "mixed" else Schedule
        schedule = make(options.student_data_fraction, replay=options.policy == "off")
        super().__init__(student, losses, teacher, sampling=options.sampling, schedule=schedule,
                         capacity=options.buffer_capacity, seed=seed, gold=gold, sampler=sampler)  # fmt: skip
        self.options = options
        self.clipped = [item.loss for item in self.weighted if isinstance(item.loss, DACKL)]

    def before_step(self, batches: list[Batch]) -> None:
        """Choose the texts, and tell the clipped divergence whose they are."""
        super().before_step(batches)
        for loss in self.clipped:
            loss.gold = self.kind == "data"

    def revise(self, prompts: list[list[int]], answers: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """The student's answers, corrected by the teacher and written on by the student."""
        if not self.options.scrg:
            return answers
        return correct_and_regenerate(
            prompts, answers, seeds, teacher=self.teachers["teacher"], student=self.student, sampling=self.sampling,
            rounds=self.options.scrg_rounds, sampler=self.sampler,
        )  # fmt: skip

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One, with a learning rate of their own for the networks that clip."""
        levels = [p for loss in self.clipped for p in loss.parameters()]
        others = [p for p in self.parameters() if p.requires_grad and all(p is not own for own in levels)]
        groups: list[dict[str, Any]] = [{"params": others}]
        if levels:
            groups.append({"params": levels, "lr": self.options.dac_lr_mult * train.optimizer.lr})
        return {"loss": make_optimizer(groups, train.optimizer)}
