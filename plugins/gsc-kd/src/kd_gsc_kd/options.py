"""Options of the method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kdcore.options import Options
from kdcore.recipe import OptimizerOptions, ScheduleOptions

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Weights(Options):
    """Weights of what the students learn from each other, beside a cross-entropy of weight 1."""

    hfd: Weight = Field(0.5, description="of the heterogeneous feature distillation, between maps of low layers")
    region: Weight = Field(0.5, description="of the selective distillation of regions, between the last maps")
    pixel: Weight = Field(1.0, description="of the selective distillation of pixels, between logits")


class StudentOptions(Options):
    """What concerns one of the two students."""

    stages: tuple[str, ...] = Field(
        (), description="taps of its stages, shallow to deep; default: those its network is known to have, the last "
        "four of five"
    )  # fmt: skip
    next_stage: tuple[str, ...] = Field(
        (), description="modules that lead, one after the other, from the map of stage `hfd_layer` to that of the "
        "next; default: those registered after the one, up to the other"
    )  # fmt: skip
    optimizer: OptimizerOptions | None = Field(None, description="its optimizer; default: `train.optimizer`")
    schedule: ScheduleOptions | None = Field(None, description="its schedule; default: `train.schedule`")
    lr_factors: dict[str, Factor] = Field(
        {}, description="factor of the learning rate by name of parameters, with `*` and `?`, such as "
        "{'decode_head.*': 10}; the first that fits"
    )  # fmt: skip


class GSCKDOptions(Options):
    """Heterogeneous feature distillation and bidirectional selective distillation between two students."""

    weights: Weights = Field(Weights(), description="weights of the three terms")
    hfd: Literal["cross_stage", "direct", "off"] = Field(
        "cross_stage", description="low maps are compared after the other net's next stage, directly, or not at all"
    )
    hfd_layer: int = Field(1, ge=1, description="the stage whose map is handed over, counted from 1")
    region_grid: int = Field(8, ge=1, description="regions along each side of the image; never finer than the last map")
    region_dim: int = Field(256, ge=1, description="channels of the common space in which regions are compared")
    temperature: float = Field(1.0, gt=0, description="temperature of the divergence of pixels")
    selection: Literal["lower_ce", "none"] = Field(
        "lower_ce", description="who teaches: where its label has the lower cross-entropy, or both everywhere (DML)"
    )
    reliable_only: bool = Field(False, description="a pixel is taught only where the one who teaches has it right")
    ramp: float = Field(
        0.05, ge=0, le=1, description="share of all steps over which the three weights rise linearly from 0"
    )
    cnn: StudentOptions = Field(StudentOptions(), description="what concerns the student `cnn` alone")
    vit: StudentOptions = Field(StudentOptions(), description="what concerns the student `vit` alone")

    @field_validator("hfd", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare `off`

    @property
    def compares_low(self) -> bool:
        """Whether the maps of low layers are compared."""
        return self.hfd != "off" and self.weights.hfd > 0

    @property
    def cooperates(self) -> bool:
        """Whether the students learn anything from each other."""
        return self.compares_low or self.weights.region > 0 or self.weights.pixel > 0
