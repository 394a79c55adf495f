"""How a stage trains: the `train` section of a recipe, its optimizer and its schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

OPTIMIZERS: dict[str, set[str]] = {
    "sgd": {"fused", "weight_decay", "momentum", "nesterov"},
    "adam": {"fused", "weight_decay", "betas", "eps"},
    "adamw": {"fused", "weight_decay", "betas", "eps"},
    "nadam": {"weight_decay", "betas", "eps"},
    "radam": {"weight_decay", "betas", "eps"},
    "rmsprop": {"weight_decay", "momentum", "eps"},
    "adagrad": {"fused", "weight_decay", "eps"},
}
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch has fused optimizers."""


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class OptimizerOptions(Section):
    """The optimizer. What is not given keeps torch's own default."""

    name: Literal["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad"] = Field("adamw", description="which")
    lr: float = Field(1e-3, gt=0, description="learning rate at its peak")
    weight_decay: float | None = Field(None, ge=0, description="weight decay")
    momentum: float | None = Field(None, ge=0, description="momentum (sgd, rmsprop)")
    nesterov: bool | None = Field(None, description="Nesterov momentum (sgd)")
    betas: tuple[float, float] | None = Field(None, description="decay of the moments (adam and its kin)")
    eps: float | None = Field(None, gt=0, description="term added to the denominator")
    fused: bool | None = Field(
        None, description="one kernel for all parameters (sgd, adagrad; adam and adamw do it by default)"
    )

    @model_validator(mode="after")
    def _fits(self) -> OptimizerOptions:
        extra = self.model_fields_set - OPTIMIZERS[self.name] - {"name", "lr"}
        if wrong := [key for key in sorted(extra) if getattr(self, key) is not None]:
            raise ValueError(
                f"{self.name} has no {', '.join(wrong)}; it has: {', '.join(sorted(OPTIMIZERS[self.name]))}"
            )
        return self


class ScheduleOptions(Section):
    """The learning rate as a factor of its peak, over a stage's optimizer steps."""

    name: Literal["constant", "linear", "cosine", "polynomial", "multistep"] = Field("cosine", description="its shape")
    warmup: float = Field(0.0, ge=0, description="linear warm-up: a fraction of all steps if below 1, else steps")
    final: float = Field(0.0, ge=0, le=1, description="factor at the end (linear, cosine, polynomial)")
    power: float = Field(0.9, gt=0, description="exponent (polynomial)")
    milestones: list[float] = Field([], description="fractions of the stage at which the rate drops (multistep)")
    gamma: float = Field(0.1, gt=0, description="factor of each drop (multistep)")


class TrainOptions(Section):
    """How a training stage trains."""

    epochs: float = Field(10, gt=0, description="passes over the training split")
    steps: int | None = Field(None, gt=0, description="optimizer steps; overrides epochs")
    batch_size: int = Field(64, gt=0, description="examples per optimizer step, over all processes and accumulation")
    eval_batch_size: int | None = Field(None, gt=0, description="examples per process and batch in evaluation")
    optimizer: Annotated[OptimizerOptions, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Field(
        default_factory=lambda: OptimizerOptions(), description="the optimizer"
    )
    schedule: Annotated[ScheduleOptions, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Field(
        default_factory=lambda: ScheduleOptions(), description="the learning-rate schedule"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast precision of the whole run")
    grad_accumulation: int = Field(1, gt=0, description="micro-batches a batch is split into; the result is the same")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="when a term or gradient is NaN or infinite: stop the run, or skip the step"
    )
    max_skipped: int = Field(10, ge=0, description="steps of a stage that may be skipped before the run stops (skip)")
    on_oom: Literal["stop", "halve"] = Field(
        "stop", description="without memory left: stop, or halve the micro-batches of the same batch (one process)"
    )
    clip_norm: float | None = Field(None, gt=0, description="gradients are scaled down to this norm")
    shard: Literal["none", "student", "all"] = Field(
        "none", description="FSDP2: what is trained, or frozen models as well, is divided over the processes"
    )
    compile: bool = Field(False, description="compile student and teacher with torch.compile")
    channels_last: bool = Field(False, description="convolutions of student and teachers in channels-last layout")
    workers: int = Field(0, ge=0, description="data-loading processes")
    log_every: int = Field(10, gt=0, description="steps between rows of metrics.jsonl")
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations on val; default: every epoch")
    save_every: int | None = Field(None, gt=0, description="steps between checkpoints; default: every epoch")
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept")


def schedule_factor(options: ScheduleOptions, step: int, total: int) -> float:
    """The learning rate at a step as a factor of its peak."""
    warmup = round(options.warmup * total if options.warmup < 1 else options.warmup)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if options.name == "constant":
        return 1.0
    if options.name == "multistep":
        return options.gamma ** sum(step / total >= m for m in options.milestones)
    shape = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
             "polynomial": (1 - done) ** options.power}[options.name]  # fmt: skip
    return float(options.final + (1 - options.final) * shape)
