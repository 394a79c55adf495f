"""Options of the losses and methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcore.options import Options


class CrossEntropyOptions(Options):
    """Cross-entropy with the labels."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="mass spread evenly over all classes")


class KDOptions(Options):
    """Hinton's soft targets."""

    temperature: float = Field(4.0, gt=0, description="softmax temperature of both sides")
    standardize: bool = Field(False, description="z-score the logits of both sides first (logit standardisation)")
    reduction: Literal["batchmean", "mean"] = Field("batchmean", description="'mean' also averages over the classes")


class DKDOptions(Options):
    """Decoupled knowledge distillation."""

    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(8.0, ge=0, description="weight of the other classes' part")
    temperature: float = Field(4.0, gt=0, description="softmax temperature of both sides")
    standardize: bool = Field(False, description="z-score the logits of both sides first (logit standardisation)")


class DISTOptions(Options):
    """Distillation from a stronger teacher, by correlation."""

    beta: float = Field(1.0, ge=0, description="weight of the correlation over the classes of a sample")
    gamma: float = Field(1.0, ge=0, description="weight of the correlation over the samples of a class")
    tau: float = Field(1.0, gt=0, description="softmax temperature of both sides")


class LayerOptions(Options):
    """Losses on intermediate layers, paired in order."""

    student_layers: list[str] = Field(["@all"], min_length=1, description="taps on the student")
    teacher_layers: list[str] = Field(["@all"], min_length=1, description="taps on the teacher, as many")


class FitNetsOptions(LayerOptions):
    """Hints from intermediate layers through a trained regressor."""

    student_layers: list[str] = Field(["@1"], min_length=1, description="guided layers of the student")
    teacher_layers: list[str] = Field(["@1"], min_length=1, description="hint layers of the teacher, as many")
    relu: bool = Field(True, description="the regressor ends in a ReLU, for teacher layers that do")


class ATOptions(LayerOptions):
    """Attention transfer."""

    mode: Literal["code", "paper"] = Field("code", description="squared difference, or its length as in the paper")
    p: int = Field(2, ge=1, description="power of the activations in the attention map")


class _Mixed(Options):
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the labels")


class KDMethodOptions(KDOptions, _Mixed):
    """Cross-entropy and KD, weighted as in the usual CIFAR benchmarks."""

    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy with the labels")
    weight: float = Field(0.9, ge=0, description="weight of the distillation loss")


class FitNetsMethodOptions(FitNetsOptions, _Mixed):
    """Cross-entropy and hints, jointly or one after the other."""

    weight: float = Field(100.0, ge=0, description="weight of the hint loss")
    joint: bool = Field(True, description="train hints and task together; otherwise hints first, then KD (the paper)")
    temperature: float = Field(4.0, gt=0, description="temperature of KD in the second stage of the paper's form")
    kd_weight: float = Field(4.0, ge=0, description="weight of KD in the second stage of the paper's form")


class ATMethodOptions(ATOptions, _Mixed):
    """Cross-entropy and attention transfer."""

    weight: float = Field(1000.0, ge=0, description="weight of the attention loss")


class DKDMethodOptions(DKDOptions, _Mixed):
    """Cross-entropy and DKD."""

    weight: float = Field(1.0, ge=0, description="weight of the distillation loss")
    warmup: float = Field(20.0, ge=0, description="epochs over which that weight rises")


class DISTMethodOptions(DISTOptions, _Mixed):
    """Cross-entropy and DIST."""

    weight: float = Field(2.0, ge=0, description="weight of the distillation loss")
