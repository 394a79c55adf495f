"""Options of the losses and methods. The weights of the methods are those of the usual benchmarks."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, create_model, model_validator

from kdcore.options import Options


class CrossEntropyOptions(Options):
    """Cross-entropy with smoothed labels."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="mass spread evenly over all classes")


class SoftOptions(Options):
    """What losses on softened logits share."""

    temperature: float = Field(4.0, gt=0, description="softmax temperature of both sides")
    standardize: bool = Field(False, description="z-score the logits of both sides first (logit standardisation)")


class KDOptions(SoftOptions):
    """Hinton's soft targets."""

    reduction: Literal["batchmean", "mean"] = Field("batchmean", description="'mean' also averages over the classes")


class DKDOptions(SoftOptions):
    """Decoupled knowledge distillation."""

    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(8.0, ge=0, description="weight of the other classes' part")


class DISTOptions(Options):
    """Distillation from a stronger teacher, by correlation."""

    beta: float = Field(1.0, ge=0, description="weight of the correlation over the classes of a sample")
    gamma: float = Field(1.0, ge=0, description="weight of the correlation over the samples of a class")
    tau: float = Field(1.0, gt=0, description="softmax temperature of both sides")
    standardize: bool = Field(False, description="z-score the logits of both sides first (logit standardisation)")


class WSLDOptions(SoftOptions):
    """Weighted soft labels; the cross-entropy with the labels is part of it."""

    temperature: float = Field(2.0, gt=0, description="softmax temperature of the soft part")
    alpha: float = Field(2.5, ge=0, description="weight of the soft part")


class LSROptions(Options):
    """Label smoothing, as in Tf-KD's code."""

    alpha: float = Field(0.1, ge=0, lt=1, description="mass spread over the classes that are not the label")


class TfKDRegOptions(Options):
    """Distillation from a made-up teacher; the cross-entropy with the labels is part of it."""

    alpha: float = Field(0.1, ge=0, le=1, description="share of the made-up teacher")
    temperature: float = Field(20.0, gt=0, description="temperature of the made-up teacher")
    multiplier: float = Field(100.0, ge=0, description="factor of the divergence (100 for ResNet18, 1 for MobileNetV2)")
    correct_prob: float = Field(0.99, gt=0, lt=1, description="the made-up teacher's belief in the label")


class DeiTOptions(Options):
    """Distillation token; the cross-entropy of the class token with the labels is part of it."""

    kind: Literal["hard", "soft"] = Field("hard", description="the teacher's decision, or its probabilities")
    alpha: float = Field(0.5, ge=0, le=1, description="share of the teacher (paper, soft: 0.1)")
    temperature: float = Field(1.0, gt=0, description="of the soft kind (paper: 3)")
    standardize: bool = Field(False, description="z-score the logits of the soft kind first (logit standardisation)")


class MultiTeacherOptions(SoftOptions):
    """Soft targets of several teachers."""

    weighting: Literal["average", "gate", "confidence"] = Field(
        "average", description="by `weights`; by a gate trained on the labels; by how well each knows a sample's label"
    )
    weights: dict[str, float] = Field({}, description="of the teachers, by role, for 'average'; default: all alike")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        for role, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights.{role}: a weight is a number of 0 or more, not {weight}")
        if self.weights and not sum(self.weights.values()):
            raise ValueError("weights: at least one must be more than 0")
        if self.weights and self.weighting != "average":
            raise ValueError(f"weights: given for 'average' only, not for {self.weighting!r}")
        return self


class LayerOptions(Options):
    """Losses on intermediate layers, paired in order."""

    student_layers: list[str] = Field([], description="taps on the student; default: chosen from its stages")
    teacher_layers: list[str] = Field([], description="taps on the teacher, as many; default: chosen from its stages")

    @model_validator(mode="after")
    def _both(self) -> Self:
        if bool(self.student_layers) != bool(self.teacher_layers):
            raise ValueError("student_layers and teacher_layers belong together: give both, or neither")
        return self


class FitNetsOptions(LayerOptions):
    """Hints from the middle stage, unless other layers are named, through a trained regressor."""

    relu: bool = Field(True, description="the regressor ends in a ReLU, for teacher layers that do")


class ATOptions(LayerOptions):
    """Attention transfer."""

    mode: Literal["code", "paper"] = Field("code", description="squared difference, or its length as in the paper")
    p: int = Field(2, ge=1, description="power of the activations in the attention map")


class NSTOptions(LayerOptions):
    """Neuron selectivity transfer."""


