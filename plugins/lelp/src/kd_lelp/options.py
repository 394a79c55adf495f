"""Options of the loss and the method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcore.options import Options


class LossOptions(Options):
    """Cross-entropy over pseudo-subclasses, whose targets a fitted projector reads off the teacher's embedding."""

    beta: float = Field(0.5, gt=0, description="temperature of the subclasses within a class; smaller is harder")
    tau: float = Field(1.0, gt=0, description="temperature of the classes, and of the student's softmax")
    alpha: float = Field(0.0, ge=0, le=1, description="weight of the labels; the distillation weighs 1 - alpha")


class LELPLossOptions(LossOptions):
    """The loss on its own, with a projector that an earlier run fitted."""

    projector: str | None = Field(
        None, description="file of a fitted projector: `stages/*-projector/artifact/tensors.safetensors` of a run"
    )


class LELPOptions(LossOptions):
    """Pseudo-subclasses from linear projections of the teacher's embeddings."""

    subclasses: int = Field(4, ge=1, description="pseudo-subclasses of each class (S); 1 is plain distillation")
    null_space: bool = Field(True, description="first remove from the embedding what the teacher's head reads")
    directions: Literal["pca", "random", "kmeans"] = Field(
        "pca", description="principal directions of each class, random ones, or towards its cluster centres"
    )
    rotation: Literal["random", "none"] = Field(
        "random", description="mix the principal directions, so that all have the same variance in expectation"
    )
    scale: Literal["class_std", "per_direction", "none"] = Field(
        "class_std", description="divide projections by one deviation per class, one per direction, or not at all"
    )
    class_source: Literal["label", "teacher"] = Field(
        "label", description="class of a sample in the fit: its label where it has one, or always the teacher's answer"
    )
    max_fit_samples: int = Field(50_000, ge=1, description="training samples the projector is fitted on, at most")
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="of the samples, rotation and clusters; default: follows the run's seed"
    )
