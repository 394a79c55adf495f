"""Small network for recordings of one or several sensors, in PyTorch alone; see `kd_demo.nets`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SensorNet(nn.Module):
    """A convolutional branch for each sensor, their features side by side, and two hidden layers.

    With one sensor it is an ordinary classifier of time series, with several it joins them in the middle.

    Args:
        inputs: names of the sensors, which are those of the arguments of `forward`.
        channels: channels of every sensor.
        num_classes: of the task.
        width: channels of a branch's first layer; the second and the hidden layers have twice as many.
    """

    stages: Sequence[str] = ("concat", "fc1", "fc2")

    def __init__(self, inputs: Sequence[str], channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.config = {"inputs": list(inputs), "channels": channels, "num_classes": num_classes, "width": width}
        self.inputs, self.channels = tuple(inputs), channels
        self.branches = nn.ModuleDict({name: _branch(channels, width) for name in inputs})
        self.concat = nn.Identity()
        self.fc1 = nn.Linear(2 * width * len(self.inputs), 2 * width)
        self.fc2 = nn.Linear(2 * width, 2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, **recordings: Tensor) -> dict[str, Tensor]:
        """Recordings `[B, T, channels]` by name, to logits `[B, num_classes]` and embedding `[B, 2 width]`.

        Raises:
            ValueError: if a recording has another shape.
        """
        for name in self.inputs:
            if recordings[name].ndim != 3 or recordings[name].shape[2] != self.channels:
                raise ValueError(f"the sensor {name!r} must give [B, T, {self.channels}], but has shape "
                                 f"{list(recordings[name].shape)}; `channels` says how many there are")  # fmt: skip
        features = [self.branches[name](recordings[name].transpose(1, 2)).mean(2) for name in self.inputs]
        hidden = self.fc1(self.concat(torch.cat(features, 1))).relu()
        embedding = self.fc2(hidden).relu()
        return {"logits": self.fc(embedding), "embedding": embedding}


def _branch(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, width, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(width, 2 * width, 5, padding=2), nn.ReLU(),
    )  # fmt: skip
