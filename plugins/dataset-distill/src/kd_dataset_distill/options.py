"""Options of the methods, the network and the data set."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kdcore.options import Options, Sampling

CHANGES = ("color", "crop", "cutout", "flip", "scale", "rotate")
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Steps on the images and epochs of the network after each, by images per class (DC, appendix and code)."""


class AugmentOptions(Options):
    """Differentiable Siamese augmentation: which changes one is drawn from, and how strong they are."""

    strategy: str = Field(
        "none",
        description=f"changes, joined by `_`, of which one is drawn for each call: {', '.join(CHANGES)}; or `none`",
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")
    scale: float = Field(1.2, ge=1, description="largest stretch of a side; the smallest is its inverse")
    rotate: float = Field(15.0, ge=0, le=180, description="largest angle in degrees")
    crop_pad: float = Field(0.125, ge=0, lt=1, description="largest shift, as a share of a side")
    cutout: float = Field(0.5, ge=0, le=1, description="side of the rectangle cut out, as a share of the image's")
    brightness: float = Field(1.0, ge=0, description="range of what is added, in standard deviations")
    saturation: float = Field(2.0, ge=0, description="largest factor of colours against grey")
    contrast: float = Field(0.5, ge=0, description="smallest factor of contrast; the largest is one more")

    @property
    def names(self) -> list[str]:
        """The changes of the strategy."""
        return [] if self.strategy == "none" else self.strategy.split("_")

    @model_validator(mode="after")
    def _known(self) -> AugmentOptions:
        if wrong := [name for name in self.names if name not in CHANGES]:
            raise ValueError(f"strategy: there is no change {wrong[0]!r}; changes: {', '.join(CHANGES)}, or `none`")
        return self


class SiameseOptions(AugmentOptions):
    """Differentiable Siamese augmentation with all changes."""

    strategy: str = Field(
        "_".join(CHANGES), description="changes, joined by `_`, of which one is drawn for each call; or `none`"
    )


class EvaluationOptions(Options):
    """How the small data set is measured: fresh networks of every student's architecture are trained on it."""

    ipc: int = Field(10, ge=1, description="samples per class of the small data set")
    eval_networks: int = Field(
        5, ge=1, description="fresh networks that each set trains, of each student's architecture"
    )
    baselines: list[Literal["random", "herding", "k-centers"]] = Field(
        ["random", "herding"], description="subsets of real samples of the same size that are trained on beside it"
    )
    full: float = Field(0, ge=0, description="epochs of networks on all training data, for comparison; 0 trains none")
    soft_labels: bool = Field(False, description="networks learn the teacher's logits on every set, not the labels")
    temperature: float = Field(1.0, gt=0, description="temperature of the soft labels")


class ImageOptions(EvaluationOptions):
    """What all methods that learn images have in common."""

    init: Literal["real", "noise"] = Field("real", description="where images begin: real ones of the class, or noise")
    lr_img: float = Field(gt=0, default=1.0, description="learning rate of the pixels, in standard deviations")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the pixels")
    augment: AugmentOptions = Field(
        default_factory=AugmentOptions, description="of matching, inner training and evaluation"
    )


class DCOptions(ImageOptions):
    """Gradient matching."""

    init: Literal["real", "noise"] = Field("noise", description="where images begin: real ones of the class, or noise")
    iterations: int = Field(
        1000, ge=0, description="fresh networks that are matched, one after another; 0 keeps the images"
    )
    batch_real: int = Field(256, ge=1, description="real images of each class and step")
    lr_img: float = Field(0.1, gt=0, description="learning rate of the pixels, in standard deviations")
    lr_net: float = Field(0.01, gt=0, description="learning rate of the network that is matched (momentum 0.5)")
    metric: Literal["ours", "mse", "cos"] = Field(
        "ours", description="distance of gradients: row by row of each layer, squared, or one cosine"
    )
    outer: int | None = Field(None, ge=1, description="steps on the images per network; default: by ipc, as published")
    inner: int | None = Field(None, ge=1, description="epochs of the network after each; default: by ipc, as published")
    batch_train: int = Field(256, ge=1, description="synthetic images per step of the network")

    @property
    def loops(self) -> tuple[int, int]:
        """Steps on the images per network and epochs of the network after each, of the next published ipc at least."""
        known = LOOPS[min((ipc for ipc in LOOPS if ipc >= self.ipc), default=max(LOOPS))]
        return self.outer or known[0], self.inner or known[1]


class DSAOptions(DCOptions):
    """Gradient matching under differentiable Siamese augmentation."""

    init: Literal["real", "noise"] = Field("real", description="where images begin: real ones of the class, or noise")
    augment: SiameseOptions = Field(
        default_factory=SiameseOptions, description="of matching, inner training and evaluation; no flip for digits"
    )


class DMOptions(ImageOptions):
    """Distribution matching."""

    iterations: int = Field(20_000, ge=0, description="fresh networks that are matched; 0 keeps the images")
    batch_real: int = Field(256, ge=1, description="real images of each class and step")
    augment: SiameseOptions = Field(
        default_factory=SiameseOptions, description="of matching and evaluation; no flip for digits"
    )


class MTTOptions(ImageOptions):
    """Trajectory matching."""

    iterations: int = Field(5000, ge=0, description="segments of trajectories that are matched; 0 keeps the images")
    lr_img: float = Field(1000.0, gt=0, description="learning rate of the pixels; the loss is a ratio, so it is large")
    num_experts: int = Field(100, ge=1, description="networks trained on the real data")
    train_epochs: int = Field(50, ge=1, description="epochs of each expert")
    lr_expert: float = Field(0.01, gt=0, description="learning rate of the experts, and the first of the learned rate")
    batch_expert: int = Field(256, ge=1, description="real images per step of an expert")
    expert_epochs: int = Field(3, ge=1, description="epochs of the expert that a segment spans (M)")
    syn_steps: int = Field(20, ge=1, description="steps on synthetic images that are to go as far (N)")
    max_start_epoch: int = Field(25, ge=1, description="segments begin before this epoch (T+)")
    batch_syn: int | None = Field(None, ge=1, description="synthetic images per step; default: all")
    learn_lr: bool = Field(
        True, description="learn the rate of the steps on synthetic images; networks are trained with it"
    )
    lr_lr: float = Field(1e-5, gt=0, description="learning rate of that rate")
    zca: bool = Field(False, description="networks see images whitened by the covariance of the training data (ZCA)")
    augment: SiameseOptions = Field(
        default_factory=SiameseOptions, description="of experts, matching and evaluation; no flip for digits"
    )

    @model_validator(mode="after")
    def _segments_fit(self) -> MTTOptions:
        if self.max_start_epoch + self.expert_epochs - 1 > self.train_epochs:
            raise ValueError(
                f"a segment that begins before epoch {self.max_start_epoch} and spans {self.expert_epochs} ends "
                f"beyond the experts' {self.train_epochs} epochs (train_epochs)"
            )
        return self


class LoRAOptions(Options):
    """Adapters that stand for a large model while gradients are taken."""

    r: int = Field(128, ge=1, description="rank")
    alpha: float = Field(512, gt=0, description="scale")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout")
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], description="linear layers that are adapted")


