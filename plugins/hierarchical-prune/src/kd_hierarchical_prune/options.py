"""Options of the method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kdcore.options import Options

Stream = Literal["img", "txt", "sa", "ca"]


class HierarchicalPruneOptions(Options):
    """What is pruned, what is trained afterwards and on what, and whether the weights are quantised."""

    target_ratio: float = Field(0.8, gt=0, description="parameters that are left, as a part of the teacher's")
    granularity: Literal["block", "component"] = Field(
        "block", description="what is removed: whole blocks, or also single norms, attentions and feed-forward nets"
    )
    eligible_blocks: str = Field(
        "second-half", description="blocks that may be pruned: `second-half`, `all`, or half-open ranges: `12-20,22`"
    )
    position_weight: bool = Field(True, description="of blocks that contribute alike, prune the later one first")
    cut_blocks: str | None = Field(
        None,
        description="prune these instead: half-open ranges `25-29,31-35`, with a component as `7:attention`; "
        "an empty text prunes nothing",
    )
    blocks: list[str] = Field(
        [],
        description="module names of the lists of blocks, in the order they are run; default: transformer_blocks, then "
        "single_transformer_blocks",
    )
    calibration_samples: int = Field(100, gt=0, description="training samples that contributions are measured on")
    metric: str | None = Field(
        None,
        description="Python function `module:name`, called as `metric(run, denoiser)`, more is better; default: the "
        "negative distance to the teacher's outputs",
    )
    removed: Literal["pass-through", "zero"] = Field(
        "pass-through", description="what a removed attention or feed-forward net hands on: its input, or nothing"
    )
    removed_norm: Literal["layer-norm", "none"] = Field(
        "layer-norm", description="what takes the place of a removed adaptive norm"
    )
    pwp: bool = Field(True, description="freeze all that comes before the first cut (positional weight preservation)")
    train_blocks: str | None = Field(
        None, description="train these blocks only, as half-open ranges, instead of all that comes after the first cut"
    )
    sgd_mode: Literal["binary", "inverse"] = Field(
        "binary",
        description="sensitivity-guided distillation: parts are trained or frozen (as `pwp` says), or the learning "
        "rate of each part falls with its contribution",
    )
    sgd_threshold: float = Field(
        0.25, ge=0, le=1, description="pruned part above which `sgd_mode: inverse` takes effect"
    )
    kd_streams: list[Stream] = Field(
        ["img", "txt"],
        description="features that are matched: image and text tokens after each block, attention outputs for both "
        "(sa, ca)",
    )
    l_task: float = Field(
        0.0, ge=0, description="weight of the distance of the predicted clean latents to the true ones"
    )
    l_out: float = Field(1.0, ge=0, description="weight of the distance to the teacher's predictions")
    l_feat: float = Field(
        1e-4, ge=0, description="weight of the distance to the teacher's features, summed over blocks"
    )
    quantize: Literal["none", "nf4"] = Field("none", description="4-bit weights of all linear layers after training")
    train_teacher: bool = Field(False, description="first train the teacher on its own loss: for one without weights")
    samples: int = Field(8, ge=0, description="validation captions that pictures are drawn for; 0: none")
    sampling_steps: int = Field(28, gt=0, description="steps of the sampler")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance of the sampler; up to 1: none")

    @field_validator("target_ratio")
    @classmethod
    def _prunes(cls, value: float) -> float:
        if value >= 1:
            raise ValueError("1 keeps every parameter, so nothing would be pruned: give a part below 1, such as 0.8")
        return value

    @field_validator("kd_streams")
    @classmethod
    def _once(cls, value: list[Stream]) -> list[Stream]:
        if len(set(value)) < len(value):
            raise ValueError("a stream is named twice")
        return value
