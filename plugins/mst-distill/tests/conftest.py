"""Small data and models for the tests: six classes seen in two ways, one noisier; images with a class per pixel."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore import Component, Model, Outputs, PluginManager, hookimpl
from kdcore.data import DataModule, Task
from kdcore.options import Options

CLASSES, DIM, WIDTH = 6, 20, 16
NOISE = {"one": 2.2, "two": 1.2}


class CloudsOptions(Options):
    """Samples per split, the entries that train and val have, and the kind of the task."""

    size: int = 600
    train: tuple[str, ...] = ("one", "two")
    val: tuple[str, ...] = ("one", "two")
    kind: str = "classification"
    seed: int = 0


def clouds(options: CloudsOptions) -> DataModule:
    """`one` and `two`, each a class's centre in 20 dimensions with noise."""
    generator = torch.Generator().manual_seed(options.seed)
    centres = {key: torch.randn(CLASSES, DIM, generator=generator) for key in NOISE}
    splits = {}
    for split in ("train", "val", "test"):
        label = torch.randint(CLASSES, (options.size,), generator=generator)
        views = {key: centres[key][label] + noise * torch.randn(options.size, DIM, generator=generator)
                 for key, noise in NOISE.items()}  # fmt: skip
        keys = getattr(options, split, tuple(NOISE))
        splits[split] = [{**{key: views[key][i] for key in keys}, "label": label[i]} for i in range(options.size)]
    task: Any = Task(options.kind, num_classes=CLASSES)
    return DataModule(splits, task)


class MLP(nn.Module):
    """A branch per input, then three linear layers."""

    def __init__(self, inputs: tuple[str, ...], classes: int, norm: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({key: nn.Linear(DIM, WIDTH) for key in inputs})
        self.norm = nn.BatchNorm1d(WIDTH * len(inputs)) if norm else nn.Identity()
        self.drop = nn.Dropout(0.2 if norm else 0.0)
        self.fc1 = nn.Linear(WIDTH * len(inputs), WIDTH)
        self.fc2 = nn.Linear(WIDTH, WIDTH)
        self.fc3 = nn.Linear(WIDTH, classes)

    def embed(self, views: dict[str, Tensor]) -> Outputs:
        x = torch.cat([branch(views[key]).relu() for key, branch in self.branches.items()], 1)
        x = self.fc1(self.drop(self.norm(x))).relu()
        x = self.fc2(x).relu()
        return Outputs(self.fc3(x), x)


class NamedMLP(MLP):
    """Called by the names of its `forward`."""

    def forward(self, two: Tensor) -> Outputs:
        return self.embed({"two": two})


class MLPOptions(Options):
    """What it reads, how many classes it tells apart, and how it is called."""

    inputs: tuple[str, ...] = ("one", "two")
    classes: int = CLASSES
    norm: bool = False
    by_name: bool = False
    checkpoint: str | None = None


def mlp(options: MLPOptions, task: Task) -> Model:
    """The model; a checkpoint is not read."""
    kind = NamedMLP if options.by_name else MLP
    net = kind(options.inputs, options.classes, options.norm)
    call = None if options.by_name else lambda net, batch: net.embed(batch)
    return Model(net, call, stages=("fc1", "fc2"))


class HalvesOptions(Options):
    """Images of a few pixels."""

    size: int = 32


def halves(options: HalvesOptions) -> DataModule:
    """Images `image` and noisier `depth` `[2, 8, 8]`, and the class of each pixel: which channel is larger, or none."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split in ("train", "val"):
        image = torch.rand(options.size, 2, 8, 8, generator=generator)
        mask = torch.where((image[:, 0] - image[:, 1]).abs() < 0.2, 2, (image[:, 1] > image[:, 0]).long())
        depth = image + 0.2 * torch.randn(image.shape, generator=generator)
        splits[split] = [{"image": image[i], "depth": depth[i], "mask": mask[i]} for i in range(options.size)]
    return DataModule(splits, Task("segmentation", num_classes=3))


class FCNOptions(Options):
    """What it reads, and how much smaller its logits are."""

    inputs: tuple[str, ...] = ("image", "depth")
    stride: int = 1
    checkpoint: str | None = None


def fcn(options: FCNOptions, task: Task) -> Model:
    """Three convolutions."""
    net = nn.ModuleDict({
        "conv1": nn.Conv2d(2 * len(options.inputs), 8, 3, stride=options.stride, padding=1),
        "conv2": nn.Conv2d(8, 8, 3, padding=1),
        "head": nn.Conv2d(8, 3, 1),
    })  # fmt: skip

    def call(net: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
        x = torch.cat([batch[key] for key in options.inputs], 1)
        return net["head"](net["conv2"](net["conv1"](x).relu()).relu())

    return Model(net, call, stages=("conv1", "conv2"))


class Lab:
    """Registers all of it."""

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "clouds", clouds, CloudsOptions), Component("data", "halves", halves, HalvesOptions)]

    @hookimpl
    def kd_register_teachers(self) -> list[Component]:
        return [Component("teacher", "mlp", mlp, MLPOptions), Component("teacher", "fcn", fcn, FCNOptions)]

    @hookimpl
    def kd_register_students(self) -> list[Component]:
        return [Component("student", "mlp", mlp, MLPOptions), Component("student", "fcn", fcn, FCNOptions)]


def _manager(*observers: Any) -> PluginManager:
    """A manager with the lab and these observers."""
    made = PluginManager()
    made.register(Lab(), name="lab")
    for i, observer in enumerate(observers):
        made.register(observer, name=f"observer-{i}")
    return made


def _recipe(**changes: Any) -> dict[str, Any]:
    """A few steps of every stage, on vectors."""
    few = {"train": {"steps": 8}}
    return {
        "method": {"use": "mst-distill", "mask_layers": {"teacher": ["fc1", "fc2"], "cross": ["fc?"]}, "mask_heads": 2},
        "teachers": {"teacher": {"use": "mlp"}, "cross": {"use": "mlp", "inputs": ["two"]}},
        "student": {"use": "mlp", "inputs": ["one"]},
        "data": {"use": "clouds", "size": 96},
        "stages": {"co_train": few, "adapt_masks": few},
        "train": {"steps": 8, "batch_size": 32, "optimizer": {"name": "adam", "lr": 3e-3}, "schedule": "constant",
                  "save_every": 2},
        "eval": {"on": ["val"]},
        "trackers": [],
    } | changes  # fmt: skip


def _dense(**changes: Any) -> dict[str, Any]:
    """A few steps of every stage, on images with a class per pixel."""
    return (
        _recipe(
            method={"use": "mst-distill", "mask_heads": 2, "k": 2},
            teachers={"teacher": {"use": "fcn"}, "cross": {"use": "fcn", "inputs": ["image"]}},
            student={"use": "fcn", "inputs": ["depth"]},
            data="halves",
        )
        | changes
    )


@pytest.fixture(scope="session")
def manager():
    """Makes a plugin manager with the lab and these observers."""
    return _manager


@pytest.fixture(scope="session")
def recipe():
    """Makes a recipe of a few steps on vectors, with these changes."""
    return _recipe


@pytest.fixture(scope="session")
def dense():
    """Makes a recipe of a few steps on images, with these changes."""
    return _dense
