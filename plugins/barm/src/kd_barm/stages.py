"""The stages: the first step, trained alone, and each further one, with the net of the step before as teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_barm.functional import label_masks, pb_bce, step_losses, unify_background
from kd_barm.measure import GroupIoU, probabilities
from kd_barm.modules import freeze_batch_norms
from kd_barm.options import BARMOptions
from kd_barm.protocol import Steps
from kd_barm.segmenter import IncrementalSegmenter
from kdcore import DataModule, Outputs, TrainStage
from kdcore.data import IGNORE, Task
from kdcore.metrics import Metrics
from kdcore.models import Batch
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class Step(TrainStage):
    """What the steps have in common: the net, its data, and how it is measured.

    Args:
        net: what is trained; it has a branch for this step.
        steps: all of them.
        number: of this one, from 0.
        data: of this one.
        options: of the method.
    """

    def __init__(
        self, net: IncrementalSegmenter, steps: Steps, number: int, data: DataModule, options: BARMOptions
    ) -> None:
        super().__init__(f"step-{number}")
        self.net, self.steps, self.number, self.options = net, steps, number, options
        self.data = data
        self.exports = {"student": net.as_model()}
        self.find_unused_parameters = True  # the student's own head

    def evaluate(self, batch: Batch) -> Outputs:
        """Probabilities of the classes so far, at the size of the labels."""
        return probabilities(Outputs(self.net.unified(self.net.parts(batch)[0])), batch)

    def make_metrics(self, task: Task, names: Sequence[str], device: torch.device) -> Metrics:
        """`miou` of all classes so far; from the second step on also `miou-old` and `miou-new`, of the classes before
        and in this step, and `miou-base` and `miou-added`, of those in and after the first step. The background is an
        old one."""
        before, seen, base = self.steps.seen(self.number - 1), self.steps.seen(self.number), self.steps.seen(0)
        groups = {"miou": range(seen)}
        if self.number:
            groups |= {"miou-old": range(before), "miou-new": range(before, seen)}
            groups |= {"miou-base": range(base), "miou-added": range(base, seen)}
        return GroupIoU(seen, groups, device)

    def groups(self, train: TrainOptions, *parts: tuple[nn.Module, float | None]) -> dict[str, Optimizer]:
        """One optimizer with a group of parameters for each part that has any, at its own rate."""
        found = [(list(filter(lambda p: p.requires_grad, part.parameters())), rate) for part, rate in parts]
        made = [
            {"params": params, "lr": train.optimizer.lr if rate is None else rate} for params, rate in found if params
        ]
        return {"loss": make_optimizer(made, train.optimizer)}


class FirstStep(Step):
    """The base classes, on their labels alone. Keeps the best weights by validation, if that is asked for."""

    def __init__(
        self, net: IncrementalSegmenter, steps: Steps, data: DataModule, options: BARMOptions, split: str
    ) -> None:
        super().__init__(net, steps, 0, data, options)
        self.metric = f"{split}/miou"
        self.best: nn.Module | None = copy.deepcopy(net).requires_grad_(False) if options.best_base else None
        self.score: Tensor
        self.register_buffer("score", torch.tensor(-1.0))

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """Binary cross-entropy, summed over the channels."""
        groups, _ = self.net.parts(batch)
        return {"bce": pb_bce(unify_background(groups, training=True), batch["mask"], 0)}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Pixels that count."""
        return {"bce": (batch["mask"] != IGNORE).sum()}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """The head at the recipe's rate, the backbone at its own."""
        return self.groups(train, (self.net.head, None), (self.net.body, self.options.lr_backbone))

    def before_step(self, batches: list[Batch]) -> None:
        """Keep the weights that the last evaluation was of, if it was the best so far."""
        if self.best is not None and self._improved():
            self.best.load_state_dict(self.net.state_dict())
            self.score.fill_(self.metrics[self.metric])

    def finish(self) -> None:
        """Put the best weights into the net, where those of the last step are not the best."""
        if self.best is not None and self.metric in self.metrics and not self._improved():
            self.net.load_state_dict(self.best.state_dict())

    def _improved(self) -> bool:
        found = torch.tensor(self.metrics.get(self.metric, -1.0))  # rounded as the score is
        return bool(found > self.score.cpu())


class LaterStep(Step):
    """New classes, where everything else is labelled as background; the teacher is the net of the step before."""

    def __init__(
        self, net: IncrementalSegmenter, teacher: IncrementalSegmenter, steps: Steps, number: int, data: DataModule,
        options: BARMOptions,
    ) -> None:  # fmt: skip
        super().__init__(net, steps, number, data, options)
        self.frozen = {"teacher": teacher.as_model().freeze()}
        self.teacher = [teacher]  # in a list, so that it is not registered
        self.sizes: dict[torch.Size, torch.Size] = {}
        self.weights = {"pb-bce": 1.0, "bga-tri": options.w_tri, "bfd": options.w_bfd, "gkd": options.w_gkd,
                        "bga-bce": options.w_bga_bce}  # fmt: skip
        if options.freeze_bn:
            freeze_batch_norms(net)

    def train(self, mode: bool = True) -> LaterStep:
        """As `nn.Module.train`; frozen batch norms stay as they are."""
        super().train(mode)
        if self.options.freeze_bn:
            freeze_batch_norms(self.net)
        return self

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms; those of weight 0 are left out."""
        with torch.no_grad():
            previous = self.teacher[0].parts(batch)
        groups, features = self.net.parts(batch)
        o = self.options
        terms = step_losses(groups, features, *previous, batch["mask"], pseudo_thresh=o.pseudo_thresh,
                            shared=self.net.shared)  # fmt: skip
        return {name: self.weights[name] * term for name, term in terms.items() if self.weights[name]}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Pixels that count; cells of new classes and of background for the residual's terms. (The others count
        images.)"""
        mask = batch["mask"]
        height, width = self._size(batch)
        positive, negative = label_masks(mask, (height, width))
        return {"pb-bce": (mask != IGNORE).sum(), "bga-bce": positive.sum(), "bga-tri": negative.sum()}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """The newest branch at the recipe's rate, ASPP and what is older at their own."""
        head, o = self.net.head, self.options
        newest = nn.ModuleList([head.branches[-1], head.classifiers[-1]])
        older = nn.ModuleList([*head.branches[:-1], *head.classifiers[:-1], self.net.body])
        return self.groups(train, (newest, None), (head.aspp, o.lr_aspp), (older, o.lr_old))

    @torch.no_grad()
    def _size(self, batch: Batch) -> torch.Size:
        """Height and width of the logits for images of this size, from one image where it is not known yet."""
        size = batch["mask"].shape[-2:]
        if size not in self.sizes:
            one: dict[str, Any] = {k: v[:1] if isinstance(v, Tensor | list) else v for k, v in batch.items()}
            self.sizes[size] = self.teacher[0].parts(one)[0][0].shape[-2:]
        return self.sizes[size]
