"""The loss: divergence from the teachers that a gate chooses for each sample, and the balance of their use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_mst_distill.functional import decayed, load_balance, routed_kl
from kd_mst_distill.modules import gate_net
from kd_mst_distill.options import RoutedKDOptions
from kdcore import Loss, Outputs
from kdcore.errors import ModelError
from kdcore.processes import gather_with_grad


class RoutedKD(Loss):
    """Li et al. 2025, stage 3: the gate reads the student's logits and weighs all teachers for each sample.

    The gate is made from the first outputs' shapes and trained with the student. Its input is not detached, so that
    the load balance reaches the student too; it is taken over the batch of all processes. The weights fall as the
    options say, by the epoch in `progress`.
    """

    needs = {"student": ("logits",), "teachers": ("logits",)}

    def __init__(self, options: RoutedKDOptions | None = None) -> None:
        super().__init__()
        self.options = options or RoutedKDOptions()
        self.gate: nn.Module | None = None

    def forward(self, student: Outputs, teachers: dict[str, Outputs], batch: dict[str, Any]) -> dict[str, Tensor]:
        """`kl` and `lb`, already weighted, from logits `[B, C]` or `[B, C, H, W]`.

        Raises:
            ModelError: if there are fewer teachers than `k` asks for, fewer than two, or logits of another shape.
        """
        o, logits = self.options, student.need("logits")
        self._check(logits, teachers)
        if self.gate is None:
            self.gate = gate_net(logits, len(teachers))
        stacked = torch.stack([outputs.need("logits") for outputs in teachers.values()])
        gate_logits = self.gate(logits)
        divergence = routed_kl(logits, stacked, gate_logits, k=o.k, temperature=o.temperature, routing=o.routing)
        balance = load_balance(self._of_all_processes(gate_logits), mode=o.lb_mode)
        epoch = self.progress.epoch
        return {
            "kl": decayed(o.w_kl, epoch, o.kl_decay, o.kl_decay_every) * divergence,
            "lb": decayed(o.w_lb, epoch, o.lb_decay, o.lb_decay_every) * balance,
        }

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Samples, labelled or not."""
        return torch.full((), float(batch["index"].shape[0]), device=batch["index"].device)

    def _check(self, logits: Tensor, teachers: dict[str, Outputs]) -> None:
        if logits.ndim not in (2, 4):
            raise ModelError(f"routed-kd takes logits [B, C] or [B, C, H, W]; the student's are {list(logits.shape)}")
        if len(teachers) < max(2, self.options.k):
            raise ModelError(f"routed-kd with k={self.options.k} needs at least {max(2, self.options.k)} teachers; "
                             f"there are {len(teachers)}: {', '.join(teachers)}")  # fmt: skip
        for role, outputs in teachers.items():
            theirs = outputs.need("logits")
            if theirs.shape != logits.shape:
                raise ModelError(f"the logits of teacher {role!r} have shape {list(theirs.shape)}, the student's "
                                 f"{list(logits.shape)}; routed-kd compares them class by class")  # fmt: skip

    def _of_all_processes(self, gate_logits: Tensor) -> Tensor:
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        return gather_with_grad(gate_logits, self.progress.shares) if several else gate_logits