class CoresetOptions(EvaluationOptions):
    """Selection of real samples."""

    select: Literal["random", "herding", "k-centers", "perplexity", "less"] = Field("k-centers", description="how")
    fraction: float | None = Field(
        None, gt=0, le=1, description="share of all training samples, not a number per class; default: 0.05 for `less`"
    )
    keep: Literal["low", "middle", "high"] = Field("middle", description="which perplexities are kept")
    warmup_fraction: float = Field(0.05, gt=0, le=1, description="share of the samples the warm-up trains on (less)")
    warmup_epochs: int = Field(4, ge=1, description="epochs of the warm-up, each a checkpoint (less)")
    warmup_lr: float = Field(2e-5, gt=0, description="learning rate of the warm-up's Adam (less)")
    proj_dim: int = Field(8192, ge=1, description="dimensions that gradients are projected to (less)")
    target: str = Field("val", description="split whose loss the samples are to lower (less)")
    subtask: str | None = Field(None, description="batch key with the number of the target's subtask (less)")
    lora: LoRAOptions | None = Field(None, description="take gradients of adapters only (less; needs peft)")

    @model_validator(mode="after")
    def _share(self) -> CoresetOptions:
        if self.select == "less" and self.fraction is None and "ipc" not in self.model_fields_set:
            self.fraction = 0.05
        return self


