"""Generated movements, each recorded by two sensors at once: a good one on the body, a poor one on the wrist.

A movement repeats a waveform of its class, with its own start, pace and strength, and both sensors record the same one.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kd_demo import models
from kd_demo.columns import Columns, corrupt
from kd_demo.options import SensorNetOptions, SensorsOptions
from kd_demo.sensor_nets import SensorNet
from kdcore.data import DataModule, Task, derive_seed
from kdcore.models import Batch, Model

CLASSES = ("walk", "climb", "sit", "reach", "turn", "bend")
KEYS = ("imu", "series")
AXES, HARMONICS, REPEATS = 3, 4, 2


def sensors(options: SensorsOptions) -> DataModule:
    """Splits of `imu` and `series`, `[length, 3]` each, the same movement on the body and on the wrist, and `label`."""
    splits = {}
    for name, count in (("train", options.train), ("val", options.val), ("test", options.test)):
        signals, label = draw(options, name, count)
        if name == "train":
            generator = torch.Generator().manual_seed(derive_seed("sensors", options.seed, "label noise"))
            label = corrupt(label, len(CLASSES), options.label_noise, generator)
        splits[name] = Columns(**signals, label=label)
    return DataModule(splits, Task("classification", CLASSES))


def draw(options: SensorsOptions, split: str, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """The first `count` recordings `[N, length, 3]` of both sensors in a split, and the movements `[N]`."""
    generator, facts, noise = torch.Generator(), [], []
    for index in range(count):
        generator.manual_seed(derive_seed("sensors", options.seed, split, index))
        facts.append(torch.rand(4, generator=generator))
        noise.append(torch.randn(len(KEYS), options.length, AXES, generator=generator))
    which, start, pace, strength = torch.stack(facts).T
    label = (which * len(CLASSES)).long()
    time = torch.arange(options.length) / options.length * REPEATS
    angle = 2 * math.pi * ((0.8 + 0.4 * pace)[:, None] * time + start[:, None])
    waves = torch.stack([part(angle * h) for h in range(1, HARMONICS + 1) for part in (torch.sin, torch.cos)], 2)
    amplitudes = _waveforms(options.seed)[label] * (0.7 + 0.6 * strength)[:, None, None, None]
    clean = torch.einsum("nth,nsah->snta", waves, amplitudes)
    levels = torch.tensor([options.imu_noise, options.series_noise])[:, None, None, None]
    recorded = clean + levels * torch.stack(noise, 1)
    return dict(zip(KEYS, recorded, strict=True)), label


def _waveforms(seed: int) -> Tensor:
    """Amplitudes `[class, sensor, axis, harmonic]` of every class's waveforms, sines and cosines in turn."""
    generator = torch.Generator().manual_seed(derive_seed("sensors", seed, "waveforms"))
    falling = torch.arange(1, HARMONICS + 1).repeat_interleave(2) ** -0.5
    return torch.randn(len(CLASSES), len(KEYS), AXES, 2 * HARMONICS, generator=generator) * falling / 2


def sensor_net(options: SensorNetOptions, task: Task) -> Model:
    """The network for recordings of the sensors that it reads.

    Raises:
        ModelError: if the task is of another kind, or does not fit the checkpoint.
    """
    models.check_kind("demo-sensors", task, models.POOLED)
    facts = {"inputs": list(options.inputs), "channels": options.channels}
    make = functools.partial(SensorNet, width=options.width)
    return models.make_model("demo-sensors", make, options, task, facts, call=_call)


def _call(net: SensorNet, batch: Batch) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = net(**{key: batch[key] for key in net.inputs})
    return outputs
