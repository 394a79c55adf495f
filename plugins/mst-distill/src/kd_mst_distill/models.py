"""The paper's networks for AV-MNIST: images of digits, and spectrograms of spoken ones.

Layer sizes as in the official code; the reported masks sit on the layers in `stages`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from kd_mst_distill.options import AVMNISTNetOptions
from kdcore import Model, Outputs
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError


class LeNet5(nn.Module):
    """LeNet5 (LeCun et al. 1998) with ReLU for images of 28 x 28 pixels."""

    stages = ("conv3", "fc1")

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, classes)

    def embed(self, image: Tensor) -> Tensor:
        """`[B, 1, 28, 28]` to `[B, 84]`."""
        x = F.avg_pool2d(self.conv1(image).relu(), 2)
        x = F.avg_pool2d(self.conv2(x).relu(), 2)
        embedding: Tensor = self.fc1(self.conv3(x).relu().flatten(1)).relu()
        return embedding

    def forward(self, image: Tensor) -> Outputs:
        """Logits `[B, classes]` of images `[B, 1, 28, 28]`."""
        embedding = self.embed(image)
        return Outputs(self.fc2(embedding), embedding)


class SpectrogramCNN(nn.Module):
    """Three convolutions and a linear layer for spectrograms of 112 x 112."""

    stages = ("conv2", "conv3")

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * 14 * 14, classes)

    def forward(self, spectrogram: Tensor) -> Outputs:
        """Logits `[B, classes]` of spectrograms `[B, 1, 112, 112]`."""
        x = spectrogram
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(conv(x).relu(), 2)
        return Outputs(self.fc1(x.flatten(1)), x.flatten(1))


class SpectrogramEncoder(nn.Module):
    """Five convolutions and the mean over what is left: `[B, 1, 112, 112]` to `[B, 512]`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 256, 512)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """The embedding."""
        x = self.convs[0](spectrogram).relu()
        for conv in list(self.convs)[1:]:
            x = conv(F.max_pool2d(x, 2)).relu()
        embedding: Tensor = x.mean((2, 3))
        return embedding


class FusionNet(nn.Module):
    """Both modalities: an image's 84 and a spectrogram's 512 features side by side, then two linear layers."""

    stages = ("concat", "fc1")

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.image_net = LeNet5(classes)
        del self.image_net.fc2  # its own head is not used
        self.audio_net = SpectrogramEncoder()
        self.concat = nn.Identity()
        self.fc1 = nn.Linear(596, 298)
        self.fc2 = nn.Linear(298, classes)

    def forward(self, image: Tensor, spectrogram: Tensor) -> Outputs:
        """Logits `[B, classes]`."""
        joined = self.concat(torch.cat([self.image_net.embed(image), self.audio_net(spectrogram)], 1))
        embedding = self.fc1(joined)
        return Outputs(self.fc2(embedding), embedding)


def av_mnist_net(options: AVMNISTNetOptions, task: Task) -> Model:
    """The network for these inputs.

    Raises:
        ModelError: if the task is no classification, or the checkpoint does not fit.
    """
    if task.kind != "classification":
        raise ModelError(f"av-mnist-net is made for classification; the data poses a task of kind {task.kind!r}")
    kinds: dict[str, type[LeNet5] | type[SpectrogramCNN]] = {"image": LeNet5, "spectrogram": SpectrogramCNN}
    kind = FusionNet if len(options.inputs) == 2 else kinds[options.inputs[0]]
    net = kind(task.class_count)
    if options.checkpoint is not None:
        file = student_folder(Path(options.checkpoint)) / "model.safetensors"
        try:
            load_model(net, str(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            name = f"{kind.__name__} for {task.class_count} classes"
            raise ModelError(f"checkpoint {file} is no {name}: {str(error).splitlines()[0]}") from None
    return Model(net, labels=task.labels, stages=net.stages)
