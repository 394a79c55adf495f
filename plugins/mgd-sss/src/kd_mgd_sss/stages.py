"""The stages: cross pseudo supervision, which makes a teacher, and the distillation of both teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_mgd_sss.functional import cut_mix, hard_pseudo_ce
from kd_mgd_sss.losses import GapLogitL1, HardPseudoCE, OhemCrossEntropy, RegionCosineMSE, full_size
from kd_mgd_sss.options import MGDSSSOptions
from kd_mgd_sss.streams import FIRST, LABELLED, SECOND
from kdcore import DataModule, Loss, Model, Outputs, TrainStage
from kdcore.errors import DataError
from kdcore.losses import TaskLoss, count_samples
from kdcore.models import Batch, Labels, check_pair
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class SemiSupervised(TrainStage):
    """What both stages have in common: three streams drawn together, mixed images, and the supervised term.

    Args:
        name: of the stage.
        drawn: the data with its streams and their names, as `streams.streams` gives them.
        options: of the method.
    """

    def __init__(self, name: str, drawn: tuple[DataModule, tuple[str, ...]], options: MGDSSSOptions) -> None:
        super().__init__(name)
        self.data, self.splits = drawn
        self.options = options
        self.supervised: Loss = (
            OhemCrossEntropy(options.ohem_threshold, options.ohem_min_kept) if options.ohem else TaskLoss(drawn[0].task)
        )

    def mixed(self, batch: Batch) -> Batch:
        """The unlabelled images, each with parts of another. Raises `DataError` as `_mix`."""
        return {
            "image": self._mix(batch[FIRST]["image"], batch[SECOND]["image"], batch),
            "index": batch[FIRST]["index"],
        }

    @torch.no_grad()
    def pseudo_labels(self, model: Model, batch: Batch) -> Tensor:
        """What a model takes the pixels of the mixed images for, judged by the whole images: classes `[B, H, W]`.
        Raises `DataError` as `_mix`."""
        here, there = (full_size(model(part), part).argmax(1) for part in (batch[FIRST], batch[SECOND]))
        return self._mix(here, there, batch)

    def _mix(self, first: Tensor, second: Tensor, batch: Batch) -> Tensor:
        """By the masks of the batch. Raises `DataError` if the two or the masks differ in size."""
        try:
            return cut_mix(first, second, batch[SECOND]["cutmix"])
        except ValueError as error:
            raise DataError(f"{error}: bring all images to one size (the data's `size:`)") from error

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Pixels or images of each term; the supervised one by hard pixels spans all processes by itself."""
        images, labelled, pixels = batch[FIRST], batch[LABELLED], HardPseudoCE()
        return {
            "supervised": None if self.options.ohem else self.supervised.count(labelled),
            "cps": pixels.count(images),
            "pixel": pixels.count(images),
            "labelled-pixel": pixels.count(labelled),
            "image": count_samples(images),
            "region": count_samples(images),
        }