class VIDOptions(LayerOptions):
    """Variational information distillation."""

    init_variance: float = Field(5.0, gt=1e-4, description="of every channel at the start")


class ABOptions(LayerOptions):
    """Activation boundaries, between values before their activation."""

    margin: float = Field(1.0, gt=0, description="how far beyond zero the student is pushed")


class OFDOptions(LayerOptions):
    """Overhaul of feature distillation, between values before their activation."""

    teacher_norms: list[str] = Field([], description="the batch norm that ends each teacher layer; default: its last")
    teacher_batch_statistics: bool = Field(
        False, description="the teacher's batch norms use the batch's statistics, as in the original code"
    )


class ReviewKDOptions(LayerOptions):
    """Knowledge review: every level of the student learns from the teacher's level and the ones above."""

    width: int = Field(512, gt=0, description="most channels of what a level hands to the next")


class MGDOptions(LayerOptions):
    """Masked generative distillation of the last stage."""

    kind: Literal["cls", "dense"] = Field("cls", description="mask channels (classification) or positions (dense)")
    alpha: float = Field(7e-5, ge=0, description="factor (2e-5 for dense prediction)")
    masked: float = Field(0.15, ge=0, lt=1, description="share that is masked (dense: 0.65 to 0.75)")


class SimKDOptions(LayerOptions):
    """Last feature map through a projector, for the teacher's classifier to read."""

    factor: int = Field(2, gt=0, description="how much narrower than the teacher the projector is inside")


class RelationOptions(LayerOptions):
    """Relations between samples, by the input of the classifier unless a layer is named."""

    student_layers: list[str] = Field([], max_length=1, description="tap on the student; default: its embedding")
    teacher_layers: list[str] = Field([], max_length=1, description="tap on the teacher; default: its embedding")


class SPOptions(RelationOptions):
    """Similarity preservation, of the last feature map."""

    student_layers: list[str] = Field([], max_length=1, description="tap on the student; default: its last stage")
    teacher_layers: list[str] = Field([], max_length=1, description="tap on the teacher; default: its last stage")


class RKDOptions(RelationOptions):
    """Relational knowledge distillation."""

    distance_weight: float = Field(25.0, ge=0, description="weight of the distances")
    angle_weight: float = Field(50.0, ge=0, description="weight of the angles")


class PKTOptions(RelationOptions):
    """Probabilistic knowledge transfer."""


class CRDOptions(RelationOptions):
    """Contrastive representation distillation."""

    negatives: int = Field(16384, gt=0, description="negatives per sample")
    mode: Literal["exact", "relax"] = Field("exact", description="from other classes, or any other samples")
    replacement: bool = Field(False, description="allow a negative to be drawn twice, for data with fewer samples")
    width: int = Field(128, gt=0, description="of the embeddings")
    temperature: float = Field(0.07, gt=0, description="of the scores")
    momentum: float = Field(0.5, ge=0, lt=1, description="share of a bank's row that stays when its sample is seen")


class CWDOptions(LayerOptions):
    """Channel-wise distillation of score maps or layers."""

    signal: Literal["logits", "layers"] = Field("logits", description="score maps, or layers (default: the last stage)")
    temperature: float = Field(4.0, gt=0, description="softmax temperature over positions")
    norm: Literal["channel", "spatial", "mse"] = Field("channel", description="over positions, over channels, or none")


class PixelWiseOptions(SoftOptions):
    """Pixel-wise soft cross-entropy."""

    temperature: float = Field(1.0, gt=0, description="softmax temperature of both sides")


class PairWiseOptions(LayerOptions):
    """Pair-wise similarity of regions of the last feature map."""

    scale: float = Field(0.5, gt=0, le=1, description="size of a region, as a share of the map")


class BYOTOptions(Options):
    """Self-distillation from the last stage; the cross-entropy of all exits is part of it."""

    temperature: float = Field(3.0, gt=0, description="softmax temperature of both sides")
    alpha: float = Field(0.1, ge=0, le=1, description="share of the deepest exit's soft labels")
    beta: float = Field(1e-6, ge=0, description="weight of the features, which are summed over the batch")
    layers: list[str] = Field([], description="taps, the last of which is the deepest; default: the last four stages")
    standardize: bool = Field(False, description="z-score the logits first (logit standardisation)")


