"""Deep mutual learning."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_classic import functional, losses
from kd_classic.methods.baselines import Stages
from kdcore import Method, Model, Outputs, Roles, Run, TrainStage
from kdcore.models import Batch
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class DML(Method):
    """Zhang et al. 2018, "Deep Mutual Learning" (arXiv 1706.00384): all students of the recipe teach each other.

    The one with the role `student` is the result; the table of the run holds every peer.
    """

    roles = Roles(teachers=(), students=("student",))
    stage_names = ("mutual",)
    ablation = {"method.weight": 0}

    def stages(self, run: Run) -> Stages:
        """One stage."""
        peers = {role: run.model(role) for role in run.student_roles}
        yield Mutual(peers, self.options)
        for role, peer in peers.items():
            run.add_row(role, peer)


class Mutual(TrainStage):
    """Peers trained together, each on ``CE + weight / (K - 1) * sum T^2 KL(p_other || p_own)`` (equations 6 and 7).

    In turn, each peer's step is followed by a new forward of all; together, all steps come from one forward.
    """

    def __init__(self, peers: dict[str, Model], options: Any) -> None:
        super().__init__("mutual")
        self.peers = nn.ModuleDict(peers)
        self.options = options
        self.objectives = ("peers",) if options.together else tuple(peers)
        self.exports = dict(peers)
        self.hard = losses.CrossEntropy()

    def forward(self, batch: Batch, objective: str = "peers") -> dict[str, Tensor]:
        """The terms of one peer, or of all."""
        learning = list(self.peers) if self.options.together else [objective]
        outputs: dict[str, Outputs] = {}
        for role, peer in self.peers.items():
            with torch.set_grad_enabled(role in learning and torch.is_grad_enabled()):
                outputs[role] = peer(batch)
        terms: dict[str, Tensor] = {}
        o = self.options
        for role in learning:
            terms[f"cross-entropy/{role}"] = self.hard(outputs[role], Outputs(), batch)
            others = [functional.kd(outputs[role].need("logits"), outputs[other].need("logits"),
                                    temperature=o.temperature, standardize=o.standardize)
                      for other in self.peers if other != role]  # fmt: skip
            if others and o.weight:
                terms[f"mutual/{role}"] = o.weight * torch.stack(others).mean()
        return terms

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Labels for the cross-entropy, samples for the divergence."""
        return {"cross-entropy": self.hard.count(batch)}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One per peer; one for all where they are updated together, which is the same."""
        if self.options.together:
            everything = itertools.chain.from_iterable(peer.parameters() for peer in self.peers.values())
            return {"peers": make_optimizer(everything, train.optimizer)}
        return {role: make_optimizer(peer.parameters(), train.optimizer) for role, peer in self.peers.items()}

    def evaluate(self, batch: Batch) -> Outputs:
        """The student's outputs."""
        outputs: Outputs = self.peers["student"](batch)
        return outputs
