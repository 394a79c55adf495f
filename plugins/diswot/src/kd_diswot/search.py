"""The score of a candidate without training, and the search that maximises it.

Source: Dong, Li and Wei 2023 (arXiv 2303.15678), section 3; regularised evolution is that of Real et al. 2019
(arXiv 1802.01548), algorithm 1.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_diswot.functional import batch_similarity, channel_similarity
from kd_diswot.options import DisWOTOptions
from kd_diswot.space import SearchSpace
from kdcore import Model, Outputs, Run, SearchStage, Trial
from kdcore.data import derive_seed, seeded, to_device
from kdcore.errors import ModelError, RecipeError
from kdcore.models import Batch

PATIENCE = 200
"""Draws without anything new after which what is left of a space is listed and drawn from."""
LISTED = 100_000
"""The largest space that is listed."""


def initialise(module: nn.Module, kind: str) -> None:
    """Random weights in place, whatever they were: `gaussian` is N(0, 1) for convolutions and linear layers with
    biases of 0, `default` what each layer starts with. Norms start at weight 1, bias 0."""
    for part in module.modules():
        if kind == "gaussian" and isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif callable(reset := getattr(part, "reset_parameters", None)):
            reset()


def outputs_and_gradient(model: Model, batch: Batch) -> tuple[Outputs, Tensor]:
    """What a model says in training mode, and the gradient `[C, D]` of the cross-entropy by its classifier's weight."""
    outputs = model.train()(batch)
    loss = F.cross_entropy(outputs.need("logits").float(), batch["label"])
    weight = model.head[1].weight
    (gradient,) = torch.autograd.grad(loss, [weight])  # nothing gathers in `.grad` from candidate to candidate
    return outputs, gradient.flatten(1)


def similarity(
    student: Model, teacher: Model, batch: Batch, taps: tuple[str, str], terms: Sequence[str]
) -> dict[str, float]:
    """Minus the semantic and the relation loss of two networks as they are; 0 is the most. Equal batches are equal
    scores in any order of their samples.

    Args:
        student, teacher: with the maps before pooling tapped.
        batch: images and labels.
        taps: their tap names.
        terms: `semantic`, `relation` or both.

    Raises:
        ModelError: for the semantic term, where the classifiers read different numbers of features.
    """
    (ours, our_gradient), (theirs, their_gradient) = (outputs_and_gradient(m, batch) for m in (student, teacher))
    scores = {}
    with torch.no_grad():
        if "semantic" in terms:
            if our_gradient.shape != their_gradient.shape:
                raise ModelError(
                    f"the classifiers of candidate and teacher read {our_gradient.shape[1]} and "
                    f"{their_gradient.shape[1]} features: the semantic term needs as many (change a width), or do "
                    "without it: method.terms=[relation]"
                )
            scores["semantic"] = -float(channel_similarity(our_gradient.float(), their_gradient.float()))
        if "relation" in terms:
            maps = ours.features[taps[0]].float(), theirs.features[taps[1]].float()
            scores["relation"] = -float(batch_similarity(*maps))
    return scores


