"""The stage: two students that learn together, each with an optimizer of its own.

Source: Zhu et al. 2023 (arXiv 2307.12574). For each student, with ramped weights a, b and c,

    L = CE + a L_hfd + b L_region + c L_pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_gsc_kd import functional
from kd_gsc_kd.functional import grid_of, resize, smaller_grid
from kd_gsc_kd.networks import Places, check_crossing, check_map, cross_stage_feature, find_places, frozen_call
from kd_gsc_kd.options import GSCKDOptions
from kdcore import Outputs, Run, TrainStage
from kdcore.data import IGNORE, Task
from kdcore.errors import ModelError, RecipeError
from kdcore.metrics import Metrics
from kdcore.models import Batch, check_pair
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer

CNN, VIT = ROLES = ("cnn", "vit")
OTHER = {CNN: VIT, VIT: CNN}


class CoTrain(TrainStage):
    """Each student's step in turn, on the same batch: it learns the labels, and from the other as that one is then.

    Args:
        run: the run; its students are `cnn` and `vit`.
        options: of the method.

    Attributes:
        shares: the share of labelled pixels, and of regions, in which each student taught the other in the last batch.

    Raises:
        ModelError: if the students do not have the same classes, or their stages are not found.
    """

    objectives = ROLES
    shardable = False

    def __init__(self, run: Run, options: GSCKDOptions) -> None:
        super().__init__("co_train")
        self.run, self.options = run, options
        self.students = {role: run.model(role) for role in ROLES}
        check_pair(self.students[CNN].labels, self.students[VIT].labels, ROLES)
        self.models = nn.ModuleDict(self.students)
        self.adapters = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        self.exports = dict(self.students)
        self.schedules = {role: own.schedule for role in ROLES if (own := getattr(options, role)).schedule}
        self.places: dict[str, Places] = {}
        if options.compares_low or options.weights.region:
            self.places = {role: find_places(model, role, options) for role, model in self.students.items()}
        self.log_every = run.recipe.train_for(self.name, self.overrides).log_every
        self.shares: dict[str, Tensor] = {}

    def prepare(self, batch: Batch) -> None:
        """Check the maps, and make the adapters and projectors for their widths.

        Raises:
            ModelError: if a student gives no logits or maps, or its next stage is not what it was taken for.
        """
        outputs = {role: model(batch) for role, model in self.students.items()}
        classes = {role: _classes(found, role) for role, found in outputs.items()}
        if classes[CNN] != classes[VIT]:
            raise ModelError(f"gsc-kd: the cnn gives logits of {classes[CNN]} classes, the vit of {classes[VIT]}")
        for role, places in self.places.items():
            for name in filter(None, (places.low, places.next, places.high)):
                check_map(outputs[role], name, role)
            check_crossing(places, role, outputs[role])
        device = batch["mask"].device
        for role, places in self.places.items() if not self.projectors and not self.adapters else ():
            if self.options.compares_low:
                widths = (outputs[r].features[self.places[r].low].shape[1] for r in (role, OTHER[role]))
                self.adapters[role] = adapter(*widths).to(device).train(self.training)
            if self.options.weights.region:
                width = outputs[role].features[places.high].shape[1]
                self.projectors[role] = nn.Conv2d(width, self.options.region_dim, 1).to(device)
        super().prepare(batch)

    def forward(self, batch: Batch, objective: str = CNN) -> dict[str, Tensor]:
        """The terms of the student that the objective names. The other one is called without gradient, and its running
        statistics stay as they are."""
        other, labels = OTHER[objective], batch["mask"]
        theirs = Outputs()
        if self.options.cooperates:
            with torch.no_grad():
                theirs = frozen_call(self.students[other], batch)
        own: Outputs = self.students[objective](batch)
        errors = functional.pixel_errors(own.need("logits"), labels, IGNORE)
        terms = {f"cross-entropy/{objective}": errors.sum() / (labels != IGNORE).sum().clamp(min=1)}
        said, weights, ramp = {objective: own, other: theirs}, self.options.weights, self.ramp()
        if self.options.compares_low:
            terms[f"hfd/{objective}"] = ramp * weights.hfd * self.low(objective, said)
        if weights.region:
            terms[f"region/{objective}"] = ramp * weights.region * self.region(objective, said, errors.detach(), labels)
        if weights.pixel:
            terms[f"pixel/{objective}"] = ramp * weights.pixel * self.pixel(objective, said, labels)
        return terms

    def low(self, learner: str, said: dict[str, Outputs]) -> Tensor:
        """HFD: the learner's adapted low map, after the other's next stage, against the other's own next map; without
        a next stage (`direct`), against the other's low map."""
        places = self.places[OTHER[learner]]
        features = said[OTHER[learner]].features
        target = features[places.low]
        adapted = resize(self.adapters[learner](said[learner].features[self.places[learner].low]), grid_of(target))
        if places.crossing is not None:
            adapted, target = cross_stage_feature(places.crossing, adapted), features[places.next]
        return functional.cosine_distance(adapted, target)

    def region(self, learner: str, said: dict[str, Outputs], errors: Tensor, labels: Tensor) -> Tensor:
        """Region-wise selective distillation: the learner's last map against the other's, in the regions in which the
        other has the lower mean `errors` `[B, H, W]`."""
        other = OTHER[learner]
        maps = {role: said[role].features[self.places[role].high] for role in ROLES}
        common = smaller_grid(maps[CNN], maps[VIT])
        rows, columns = (min(self.options.region_grid, side) for side in common)
        features = {}
        for role in ROLES:
            with torch.set_grad_enabled(role == learner and torch.is_grad_enabled()):
                pooled = nn.functional.adaptive_avg_pool2d(maps[role], common)
                features[role] = functional.region_features(self.projectors[role](pooled), (rows, columns))
        mask = torch.ones_like(features[other][:, 0], dtype=torch.bool)
        if self.options.selection == "lower_ce":
            with torch.no_grad():
                theirs = functional.pixel_errors(said[other].need("logits"), labels, IGNORE)
                mask = functional.region_direction(theirs, errors, (rows, columns), labels != IGNORE)
            self.shares[f"{other}-teaches/regions"] = mask.float().mean()
        return functional.selective_region_cosine(features[learner], features[other], mask, self.over(mask))

    def pixel(self, learner: str, said: dict[str, Outputs], labels: Tensor) -> Tensor:
        """Pixel-wise selective distillation, at the resolution of the smaller logits."""
        other, options = OTHER[learner], self.options
        given = {role: said[role].need("logits") for role in ROLES}
        size = smaller_grid(given[CNN], given[VIT])
        logits = {role: resize(found.float(), size) for role, found in given.items()}
        mask = torch.ones_like(logits[other][:, 0], dtype=torch.bool)
        if options.selection == "lower_ce" or options.reliable_only:
            target = functional.resize_labels(labels, size)
            valid = target != IGNORE
            with torch.no_grad():
                if options.selection == "lower_ce":
                    cnn, vit = (functional.pixel_errors(logits[role], target, IGNORE) for role in ROLES)
                    mask = functional.pixel_direction(cnn, vit, valid)[ROLES.index(other)]
                if options.reliable_only:
                    mask = mask & (logits[other].argmax(1) == target)
            self.shares[f"{other}-teaches/pixels"] = mask.sum() / valid.sum().clamp(min=1)
        return functional.selective_pixel_kl(logits[learner], logits[other], mask, options.temperature,
                                             self.over(mask))  # fmt: skip

    def over(self, mask: Tensor) -> Tensor:
        """What a sum under the mask is divided by in each process, so that the mean over processes is the mean over
        what the masks of all of them hold."""
        accelerator = self.run.accelerator
        count: Tensor = accelerator.reduce(mask.sum().float(), "sum").clamp(min=1) / accelerator.num_processes
        return count

    def ramp(self) -> float:
        """How far the three weights have risen, in `[0, 1]`."""
        return min(1.0, self.progress.fraction / self.options.ramp) if self.options.ramp else 1.0

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Labelled pixels for the cross-entropy, images for HFD; the selective terms span all processes already."""
        return {"cross-entropy": (batch["mask"] != IGNORE).sum(), "region": None, "pixel": None}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One per student, over its parameters, the adapter that it learns through, and its projector."""
        return {role: make_optimizer(self.groups(role, train), getattr(self.options, role).optimizer or train.optimizer)
                for role in ROLES}  # fmt: skip

    def groups(self, role: str, train: TrainOptions) -> list[dict[str, Any]]:
        """Parameter groups of a student, by the factor of their rate.

        Raises:
            RecipeError: if a pattern in `lr_factors` fits no parameter.
        """
        own = getattr(self.options, role)
        rate = (own.optimizer or train.optimizer).lr
        groups: dict[float, list[nn.Parameter]] = {}
        unused = dict.fromkeys(own.lr_factors)
        for name, parameter in self.trained(role):
            pattern = next((p for p in own.lr_factors if fnmatchcase(name, p)), None)
            unused.pop(pattern, None)
            groups.setdefault(own.lr_factors.get(pattern, 1.0), []).append(parameter)
        if unused:
            raise RecipeError(f"method.{role}.lr_factors: {next(iter(unused))!r} fits no parameter of the student "
                              f"{role}, such as {name!r}")  # fmt: skip
        return [{"params": parameters, "lr": rate * factor} for factor, parameters in groups.items()]

    def trained(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """What a student's optimizer changes: its own parameters by their names, then those of its modules."""
        modules = [parts[role] for parts in (self.adapters, self.projectors) if role in parts]
        for part in (self.students[role].module, *modules):
            yield from ((name, parameter) for name, parameter in part.named_parameters() if parameter.requires_grad)

    def after_step(self) -> None:
        """Log who taught how much, wherever the terms are logged."""
        step = self.progress.step + 1
        if not self.shares or (step % self.log_every and step < self.total_steps):
            return
        names = sorted(self.shares)
        means = self.run.accelerator.reduce(torch.stack([self.shares[name] for name in names]), "mean").tolist()
        self.run.log({"stage": self.name, "step": step, "metrics": dict(zip(names, means, strict=True))})

    def evaluate(self, batch: Batch) -> Outputs:
        """The logits of both students, one after the other along the classes, at the size of the labels."""
        logits = [resize(model(batch).need("logits").float(), grid_of(batch["mask"])) for model in self.models.values()]
        return Outputs(torch.cat(logits, 1))

    def make_metrics(self, task: Task, names: Sequence[str], device: torch.device) -> Metrics:
        """Of each student."""
        return EachStudent(task, names, device, self.run.student_roles[0])


class EachStudent(Metrics):
    """The metrics of `CoTrain.evaluate` for both students: `name-role`, and those of one of them as `name` too."""

    def __init__(self, task: Task, names: Sequence[str], device: torch.device, result: str) -> None:
        self.each = {role: Metrics(task, names, device) for role in ROLES}
        self.result = result

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch."""
        for metrics, logits in zip(self.each.values(), outputs.need("logits").chunk(len(ROLES), 1), strict=True):
            metrics.update(Outputs(logits), batch)

    def compute(self) -> dict[str, float]:
        """The values over all batches and processes."""
        found = {role: metrics.compute() for role, metrics in self.each.items()}
        each = {f"{name}-{role}": value for role, values in found.items() for name, value in values.items()}
        return found[self.result] | each


def adapter(channels_in: int, channels_out: int) -> nn.Sequential:
    """A map `[B, C, h, w]` of one network for the other: a 1x1 convolution and a batch norm."""
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1), nn.BatchNorm2d(channels_out))


def _classes(outputs: Outputs, role: str) -> int:
    logits = outputs.need("logits")
    if logits.ndim != 4:
        raise ModelError(f"gsc-kd: the {role} gives logits {list(logits.shape)}, not [B, C, h, w]")
    return logits.shape[1]
