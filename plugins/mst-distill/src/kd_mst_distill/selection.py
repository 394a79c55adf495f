"""The state of modules at their lowest validation value, kept through a training stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kdcore import Run, TrainStage
from kdcore.data import to_device
from kdcore.models import Batch

Measure = Callable[[Batch], tuple[Tensor, Tensor]]


class Best(nn.Module):
    """Copies of modules, at the state in which the value offered with them was the lowest.

    Registered on a stage, so that checkpoints hold it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.kept = nn.ModuleList(copy.deepcopy(module) for module in modules).requires_grad_(False)
        self.register_buffer("value", torch.tensor(torch.inf))
        self.value: Tensor

    def offer(self, value: Tensor, modules: Iterable[nn.Module]) -> None:
        """Keep the modules' state if the value is lower than any before."""
        if value < self.value:
            self.value.copy_(value)
            for kept, module in zip(self.kept, modules, strict=True):
                kept.load_state_dict(module.state_dict())


def validation_due(run: Run, stage: TrainStage) -> bool:
    """Whether the step just made is one after which to validate: the last of `eval_every` steps (by default of an
    epoch), or of the stage."""
    step = stage.progress.step + 1
    train = run.recipe.train_for(stage.name, stage.overrides)
    every = train.eval_every or run.data.steps_per_epoch("train", train.batch_size)
    return step == stage.total_steps or (every is not None and step % every == 0)


def validate(run: Run, stage: TrainStage, measure: Measure, values: int) -> Tensor:
    """The means over the split `val`, over all processes, in evaluation mode.

    Args:
        run, stage: whose data and mode.
        measure: `batch -> (means [values], how many units they are means over)`.
        values: how many means there are.
    """
    train, accelerator = run.recipe.train_for(stage.name, stage.overrides), run.accelerator
    totals = torch.zeros(values + 1, dtype=torch.float64, device=run.device)
    loader = run.data.eval_loader("val", train.eval_batch_size or train.batch_size, accelerator.process_index,
                                  accelerator.num_processes)  # fmt: skip
    was_training = stage.training
    stage.eval()
    with torch.no_grad(), accelerator.autocast():
        for batch in loader:
            means, count = measure(to_device(batch, run.device))
            totals += torch.cat([means * count, count.reshape(1)])
    stage.train(was_training)
    whole: Tensor = accelerator.reduce(totals, "sum")
    return (whole[:-1] / whole[-1].clamp(min=1)).float()
