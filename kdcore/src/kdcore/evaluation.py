"""Stages made ready, and what they evaluate measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from kdcore.data import derive_seed, seeded, to_device
from kdcore.errors import ModelError, RunFailed
from kdcore.metrics import metric_names
from kdcore.models import Batch, Outputs
from kdcore.recipe import EvalOptions
from kdcore.stages import TrainStage

if TYPE_CHECKING:
    from kdcore.runner import Run


def prepare(run: Run, stage: TrainStage) -> None:
    """Put a stage and its frozen models on the device and make its lazy adapters, without touching any random state."""
    data = stage.data or run.data
    stage.to(run.device)
    stage.setup(data)
    for model in stage.frozen.values():
        model.to(run.device).eval()
    batches = {name: to_device(data.sample(name), run.device) for name in stage.splits}
    batch = batches if len(stage.splits) > 1 else next(iter(batches.values()))
    stage.eval()
    try:
        with seeded(derive_seed(run.seed, stage.name, "adapters")), torch.no_grad():
            stage.prepare(batch)
    except ValueError as error:  # how pure functions refuse what they are given
        raise ModelError(f"stage {stage.name!r}: {error}") from error
    stage.to(run.device)


def lay_out(stage: TrainStage, layout: torch.memory_format) -> None:
    """Put the weights of convolutions in a layout, those of frozen models too; what they compute follows."""
    for part in (stage, *stage.frozen.values()):
        part.to(memory_format=layout)  # type: ignore[call-overload]


def evaluate(run: Run, stage: TrainStage, split: str, batch_size: int) -> dict[str, float]:
    """The metrics of what a stage evaluates, on a split; the same on every process.

    Raises:
        RunFailed: if logits are NaN or plus infinity (minus infinity rules a class out).
    """
    accelerator, data = run.accelerator, stage.data or run.data
    names = run.metric_names if data.task.kind == run.data.task.kind else metric_names(data.task)
    metrics = stage.make_metrics(data.task, names, run.device)
    was_training, wrong = stage.training, []
    stage.eval()
    outputs_of = slid(stage.evaluate, run.recipe.eval) if data.task.kind == "segmentation" else stage.evaluate
    with torch.no_grad(), accelerator.autocast():
        for batch in data.eval_loader(split, batch_size, accelerator.process_index, accelerator.num_processes):
            batch = to_device(batch, run.device)
            if (outputs := outputs_of(batch)) is not None:
                metrics.update(outputs, batch)
                if outputs.logits is not None:
                    wrong.append((~(outputs.logits < torch.inf).all(), batch["index"]))
    stage.train(was_training)
    if wrong and True in (flags := torch.stack([flag for flag, _ in wrong]).tolist()):
        raise RunFailed(f"stage {stage.name!r}: the output is NaN or infinite for one or more of the samples "
                        f"{wrong[flags.index(True)][1].tolist()} of split {split!r}; look at them, or train again with "
                        "a lower rate or clipped gradients")  # fmt: skip
    return metrics.compute()


def slid(outputs_of: Callable[[Batch], Outputs | None], options: EvalOptions) -> Callable[[Batch], Outputs | None]:
    """The same of whole images, from the logits of windows over them; the mean where windows overlap."""
    if options.window is None:
        return outputs_of
    window = options.window
    stride = options.stride or [max(1, 2 * side // 3) for side in window]

    def evaluate(batch: Batch) -> Outputs | None:
        size = batch["image"].shape[-2:]
        total, count = torch.zeros(0), torch.zeros(size, device=batch["image"].device)
        for top, left in itertools.product(*map(_starts, size, window, stride)):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            part = {k: v[..., rows, columns] if getattr(v, "shape", ())[-2:] == size else v for k, v in batch.items()}
            if (outputs := outputs_of(part)) is None:
                return None
            logits = outputs.need("logits").float()
            if not len(total):
                total = logits.new_zeros(*logits.shape[:2], *size)
            place, seen = total[..., rows, columns], count[rows, columns]
            place += F.interpolate(logits, seen.shape, mode="bilinear", align_corners=False)
            seen += 1
        return Outputs(logits=total / count)

    return evaluate


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every stride, the last so that it ends with the image."""
    last = max(0, size - window)
    return [*range(0, last, stride), last]


def restore(run: Run, stage: TrainStage, artifact: Path, facts: Mapping[str, Any]) -> TrainStage:
    """A stage as it was when it was done, from its artifact and the facts in its manifest."""
    from safetensors.torch import load_model

    prepare(run, stage)
    if "metrics" in facts:
        stage.metrics = dict(facts["metrics"])
    load_model(stage, artifact / "stage.safetensors", device=str(run.device))
    return stage
