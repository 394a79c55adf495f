"""Options of the search spaces, the losses and the method."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from kd_diswot.space import SearchSpace, cell_space, decode_cell, depths_space
from kdcore.options import Options

Operation = Literal["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
Term = Literal["semantic", "relation"]


class CIFARResNetOptions(Options):
    """A ResNet for small images. As the student of a search, its depths are what is searched."""

    arch: str = Field("9-9-9", description="residual blocks of each stage; 9-9-9 is ResNet-56")
    choices: tuple[int, ...] = Field((1, 3, 5, 7), min_length=1, description="depths that a search tries at each stage")
    width: int = Field(16, gt=0, description="channels of the first stage; each further one has twice as many")
    checkpoint: str | None = Field(None, description="a trained one: a run folder or the `student` folder in it")

    @field_validator("arch")
    @classmethod
    def _depths(cls, arch: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", arch):
            raise ValueError("write the blocks of each stage, such as 5-5-7")
        return arch

    @field_validator("choices")
    @classmethod
    def _positive(cls, choices: tuple[int, ...]) -> tuple[int, ...]:
        if min(choices) < 1 or len(set(choices)) < len(choices):
            raise ValueError("depths are different whole numbers from 1 upward")
        return choices

    def space(self) -> SearchSpace:
        """As many stages as `arch` has, each with any of the choices."""
        return depths_space(self.choices, len(self.arch.split("-")))


class CellOptions(Options):
    """A network of NAS-Bench-201: one cell, stacked. As the student of a search, the cell is what is searched."""

    arch: str = Field(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        description="operation of each edge of the cell, as the benchmark writes it",
    )
    operations: tuple[Operation, ...] = Field(
        ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"), min_length=1,
        description="operations that a search tries on each edge",
    )  # fmt: skip
    channels: int = Field(16, gt=0, description="channels of the first stage; the classifier reads four times as many")
    cells: int = Field(5, gt=0, description="cells of each of the three stages")
    checkpoint: str | None = Field(None, description="a trained one: a run folder or the `student` folder in it")

    @field_validator("arch")
    @classmethod
    def _cell(cls, arch: str) -> str:
        decode_cell(arch)
        return arch

    def space(self) -> SearchSpace:
        """Six edges, each with any of the operations."""
        return cell_space(tuple(dict.fromkeys(self.operations)))


class LayersOptions(Options):
    """Which maps a loss compares."""

    student_layer: str = Field("@-1", description="the student's map: a module name or stage; default: the last stage")
    teacher_layer: str = Field("@-1", description="the teacher's map, likewise")


class DisWOTOptions(LayersOptions):
    """The search, and the weights of what the winner is distilled with."""

    strategy: Literal["evolution", "random", "exhaustive"] = Field(
        "evolution", description="regularised evolution, independent draws, or every architecture of the space"
    )
    budget: int = Field(1000, gt=0, description="architectures scored, at most; an exhaustive search ignores it")
    population: int = Field(36, gt=0, description="architectures that live at a time: the latest (evolution)")
    tournament: int = Field(8, gt=0, description="architectures drawn of them for a tournament (evolution)")
    parents: int = Field(5, gt=0, description="of the best so many of a tournament, one becomes a parent (evolution)")
    terms: tuple[Term, ...] = Field(("semantic", "relation"), min_length=1, description="similarities that are added")
    normalise: bool = Field(False, description="each term as its z-score over all architectures tried, then added")
    proxy: str | None = Field(
        None, description="name of another loss: the score is its negative, in place of the terms"
    )
    init: Literal["gaussian", "default"] = Field(
        "gaussian", description="random weights: N(0, 1) for convolutions and linear layers, or each layer's own"
    )
    batch: int = Field(64, gt=1, description="training samples of the one batch that all are scored on")
    repeats: int = Field(1, gt=0, description="initialisations over which a score is averaged")
    flops_max: float | None = Field(
        None, gt=0, description="architectures with more operations per sample are left out"
    )
    parameters_max: float | None = Field(None, gt=0, description="architectures with more parameters are left out")
    ce_weight: float = Field(0.1, ge=0, description="weight of the labels when the winner is trained")
    kd_weight: float = Field(0.9, ge=0, description="weight of the soft targets")
    temperature: float = Field(4.0, gt=0, description="their temperature")
    semantic_weight: float = Field(0.0, ge=0, description="weight of the channel similarity as a loss")
    relation_weight: float = Field(0.0, ge=0, description="weight of the batch similarity as a loss")
