"""Options of the data sets and models."""

from __future__ import annotations

from pydantic import Field, model_validator

from kdcore.options import Options


class DigitsOptions(Options):
    """The handwritten digits of scikit-learn."""

    split_seed: int = Field(0, ge=0, description="which stratified split into train, val and test")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of all images in val")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of all images in test")
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training images kept, at least one per digit"
    )
    augment: bool = Field(
        False, description="shift training images by up to a pixel and rotate them by up to 10 degrees"
    )
    label_noise: float = Field(0.0, ge=0, le=1, description="share of training labels replaced by another class")
    parity: bool = Field(False, description="two classes, even and odd, with five hidden subclasses each")

    @model_validator(mode="after")
    def _leaves_training_images(self) -> DigitsOptions:
        if self.val_fraction + self.test_fraction > 0.9:
            raise ValueError(
                "val_fraction and test_fraction together leave less than a tenth of the images for training"
            )
        return self


class GeneratedOptions(Options):
    """What all generated data sets have in common."""

    train: int = Field(1000, gt=0, description="samples to train on")
    val: int = Field(200, gt=0, description="samples for validation")
    test: int = Field(200, gt=0, description="samples for the test")
    seed: int = Field(
        0, ge=0, description="seed of the generator; a sample depends on it, its split and its index alone"
    )


class ShapesOptions(GeneratedOptions):
    """Generated images of shapes with a class per pixel."""

    size: int = Field(32, ge=16, description="height and width of the images in pixels")
    noise: float = Field(0.05, ge=0, description="standard deviation of the pixel noise, where colours lie in [0, 1]")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of training pixels given another class")


class TopicsOptions(GeneratedOptions):
    """Generated sentences to be told apart by topic."""

    confusion: float = Field(
        0.2, ge=0, le=1, description="probability that a noun or verb comes from a random other theme"
    )
    binary: bool = Field(False, description="two classes: topics of even and of odd position")


class SentencesOptions(GeneratedOptions):
    """Generated short texts for a language model."""

    confusion: float = Field(
        0.1, ge=0, le=1, description="probability that a noun or verb comes from a random other theme"
    )
    longest: int = Field(3, ge=1, description="sentences in the longest text; all of one theme")
    prompt: int = Field(0, ge=0, description="nouns of the theme that are a prompt before each text; it does not count")


class HeartbeatsOptions(GeneratedOptions):
    """Generated clips of a beating ellipse, in four classes."""

    frames: int = Field(8, ge=2, description="frames of a clip")
    size: int = Field(32, ge=16, description="height and width of the frames in pixels")
    noise: float = Field(0.3, ge=0, description="strength of the speckle")
    labelled: bool = Field(True, description="ask for the classes; false: no task, and labels for probes alone")


class SensorsOptions(GeneratedOptions):
    """Generated movements, each recorded by two sensors."""

    length: int = Field(32, ge=8, description="time steps of a recording")
    imu_noise: float = Field(0.3, ge=0, description="standard deviation of the good sensor's noise (`imu`)")
    series_noise: float = Field(0.8, ge=0, description="standard deviation of the poor sensor's noise (`series`)")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of training labels replaced by another class")


class ModelOptions(Options):
    """What all models have in common."""

    checkpoint: str | None = Field(None, description="folder of a saved model or of a run; it decides the architecture")


class CNNOptions(ModelOptions):
    """A residual image classifier."""

    width: int = Field(16, gt=0, description="channels of the first stage, doubled in each of the two that follow")
    depth: int = Field(1, gt=0, description="residual blocks per stage")


class SegmenterOptions(ModelOptions):
    """A residual segmenter of stride 4."""

    width: int = Field(16, gt=0, description="channels of the first stage, doubled in each of the two that follow")
    depth: int = Field(1, gt=0, description="residual blocks per stage")


class TransformerOptions(ModelOptions):
    """A pre-norm transformer for text."""

    width: int = Field(64, gt=0, description="size of the hidden states")
    layers: int = Field(2, gt=0, description="transformer layers")
    heads: int = Field(4, gt=0, description="attention heads; they divide the width")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in attention and after each sub-layer")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided into {self.heads} heads")
        return self


class ViTOptions(TransformerOptions):
    """A vision transformer."""

    width: int = Field(48, gt=0, description="size of the hidden states")
    layers: int = Field(4, gt=0, description="transformer layers")
    patch: int = Field(2, gt=0, description="side of a patch in pixels; it divides the images' height and width")
    distilled: bool = Field(False, description="add a distillation token with a head of its own, as DeiT does")


class SensorNetOptions(ModelOptions):
    """A convolutional network for one or several sensors."""

    inputs: tuple[str, ...] = Field(("imu", "series"), min_length=1, description="batch keys of the sensors it reads")
    channels: int = Field(3, gt=0, description="channels of every sensor")
    width: int = Field(16, gt=0, description="channels of a branch's first layer; the later layers have twice as many")

    @model_validator(mode="after")
    def _no_repeats(self) -> SensorNetOptions:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError(f"inputs names a sensor twice: {', '.join(self.inputs)}")
        return self


class QuickstartOptions(Options):
    """The comparison of a student alone with the same student distilled."""

    seeds: int = Field(3, ge=1, description="pairs of students, each from other weights and other batches")


class ScriptedWriterOptions(Options):
    """A script that writes sentences on topics."""

    mistakes: float = Field(0.3, ge=0, le=1, description="share of answers that are on another topic than asked for")
    silence: float = Field(0.05, ge=0, le=1, description="share of answers that say nothing")
    confusion: float = Field(0.1, ge=0, le=1, description="probability that a noun or verb comes from another theme")