def _method(loss: type[Options], weight: float, ce_weight: float = 1.0, warmup: float | None = None) -> Any:
    """The options of a loss as those of the method that adds it to the cross-entropy."""
    rise = {} if warmup is None else {
        "warmup": (float, Field(warmup, ge=0, description="epochs over which that weight rises"))
    }  # fmt: skip
    return create_model(
        loss.__name__.replace("Options", "MethodOptions"),
        __base__=loss,
        __doc__=f"{(loss.__doc__ or '').rstrip('.')}, with the cross-entropy.",
        __module__=__name__,
        ce_weight=(float, Field(ce_weight, ge=0, allow_inf_nan=False, description="weight of the cross-entropy")),
        weight=(float, Field(weight, ge=0, allow_inf_nan=False, description="weight of the distillation loss")),
        **rise,  # type: ignore[call-overload]
    )


KDMethodOptions = _method(KDOptions, 0.9, 0.1)
DKDMethodOptions = _method(DKDOptions, 1.0, warmup=20.0)
DISTMethodOptions = _method(DISTOptions, 2.0)
MultiTeacherMethodOptions = _method(MultiTeacherOptions, 0.9, 0.1)
ATMethodOptions = _method(ATOptions, 1000.0)
NSTMethodOptions = _method(NSTOptions, 50.0)
VIDMethodOptions = _method(VIDOptions, 1.0)
OFDMethodOptions = _method(OFDOptions, 1e-3)
ReviewKDMethodOptions = _method(ReviewKDOptions, 5.0, warmup=20.0)
MGDMethodOptions = _method(MGDOptions, 1.0)
SPMethodOptions = _method(SPOptions, 3000.0)
RKDMethodOptions = _method(RKDOptions, 1.0)
PKTMethodOptions = _method(PKTOptions, 30000.0)
CRDMethodOptions = _method(CRDOptions, 0.8)
CWDMethodOptions = _method(CWDOptions, 3.0)


class FitNetsMethodOptions(_method(FitNetsOptions, 100.0)):  # type: ignore[misc]
    """Cross-entropy and hints, jointly or one after the other."""

    joint: bool = Field(True, description="train hints and task together; otherwise hints first, then KD (the paper)")
    temperature: float = Field(4.0, gt=0, description="temperature of KD in the second stage of the paper's form")
    kd_weight: float = Field(4.0, ge=0, description="weight of KD in the second stage of the paper's form")


class ABMethodOptions(ABOptions):
    """Activation boundaries first, then the task alone."""

    weight: float = Field(1.0, ge=0, description="weight of the boundary loss in the first stage")


class TfKDMethodOptions(TfKDRegOptions):
    """Distillation without a teacher: from a made-up one, or from an earlier copy of the student."""

    variant: Literal["reg", "self"] = Field("reg", description="a made-up teacher, or the student trained once before")


class SKDMethodOptions(Options):
    """Structured distillation for segmentation: cross-entropy, pixel-wise, pair-wise and holistic terms."""

    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    pixel_weight: float = Field(10.0, ge=0, description="weight of the pixel-wise term")
    pair_weight: float = Field(1.0, ge=0, description="weight of the pair-wise term")
    holistic_weight: float = Field(0.1, ge=0, description="weight of the adversarial term; 0 trains no discriminator")
    scale: float = Field(0.5, gt=0, le=1, description="size of a region of the pair-wise term, as a share of the map")
    gradient_penalty: float = Field(10.0, ge=0, description="weight of the discriminator's gradient penalty")
    discriminator_width: int = Field(64, gt=0, description="channels of the discriminator's first layer")
    discriminator_lr: float = Field(4e-4, gt=0, description="learning rate of the discriminator (Adam)")


class DMLMethodOptions(SoftOptions):
    """Deep mutual learning of all students of the recipe."""

    temperature: float = Field(1.0, gt=0, description="softmax temperature of both sides")
    weight: float = Field(1.0, ge=0, description="weight of the peers' mean divergence")
    together: bool = Field(False, description="update all peers from one forward pass, instead of in turn")


class TAKDMethodOptions(KDOptions):
    """A chain of teaching: teacher, assistants in the order of the recipe, student."""

    temperature: float = Field(4.0, gt=0, description="softmax temperature of both sides, at every arrow")
    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy, where the recipe lists no losses")
    weight: float = Field(0.9, ge=0, description="weight of KD, where the recipe lists no losses")


class BornAgainMethodOptions(KDOptions):
    """Generations of one architecture, each taught by the one before."""

    temperature: float = Field(1.0, gt=0, description="softmax temperature of both sides")
    ce_weight: float = Field(0.5, ge=0, description="weight of the cross-entropy")
    weight: float = Field(0.5, ge=0, description="weight of KD from the generation before")
    generations: int = Field(2, gt=0, description="students trained one after the other")