class DiLMOptions(EvaluationOptions):
    """A generator whose texts give the gradients of the real data."""

    ipc: int = Field(20, ge=1, description="texts per class of the small data set")
    lm_steps: int = Field(80_000, ge=1, description="steps of language modelling on the real texts")
    lm_lr: float = Field(1e-5, gt=0, description="their learning rate")
    lm_batch: int = Field(64, ge=1, description="texts per step of language modelling")
    iterations: int = Field(
        20_000, ge=0, description="steps of gradient matching; 0 leaves the language model as it is"
    )
    lr: float = Field(3e-7, gt=0, description="their learning rate (AdamW, weight decay 0.01, cosine)")
    inner: int = Field(10, ge=1, description="steps before the learner begins afresh")
    learner_steps: int = Field(20, ge=0, description="steps of the learner on real texts between two of the generator")
    learner_lr: float = Field(1e-4, gt=0, description="learning rate of the learner (AdamW)")
    learner_batch: int = Field(64, ge=1, description="real texts per step of the learner")
    batch_syn: int = Field(64, ge=1, description="generated texts of each class and step")
    batch_real: int = Field(
        200, ge=1, description="real texts of each class and step: the size of a representative set"
    )
    real_sets: int = Field(
        10, ge=0, description="representative sets that take turns as the real side; 0: random texts"
    )
    interval: int = Field(
        20, ge=1, description="learners for which the generated texts are used before new ones are made"
    )
    diverse: bool = Field(True, description="each step's generated texts come from as many clusters")
    classifier_only: bool = Field(True, description="match gradients of the learner's last layer only")
    lm_lambda: float = Field(0.0, ge=0, le=1, description="share of language modelling in the loss of the matching")
    tau: float = Field(1.0, gt=0, description="temperature of the weights of generated texts")
    padded_loss: bool = Field(
        False, description="divide a text's loss by the padded length, as the published code does"
    )
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus of sampling")
    max_length: int = Field(64, ge=2, description="tokens of a text, at most")
    over_generate: int = Field(100, ge=1, description="texts made for each that k-centers keep")


class SynthesizeOptions(EvaluationOptions):
    """A text teacher writes samples of each class."""

    prompt: str = Field(
        "Write a short text on the topic: {{ label }}.\nText:",
        description="Jinja2 template; knows `label`, the class's name, and `examples`, texts of the class",
    )
    examples: int = Field(0, ge=0, description="real texts of the class that each prompt shows, drawn anew for each")
    over_generate: int = Field(4, ge=1, description="prompts for each text that is kept, at least")
    sampling: Sampling = Field(Sampling(max_tokens=64, top_p=0.95, stop=("\n",)), description="how answers are drawn")
    confidence: float = Field(
        0.0, ge=0, le=1, description="least probability that the critic (`teachers.critic`) gives the class asked for"
    )
    diversity: Literal["k-centers", "first"] = Field(
        "k-centers", description="of the answers that pass, those nearest to cluster centres, or the first"
    )


class GeneratorOptions(Options):
    """A causal language model with a start token for every class."""

    model: str | None = Field(None, description="Hub id or folder of a causal language model with its tokenizer")
    config: dict[str, Any] = Field(
        {}, description="in place of `model`: a config with its `model_type`, for fresh weights on the data's tokenizer"
    )
    checkpoint: str | None = Field(
        None, description="folder that an earlier run saved (`stages/*-match/artifact/generator`)"
    )

    @model_validator(mode="after")
    def _names_a_model(self) -> GeneratorOptions:
        if (self.model is None) == ("model_type" not in self.config):
            raise ValueError("give either `model` (Hub id or folder) or `config` with a `model_type`")
        return self

    def downloads(self) -> list[Any]:
        """The model, if it is no folder here."""
        from pathlib import Path

        from kdcore.options import Download

        return [] if self.model is None or Path(self.model).is_dir() else [Download(self.model, "Hugging Face Hub")]


class ConvNetOptions(Options):
    """The ConvNet of the dataset-condensation papers."""

    width: int = Field(128, ge=1, description="channels of each block")
    depth: int = Field(3, ge=1, description="blocks of convolution, norm, ReLU and pooling by two")
    norm: Literal["instance", "batch", "none"] = Field("instance", description="normalisation of a block")
    mean: float = Field(0.5, description="subtracted from the images, which lie in [0, 1]")
    std: float = Field(0.25, gt=0, description="by which they are divided then")
    checkpoint: str | None = Field(None, description="folder of a saved network or of a run")


class DistilledOptions(Options):
    """The small data set that a run of this plugin made, with the other splits of the data it was made from."""

    path: str = Field(description="run folder, or the folder of its data stage's artifact")
    data: dict[str, Any] | None = Field(
        None, description="data component and its options for the task and the other splits; default: the run's own"
    )
