"""What a training stage does when numbers go wrong or memory runs out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.errors import RunFailed
from kdcore.folder import write_text

if TYPE_CHECKING:
    from kdcore.runner import Run

FAILURE = "failure.json"


def wrong_numbers(run: Run, stage: str, step: int, what: str, indices: Sequence[int] = ()) -> RunFailed:
    """The error for numbers that are not finite. What `kd doctor --replay` needs is written into the run folder."""
    record = {"stage": stage, "step": step, "what": what, "samples": list(indices)}
    if run.folder:
        write_text(run.path / FAILURE, json.dumps(record, indent=1))
    of = f"; samples of that batch: {list(indices)}" if indices else ""
    return RunFailed(f"stage {stage!r}: {what} at step {step}{of}. The last good checkpoint is kept. "
                     f"`kd doctor --replay {run.path}` finds the module; lower the rate or the term's weight, clip the "
                     "gradient, look at the samples, or set train.nonfinite=skip")  # fmt: skip


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first floating-point tensor that holds NaN or infinity; waits for the device once."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return None
    good = torch.stack([tensor.detach().isfinite().all() for _, tensor in named]).tolist()
    return next((name for (name, _), fine in zip(named, good, strict=True) if not fine), None)


class Before:
    """What a step changes besides what its optimizers train, as it was before, to go back to: buffers, parameters
    without gradient (an EMA teacher), the random state."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._random = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._still = [(p, p.detach().clone()) for p in module.parameters() if not p.requires_grad]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; a buffer that was replaced by another tensor may have another shape by now."""
        torch.set_rng_state(self._random)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
        for parameter, value in self._still:
            parameter.copy_(value)
        for name, old in self._kept.items():
            owner, _, leaf = name.rpartition(".")
            if (now := self._module.get_buffer(name)).shape == old.shape:
                now.copy_(old)
            else:
                setattr(self._module.get_submodule(owner), leaf, old)


def out_of_memory(stage: str, step: int, options: Any, processes: int, device: torch.device) -> RunFailed:
    """The error for an accelerator without memory left: where, with how much, and what to change."""
    parts = processes * options.grad_accumulation
    peak = ""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = f"; peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} of {total / 2**30:.2f} GiB"
    return RunFailed(f"stage {stage!r}: out of memory on {device} at step {step} with {options.batch_size // parts} "
                     f"samples at once (train.batch_size {options.batch_size}, {processes} processes, "
                     f"train.grad_accumulation {options.grad_accumulation}){peak}. The last checkpoint is kept. Set "
                     f"train.grad_accumulation={2 * options.grad_accumulation}: the same batch in smaller parts; or "
                     "train.on_oom=halve to have that done; or train.precision=bf16")  # fmt: skip