class CrossPseudoSupervision(SemiSupervised):
    """Stage 1 (Chen et al. 2021, arXiv 2106.01226): two branches of one architecture, each of which learns from the
    labels and from what the other takes the mixed images for. Each has an optimizer of its own; the first is kept.

    Args:
        role: of the teacher that it makes.
        branches: two models with different weights.
        drawn, options: as `SemiSupervised`.
    """

    objectives = ("branch-1", "branch-2")

    def __init__(
        self, role: str, branches: tuple[Model, Model], drawn: tuple[DataModule, tuple[str, ...]],
        options: MGDSSSOptions,
    ) -> None:  # fmt: skip
        super().__init__(f"cps-{role}", drawn, options)
        self.branches = nn.ModuleList(branches)
        self.exports = {role: branches[0]}

    def before_step(self, batches: list[Batch]) -> None:
        """What each branch takes the mixed images for, before either of them learns from the other."""
        for batch in batches if self.options.cps_weight else ():
            batch[SECOND]["pseudo"] = [self.pseudo_labels(branch, batch) for branch in self._branches()]

    def prepare(self, batch: Batch) -> None:
        """Both objectives once."""
        self.before_step([batch])
        super().prepare(batch)

    def forward(self, batch: Batch, objective: str = "branch-1") -> dict[str, Tensor]:
        """The supervised term and the cross pseudo supervision of a branch, each with the branch's name."""
        number = self.objectives.index(objective)
        branch, labelled = self._branches()[number], batch[LABELLED]
        terms = {f"supervised/{objective}": self._supervised(branch, labelled)}
        if self.options.cps_weight:
            mixed = self.mixed(batch)
            term = hard_pseudo_ce(full_size(branch(mixed), mixed), batch[SECOND]["pseudo"][1 - number])
            terms[f"cps/{objective}"] = self.options.cps_weight * term
        return terms

    def _supervised(self, branch: Model, labelled: Batch) -> Tensor:
        value: Tensor = self.supervised(branch(labelled), Outputs(), labelled)
        return value

    def _branches(self) -> list[Model]:
        return [branch for branch in self.branches if isinstance(branch, Model)]

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One for each branch."""
        return {name: make_optimizer(groups(branch), train.optimizer)
                for name, branch in zip(self.objectives, self.branches, strict=True)}  # fmt: skip

    def evaluate(self, batch: Batch) -> Outputs:
        """What the first branch says."""
        outputs: Outputs = self._branches()[0](batch)
        return outputs


class MultiGranularity(SemiSupervised):
    """Stage 2: the student learns from labels, and from both teachers.

    Args:
        student: what is trained.
        teachers: `deep` and `wide`; none where no term asks for them.
        images: unlabelled images in a step, over all processes.
        drawn, options: as `SemiSupervised`.

    Raises:
        ModelError: if a tap names no map.
    """

    def __init__(
        self, student: Model, teachers: Mapping[str, Model], images: int, drawn: tuple[DataModule, tuple[str, ...]],
        options: MGDSSSOptions,
    ) -> None:  # fmt: skip
        super().__init__("distill", drawn, options)
        self.student, self.teachers = student, dict(teachers)
        self.frozen = {role: teacher.freeze() for role, teacher in teachers.items()}
        self.exports = {"student": student}
        self.lambda_image = options.lambda_image * (images if options.image_loss_reduction == "sum" else 1)
        self.image, self.pixel, self.region = GapLogitL1(), HardPseudoCE(), RegionCosineMSE(options)
        pairs = ((options.image_from, options.lambda_image), (options.region_from, options.lambda_region))
        self.asked: list[str] = [role for role, weight in pairs if weight]
        if options.lambda_region:
            self.region.bind(student, teachers[options.region_from])

    def train(self, mode: bool = True) -> MultiGranularity:
        """As `nn.Module.train`; teachers go along if `teacher_train_mode` says so."""
        super().train(mode)
        for teacher in self.teachers.values():
            teacher.module.train(mode and self.options.teacher_train_mode)
        return self

    def prepare(self, batch: Batch) -> None:
        """Check that the teachers tell the student's classes apart, then the terms once."""
        one = batch[LABELLED]
        for role, teacher in self.teachers.items():
            theirs, ours = (Labels(model(one).classes) for model in (teacher, self.student))
            check_pair(theirs, ours, (f"teachers.{role}", "the student"))
        super().prepare(batch)

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms; those of weight 0 are left out. (Teachers come first: what they need in between is then
        given back before the student's activations stay.)"""
        o, labelled, mixed = self.options, batch[LABELLED], self.mixed(batch)
        with torch.no_grad():
            on_labelled = {role: t(labelled) for role, t in self.teachers.items()} if o.labelled_pixel_weight else {}
            classes = {r: self.pseudo_labels(t, batch) for r, t in self.teachers.items()} if o.pixel_weight else {}
            on_mixed: dict[str, Outputs] = {r: t(mixed) for r, t in self.teachers.items() if r in self.asked}
        ours: Outputs = self.student(labelled)
        terms: dict[str, Tensor] = {"supervised": self.supervised(ours, Outputs(), labelled)}
        for role, theirs in on_labelled.items():
            terms[f"labelled-pixel/{role}"] = o.labelled_pixel_weight * self.pixel(ours, theirs, labelled)
        return terms | self._unlabelled(mixed, classes, on_mixed)

    def _unlabelled(
        self, mixed: Batch, classes: Mapping[str, Tensor], teachers: Mapping[str, Outputs]
    ) -> dict[str, Tensor]:
        """The terms on the mixed images."""
        o, terms = self.options, dict[str, Tensor]()
        if not classes and not teachers:
            return terms
        ours: Outputs = self.student(mixed)
        ours.logits = full_size(ours, mixed)
        for role, found in classes.items():
            terms[f"pixel/{role}"] = o.pixel_weight * hard_pseudo_ce(ours.logits, found)
        if o.lambda_image:
            terms["image"] = self.lambda_image * self.image(ours, teachers[o.image_from], mixed)
        if o.lambda_region:
            terms["region"] = o.lambda_region * self.region(ours, teachers[o.region_from], mixed)
        return terms

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One for the student."""
        return {"loss": make_optimizer(groups(self.student), train.optimizer)}

    def evaluate(self, batch: Batch) -> Outputs:
        """What the student says."""
        outputs: Outputs = self.student(batch)
        return outputs


def groups(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The parameters of a model as groups for an optimizer: biases and those of norms do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for more, chosen in (({}, [p for p in parameters if p.ndim > 1]),
                         ({"weight_decay": 0.0}, [p for p in parameters if p.ndim <= 1])):  # fmt: skip
        if chosen:
            yield {"params": chosen, **more}
