"""Structured knowledge distillation for segmentation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from kd_classic import losses
from kd_classic.losses.features import batch_rand
from kd_classic.methods.baselines import Stages
from kd_classic.modules import Discriminator
from kd_classic.options import PairWiseOptions
from kdcore import Distill, Method, Model, Run
from kdcore.data import derive_seed
from kdcore.errors import ModelError
from kdcore.losses import Weighted, count_samples
from kdcore.models import Batch, Source
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class SKD(Method):
    """Liu et al. 2019 (arXiv 1903.04197): pixel-wise, pair-wise and holistic distillation, with the cross-entropy."""

    stage_names = ("distill",)
    ablation = {"method.pixel_weight": 0, "method.pair_weight": 0, "method.holistic_weight": 0}

    def stages(self, run: Run) -> Stages:
        """One stage, with a discriminator where the holistic term has a weight."""
        o = self.options
        terms = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy"),
                 Weighted(losses.PixelWise(), o.pixel_weight, "pixel-wise"),
                 Weighted(losses.PairWise(PairWiseOptions(scale=o.scale)), o.pair_weight, "pair-wise")]  # fmt: skip
        if o.holistic_weight:
            yield Structural(run.student, terms, run.teacher, o)
        else:
            yield Distill(run.student, terms, run.teacher)


class Structural(Distill):
    """`Distill` with a Wasserstein critic that tells the teacher's score maps from the student's (equations 3 to 5).

    Two objectives per step: the student, which also learns to be taken for the teacher, then the critic, with a
    gradient penalty.
    """

    objectives = ("student", "critic")

    def __init__(self, student: Model, losses: list[Weighted], teacher: Source, options: Any) -> None:
        super().__init__(student, losses, teacher)
        self.options = options
        self.critic: Discriminator | None = None
        self.seed_of_shares = 0

    def forward(self, batch: Batch, objective: str = "student") -> dict[str, Tensor]:
        """The weighted terms of one objective."""
        if objective == "critic":
            return self._critic_terms(batch)
        student, teachers = self.outputs(batch)
        terms = self.terms(student, teachers, batch)
        score = self._judge(student.need("logits"), batch).mean()
        return {**terms, "holistic": -self.options.holistic_weight * score}

    def _critic_terms(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.student(batch).need("logits")
            real = self.teachers["teacher"](batch).need("logits")
            real = F.interpolate(real.float(), fake.shape[-2:], mode="bilinear", align_corners=False)
        terms = {"critic": self._judge(fake, batch).mean() - self._judge(real, batch).mean()}
        if self.options.gradient_penalty and torch.is_grad_enabled():
            seed = derive_seed(self.seed_of_shares, self.progress.step)
            share = batch_rand((len(real), 1, 1, 1), seed, real.device, self.progress.shares)
            between = (share * real + (1 - share) * fake.float()).requires_grad_()
            (slope,) = torch.autograd.grad(self._judge(between, batch).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
            terms["penalty"] = self.options.gradient_penalty * penalty
        return terms

    def _judge(self, logits: Tensor, batch: Batch) -> Tensor:
        """The critic's score ``[B]`` of score maps together with their image."""
        image = F.interpolate(batch["image"], logits.shape[-2:], mode="bilinear", align_corners=False)
        if self.critic is None:
            if min(logits.shape[-2:]) < 8:
                raise ModelError(f"the discriminator needs score maps of at least 8x8, not "
                                 f"{list(logits.shape[-2:])}; set `holistic_weight: 0`")  # fmt: skip
            channels = logits.shape[1] + image.shape[1]
            self.seed_of_shares = int(torch.randint(2**62, ()))
            self.critic = Discriminator(channels, self.options.discriminator_width).to(logits.device)
        return self.critic(torch.cat([logits.softmax(dim=1).float(), image], dim=1))  # type: ignore[no-any-return]

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Samples for what the critic says; the losses' own for the others."""
        return {**super().counts(batch), **dict.fromkeys(("holistic", "critic", "penalty"), count_samples(batch))}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """The recipe's for the student, Adam for the critic."""
        assert self.critic is not None
        critic = list(self.critic.parameters())
        student = [p for name, p in self.named_parameters() if not name.startswith("critic.")]
        return {"student": make_optimizer(student, train.optimizer),
                "critic": Adam(critic, lr=self.options.discriminator_lr, betas=(0.9, 0.99))}  # fmt: skip
