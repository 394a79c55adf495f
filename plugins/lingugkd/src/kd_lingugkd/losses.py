"""The loss: projectors and learned weights around the objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_lingugkd.functional import classification, hopwise_infonce, task_shares
from kd_lingugkd.modules import Projectors
from kd_lingugkd.options import LossOptions
from kdcore import Loss, Outputs
from kdcore.data import DataModule, derive_seed
from kdcore.errors import ModelError

TEACHER = "teacher_hidden"
"""Key of a batch: the teacher's states `[B, L, D]` for the prompts of hop 0 to L - 1."""


class LinguGKDLoss(Loss):
    """Hu et al. 2025: cross-entropy and hop-wise contrast, weighed by trained numbers.

    The student gives `extras["hidden"]`, its states `[B, d]` from hop 0 on, as the networks of kd-pyg do; the batch
    holds `teacher_hidden` `[B, L, D]`. The projectors are made from what arrives first.

    Args:
        options: temperature, weightings, projectors.
        seed: of the nodes drawn for the contrast.
    """

    needs = {"student": ("logits", "extras")}
    relational = True

    def __init__(self, options: LossOptions | None = None, seed: int = 0) -> None:
        super().__init__()
        self.options, self.seed = options or LossOptions(), seed
        self.projectors: Projectors | None = None
        self.layer_weights: nn.Parameter | None = None
        learned = self.options.task_weighting == "learned"
        self.task_weights = nn.Parameter(torch.ones(2)) if learned else None

    def setup(self, data: DataModule, split: str) -> None:
        """Refuse data without labels or the teacher's states. Raises `ModelError`."""
        found = data.sample(split, 1)
        if TEACHER not in found or "label" not in found:
            raise ModelError(f"the loss 'lingugkd' reads `label` and {TEACHER!r} from the data, the teacher's states "
                             "per hop: use the method 'lingugkd', which makes them")  # fmt: skip
        if found[TEACHER].ndim != 3:
            raise ModelError(f"{TEACHER!r} of a sample must be [hops + 1, D], a state of the teacher for each hop, but "
                             f"is {list(found[TEACHER].shape[1:])}")  # fmt: skip

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`ce` and `nce`, with their weights.

        Raises:
            ModelError: if the student has fewer states than the teacher.
        """
        theirs: list[Tensor] = list(batch[TEACHER].unbind(1))
        ours = student_states(student, len(theirs))
        if self.projectors is None:
            self._make(theirs[0].shape[1], ours[0].shape[1], len(theirs), ours[0].device)
        rows = self._drawn(batch)
        assert self.projectors is not None
        projected = torch.stack(self.projectors([state[rows].float() for state in theirs]))
        o, labels = self.options, batch["label"]
        states = torch.stack([state[rows] for state in ours])
        infonce = hopwise_infonce(states, projected, labels[rows], self.layer_weights, tau=o.tau, symmetric=o.symmetric)
        ce, _ = classification(student.need("logits"), labels)
        shares = task_shares(ce, self.task_weights)
        return {"ce": shares[0] * ce, "nce": shares[1] * infonce}

    def _make(self, teacher: int, width: int, hops: int, device: torch.device) -> None:
        o = self.options
        made = Projectors(hops, teacher, width, filter_layer=o.filter_layer, projector_layer=o.projector_layer,
                          dropout=o.dropout)  # fmt: skip
        self.projectors = made.to(device)
        if o.layer_weighting == "learned":
            self.layer_weights = nn.Parameter(torch.ones(hops, device=device))

    def _drawn(self, batch: dict[str, Any]) -> Tensor | slice:
        """The nodes of the batch that are contrasted."""
        size, limit = len(batch["label"]), self.options.nce_nodes
        if limit is None or size <= limit:
            return slice(None)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "nce", self.progress.step))
        return torch.randperm(size, generator=generator)[:limit].sort().values.to(batch["label"].device)


def student_states(student: Outputs, hops: int) -> list[Tensor]:
    """The student's states `[B, d]` of hops 0 to `hops` - 1.

    Raises:
        ModelError: if it gives none, or too few.
    """
    states: list[Tensor] = list(student.extras.get("hidden", ()))
    if not states:
        raise ModelError(
            "lingugkd aligns the student's layers, and this student does not give them: use `gcn`, `sage`, "
            "`gat` or `gin`, or return kdcore.Outputs(..., extras={'hidden': [states of hop 0, 1, ...]})"
        )
    if len(states) < hops:
        raise ModelError(
            f"hops 0 to {hops - 1} are to be aligned, but the student has only {len(states) - 1} "
            f"message-passing layers: set method.hops={len(states) - 1}, or student.layers={hops - 1}"
        )
    return states[:hops]