class Search(SearchStage):
    """Architectures of the student's space, scored at random initialisation beside the teacher's architecture."""

    def __init__(self, run: Run, space: SearchSpace, options: DisWOTOptions) -> None:
        super().__init__("search")
        self.space, self.options = space, options
        self.limited = options.flops_max is not None or options.parameters_max is not None
        self.run = run
        self._affordable: dict[str, bool] = {}
        self._batch: Batch = {}
        self._teacher: Model | None = None

    # -- what is tried -------------------------------------------------------------------------------------------

    def propose(self, archive: Sequence[Trial], rng: random.Random) -> str | None:
        """An architecture not tried yet that keeps the limits; `None` after the budget, or when there is none left."""
        o = self.options
        budget = self.space.size if o.strategy == "exhaustive" else min(o.budget, self.space.size)
        if len(archive) >= budget:
            return None
        seen = {trial.candidate for trial in archive}
        if o.strategy != "exhaustive":
            for _ in range(PATIENCE):
                arch = self._draw(archive, rng)
                if arch not in seen and self.affordable(arch):
                    return arch
            if self.space.size > LISTED:
                return None
        left = [arch for arch in self.space if arch not in seen]
        if o.strategy != "exhaustive":
            left = rng.sample(left, min(len(left), 5 * PATIENCE))
        return next((arch for arch in left if self.affordable(arch)), None)

    def _draw(self, archive: Sequence[Trial], rng: random.Random) -> str:
        """One of the space, or a mutation of a winner among the youngest."""
        o = self.options
        if o.strategy == "random" or len(archive) < o.population:
            return self.space.random(rng)
        living = list(zip(fitness(archive, o), archive, strict=True))[-o.population :]
        tournament = rng.sample(living, min(o.tournament, len(living)))
        best = sorted(tournament, key=lambda pair: pair[0], reverse=True)[: o.parents]
        return self.space.mutate(rng.choice(best)[1].candidate, rng)

    def affordable(self, arch: str) -> bool:
        """Whether an architecture keeps to the limits of operations and parameters."""
        o = self.options
        if self.limited and arch not in self._affordable:
            cost = self.run.variant("student", arch=arch).describe(self.run.data.sample("train", 1), repeats=1)
            self._affordable[arch] = cost["flops"] <= (o.flops_max or math.inf) and cost["parameters"] <= (
                o.parameters_max or math.inf
            )
        return self._affordable.get(arch, True)

    # -- how it is scored ----------------------------------------------------------------------------------------

    def score(self, run: Run, candidate: Any) -> Mapping[str, float]:
        """The terms and their sum as `score`, averaged over `repeats`."""
        found = [self._score_once(run, candidate, repeat) for repeat in range(self.options.repeats)]
        terms = {name: statistics.fmean(scores[name] for scores in found) for name in found[0]}
        total = sum(terms.values())
        return {"score": total if math.isfinite(total) else -math.inf, **terms}

    def _score_once(self, run: Run, arch: str, repeat: int) -> dict[str, float]:
        o = self.options
        student, teacher = run.variant("student", arch=arch), self._random_teacher(run, repeat)
        with seeded(derive_seed(run.seed, "candidate", arch, repeat)):
            initialise(student.module, o.init)
        student.to(run.device)
        batch = self._one_batch(run)
        if o.proxy is not None:
            return {"proxy": -proxy_loss(run, o.proxy, student, teacher, batch)}
        (ours,), (theirs,) = student.tap(o.student_layer), teacher.tap(o.teacher_layer)
        return similarity(student, teacher, batch, (ours, theirs), o.terms)

    def _random_teacher(self, run: Run, repeat: int) -> Model:
        """The teacher's architecture with random weights, the same for all candidates."""
        if self._teacher is None:
            self._teacher = run.variant("teacher").to(run.device)
            self._teacher.requires_grad_(True)
        with seeded(derive_seed(run.seed, "random teacher", repeat)):
            initialise(self._teacher.module, self.options.init)
        return self._teacher

    def _one_batch(self, run: Run) -> Batch:
        """The first training batch of the run's seed, the same for all candidates; smaller where the data is."""
        if not self._batch:
            size = min(self.options.batch, run.data.size("train") or self.options.batch)
            loader = run.data.train_loader("train", size, seed=run.seed, start=0, stop=1, augment=False)
            self._batch = to_device(next(iter(loader)), run.device)
        return self._batch


def proxy_loss(run: Run, name: str, student: Model, teacher: Model, batch: Batch) -> float:
    """Another distillation loss between two random networks; its adapters are random too."""
    loss = run.loss(name)
    loss.bind(student, teacher)
    with torch.no_grad(), seeded(derive_seed(run.seed, name)):
        value = loss.to(run.device)(student.train()(batch), teacher.train()(batch), batch)
    return float(sum(value.values()) if isinstance(value, dict) else value)


def fitness(archive: Sequence[Trial], options: DisWOTOptions) -> list[float]:
    """What a search maximises, for every trial: the score, or the sum of the terms' z-scores over the archive."""
    if not options.normalise or options.proxy is not None:
        return [trial.scores["score"] for trial in archive]
    totals = [0.0] * len(archive)
    for term in options.terms:
        values = [trial.scores[term] for trial in archive]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values) or 1.0
        totals = [total + (value - mean) / deviation for total, value in zip(totals, values, strict=True)]
    return totals


def best(archive: Sequence[Trial], options: DisWOTOptions) -> str:
    """The architecture with the highest fitness; of several, the one tried first.

    Raises:
        RecipeError: if none has a finite score.
    """
    scored = list(zip(fitness(archive, options), archive, strict=True))
    value, winner = max(scored, key=lambda pair: pair[0])
    if not math.isfinite(value):
        raise RecipeError("no architecture has a finite score: networks without normalisation overflow with "
                          "method.init=gaussian; set method.init=default")  # fmt: skip
    return str(winner.candidate)
