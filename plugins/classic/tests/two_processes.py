"""One of two processes that share a batch: `python two_processes.py RANK FOLDER` writes its loss and gradient."""

import sys
from pathlib import Path

import torch
from torch import nn

from kd_classic.losses import DIST
from kdcore import Distill, Model
from kdcore.losses import Weighted

SAMPLES = 8


def stage() -> Distill:
    """A linear student with DIST, the same in every process."""
    torch.manual_seed(0)
    student, teacher = (Model(nn.Linear(6, 5)) for _ in range(2))
    return Distill(student, [Weighted(DIST(), name="dist")], teacher)


def batch(part: slice) -> dict[str, torch.Tensor]:
    """A part of the samples, with their numbers."""
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    return {"input": inputs[part], "index": torch.arange(SAMPLES)[part]}


def loss_and_gradient(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the student's weight."""
    module = stage()
    loss = module(batch(part))["dist"]
    loss.backward()
    return loss.detach(), module.student.module.weight.grad


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    half = SAMPLES // 2
    torch.save(loss_and_gradient(slice(rank * half, (rank + 1) * half)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
