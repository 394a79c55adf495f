"""The networks as teachers and students."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from kd_diswot import nets
from kd_diswot.options import CellOptions, CIFARResNetOptions
from kd_diswot.space import decode_cell
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Labels, Model, check_pair


def cifar_resnet(options: CIFARResNetOptions, task: Task) -> Model:
    """A residual network for classes of images.

    Raises:
        ModelError: if the task is of another kind, names no image shape, or does not fit the checkpoint.
    """
    depths = [int(depth) for depth in options.arch.split("-")]
    return _model("cifar-resnet", {"depths": depths, "width": options.width}, options.checkpoint, task)


def nasbench201(options: CellOptions, task: Task) -> Model:
    """A network of stacked cells for classes of images. Raises `ModelError` as `cifar_resnet`."""
    arguments = {"operations": decode_cell(options.arch), "channels": options.channels, "cells": options.cells}
    return _model("nasbench201", arguments, options.checkpoint, task)


def _model(name: str, arguments: dict[str, Any], checkpoint: str | None, task: Task) -> Model:
    if task.kind != "classification" or task.image is None:
        raise ModelError(f"{name} classifies images, but the data poses a task of kind {task.kind!r}"
                         + ("" if task.image else " without a shape of images"))  # fmt: skip
    if checkpoint is None:
        arguments = {**arguments, "in_channels": task.image[0], "num_classes": task.class_count}
        net, config = nets.NETS[name](**arguments), {"architecture": name, "arguments": arguments}
    else:
        net, config = _load(name, student_folder(Path(checkpoint)), task)
    config["classes"] = list(task.classes)
    return Model(net, save=functools.partial(nets.save, net, config), labels=task.labels, stages=net.stages)


def _load(name: str, folder: Path, task: Task) -> tuple[Any, dict[str, Any]]:
    """The trained network of a folder: its architecture is the folder's, whatever the options say."""
    try:
        config = json.loads((folder / nets.CONFIG).read_text())
        if config["architecture"] != name:
            raise ModelError(f"checkpoint {folder} holds a {config['architecture']}, not a {name}")
        labels = Labels(config["arguments"]["num_classes"], tuple(config.get("classes") or ()) or None)
        check_pair(labels, task.labels, (f"checkpoint {folder}", "the data"))
        return nets.load(folder), config
    except ModelError:
        raise
    except Exception as error:  # damaged files raise what they like
        raise ModelError(f"checkpoint {folder} is no saved {name}: {type(error).__name__}: {error}; give a run folder, "
                         "or the `student` folder in one") from None  # fmt: skip
