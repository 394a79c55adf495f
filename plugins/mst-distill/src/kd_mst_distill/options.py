"""Options of the loss, the method, and of the paper's models and data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcore.options import Options

Patterns = Annotated[tuple[str, ...], Field(min_length=1)]


class RoutedKDOptions(Options):
    """Distillation from the teachers that a gate chooses for each sample."""

    temperature: float = Field(4.0, gt=0, description="temperature of every divergence")
    k: int = Field(1, ge=1, description="teachers per sample, the most probable ones (routing=hard)")
    routing: Literal["hard", "weighted"] = Field(
        "hard", description="the k most probable teachers, or the mean of all under the gate's probabilities"
    )
    lb_mode: Literal["kl", "cv"] = Field(
        "kl", description="load balance: divergence of uniform from mean use, or coefficient of variation"
    )
    w_kl: float = Field(1.0, ge=0, description="weight of the divergence from the chosen teachers, at the start")
    w_lb: float = Field(1.0, ge=0, description="weight of the load balance, at the start")
    kl_decay: float = Field(0.5, gt=0, le=1, description="what w_kl is multiplied by, first after epoch 0; 1 keeps it")
    kl_decay_every: int = Field(30, ge=1, description="epochs from one such step to the next")
    lb_decay: float = Field(0.9, gt=0, le=1, description="what w_lb is multiplied by, first after epoch 0; 1 keeps it")
    lb_decay_every: int = Field(10, ge=1, description="epochs from one such step to the next")


class MaskLayers(Options):
    """The layers that get a mask, by teacher: module names with `*` and `?`, or stages (`@-1` is the last)."""

    teacher: Patterns = Field(("@-2", "@-1"), description="layers of the multimodal teacher")
    cross: Patterns = Field(("@-2", "@-1"), description="layers of the teacher of the other modality")


class MSTDistillOptions(RoutedKDOptions):
    """A mixture of specialised teachers, routed per instance."""

    mask_layers: MaskLayers = Field(MaskLayers(), description="the layers that get a mask, by teacher")
    mask_layer_num: int = Field(
        2, ge=1, description="specialised teachers made of each teacher: the first so many of its mask layers"
    )
    mask_heads: int = Field(3, ge=1, description="attention heads of a mask")
    hidden_dim_factor: int = Field(
        2, ge=1, description="a mask's width is the layer's divided by this; raise it for wide layers"
    )
    stacked_hooks: bool = Field(
        False, description="the j-th teacher runs with masks 1 to j, as the official code does by mistake"
    )
    w_task: float = Field(1.0, ge=0, description="weight of the task's own loss in the last stage")
    co_train_epochs: float = Field(1, gt=0, description="epochs of the first stage, unless `stages.co_train` says")
    adapt_epochs: float = Field(1, gt=0, description="epochs of the second stage, unless `stages.adapt_masks` says")

    @model_validator(mode="after")
    def _enough_teachers(self) -> MSTDistillOptions:
        experts = 2 * self.mask_layer_num
        if self.k > experts:
            raise ValueError(f"k={self.k} teachers per sample, but mask_layer_num={self.mask_layer_num} makes only "
                             f"{experts} specialised teachers, {self.mask_layer_num} of each")  # fmt: skip
        return self


class AVMNISTNetOptions(Options):
    """The paper's networks for AV-MNIST."""

    inputs: tuple[Literal["image", "spectrogram"], ...] = Field(
        ("image", "spectrogram"), min_length=1, description="what it reads: one of them, or both"
    )
    checkpoint: str | None = Field(None, description="folder of a saved model or of a run")

    @model_validator(mode="after")
    def _no_repeats(self) -> AVMNISTNetOptions:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError(f"inputs names {self.inputs[0]!r} twice")
        return self


class PairedArraysOptions(Options):
    """Arrays in .npy files, paired by position, split at random."""

    path: str = Field(..., description="folder that the files are named from")
    arrays: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        ..., min_length=1, description="files by batch key; several are joined along the first axis"
    )
    label: list[str] = Field(..., min_length=1, description="files of the class indices")
    shapes: dict[str, list[int]] = Field({}, description="shape of a sample by batch key, where the files' is another")
    min_max: bool = Field(True, description="bring each array to [0, 1] by its least and largest value over all splits")
    fractions: tuple[float, float, float] = Field((0.6, 0.2, 0.2), description="shares of train, val and test")
    split_seed: int = Field(0, ge=0, description="which permutation is split")

    @model_validator(mode="after")
    def _fits(self) -> PairedArraysOptions:
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be positive and add up to 1, but are {self.fractions}")
        if unknown := set(self.shapes) - set(self.arrays):
            raise ValueError(f"shapes names {min(unknown)!r}, which arrays does not: {', '.join(self.arrays)}")
        return self
