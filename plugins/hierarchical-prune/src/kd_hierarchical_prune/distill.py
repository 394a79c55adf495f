"""The training after the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.process import FlowMatching
from kd_hierarchical_prune.blocks import Block, Recorder
from kd_hierarchical_prune.functional import (
    Part,
    feature_loss,
    output_loss,
    task_loss,
    update_factors,
    weighted_distance,
)
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kd_hierarchical_prune.surgery import Cut, monitored
from kdcore import TrainStage
from kdcore.models import Batch
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class PruneDistill(TrainStage):
    """Teacher and student on the same noised latents: `l_task L_task + l_out L_out + l_feat L_feat`.

    Features are compared after the blocks that are left and trained, each with the teacher's block of the same number.

    Args:
        found: the student, parts of it frozen already.
        teacher: the whole model.
        blocks: the teacher's blocks.
        options: weights of the terms, streams.
        key: seeds levels and noise, with the step and the sample index.
        contributions: dP of the parts, where learning rates are to fall with them; else `None`.
    """

    def __init__(
        self,
        found: Cut,
        teacher: Denoiser,
        blocks: list[Block],
        options: HierarchicalPruneOptions,
        key: object,
        contributions: Mapping[Part, float] | None = None,
    ) -> None:
        super().__init__("distill")
        self.student, self.key, self.options = found.model, key, options
        self.found, self.contributions = found, contributions
        self.frozen = {"teacher": teacher.freeze()}
        self.exports = {"student": found.model}
        watched = monitored(found) if options.l_feat else {}
        self.watched = sorted(watched)
        self.recorders = (Recorder(found.model.module, watched, options.kd_streams),
                          Recorder(teacher.module, {i: blocks[i] for i in watched}, options.kd_streams))  # fmt: skip
        self.find_unused_parameters = not (options.l_task or options.l_out)

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms `task`, `out` and `feat`; one with weight 0 is not computed."""
        o = self.options
        batch = self.student.noised(batch, self.key, self.progress.step)
        with torch.no_grad():
            wanted = self.frozen["teacher"](batch).extras["prediction"]
        prediction = self.student(batch).extras["prediction"]
        features = [recorder.take() for recorder in self.recorders]
        terms: dict[str, Tensor] = {}
        if o.l_task:
            terms["task"] = o.l_task * self._task_loss(prediction, batch)
        if o.l_out:
            terms["out"] = o.l_out * output_loss(prediction, wanted)
        if o.l_feat and self.watched:
            terms["feat"] = o.l_feat * feature_loss(*features, self.watched, o.kd_streams)
        return terms

    def _task_loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        process = self.student.process
        if isinstance(process, FlowMatching):
            return task_loss(prediction, batch["latents"], batch["noise"], process.sigma(batch["timestep"]))
        clean = process.clean(batch["noised"], prediction, batch["timestep"])
        return weighted_distance(clean, batch["latents"])

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One optimizer; where contributions are given, with a learning rate `lr * g(i, c)` for each part.

        The rate is scaled and not the gradient: AdamW divides a constant factor of the gradient out again.
        """
        if self.contributions is None:
            return super().optimizers(train)
        groups: dict[float, list[Any]] = {}
        for name, factor in rates(self.found, self.contributions).items():
            groups.setdefault(factor, []).append(dict(self.student.module.named_parameters())[name])
        listed = [{"params": params, "lr": train.optimizer.lr * factor} for factor, params in groups.items()]
        return {"loss": make_optimizer(listed, train.optimizer)}

    def close(self) -> None:
        """Read no more features."""
        for recorder in self.recorders:
            recorder.close()


def rates(found: Cut, contributions: Mapping[Part, float]) -> dict[str, float]:
    """The factor of the learning rate of every trained parameter of the student, by name: `g(i, c)` of the part it
    belongs to, 1 outside of all parts."""
    parameters = {n: p for n, p in found.model.module.named_parameters() if p.requires_grad}
    owner: dict[str, Part] = {}
    for part in contributions:
        if (block := found.blocks.get(part[0])) is None:
            continue
        prefixes = tuple(f"{path}." for path in block.paths(part[1]))
        owner |= {name: part for name in parameters if name.startswith(prefixes)}
    factors = update_factors({part: contributions[part] for part in set(owner.values())})
    return {name: factors[owner[name]] if name in owner else 1.0 for name in parameters}
