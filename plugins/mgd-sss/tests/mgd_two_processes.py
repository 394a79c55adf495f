"""One of two processes that share a batch: `python mgd_two_processes.py RANK FOLDER` writes its loss and gradient."""

import sys
from pathlib import Path

import torch

from kd_mgd_sss.losses import OhemCrossEntropy
from kdcore import Outputs
from kdcore.data import IGNORE

IMAGES, FIRST = 5, 3


def loss_and_gradient(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a part of the images."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(IMAGES, 4, 6, 6, generator=generator)
    mask = torch.randint(4, (IMAGES, 6, 6), generator=generator)
    mask[0], mask[1, 2:] = IGNORE, IGNORE
    logits = logits[part].requires_grad_()
    loss = OhemCrossEntropy(0.1, 20)(Outputs(logits=logits), Outputs(), {"image": mask[part], "mask": mask[part]})
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(loss_and_gradient((slice(FIRST), slice(FIRST, None))[rank]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
