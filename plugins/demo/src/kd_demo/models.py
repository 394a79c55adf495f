"""The small networks as teachers and students; see `kd_demo.nets` for how their folders load without kdcore."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_demo import nets
from kd_demo.options import CNNOptions, ModelOptions, SegmenterOptions, TransformerOptions, ViTOptions
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Batch, Labels, Model, check_pair

POOLED = ("classification", "multilabel", "regression")
DENSE = ("causal-lm", "masked-lm", "token-classification")


def cnn(options: CNNOptions, task: Task) -> Model:
    """The residual classifier for a task with images.

    Raises:
        ModelError: if the task is of another kind, names no image shape, or does not fit the checkpoint.
    """
    check_kind("demo-cnn", task, POOLED)
    make = functools.partial(nets.CNN, width=options.width, depth=options.depth)
    return make_model("demo-cnn", make, options, task, {"in_channels": _image("demo-cnn", task)[0]})


def segmenter(options: SegmenterOptions, task: Task) -> Model:
    """The stride-4 segmenter for a task with a class per pixel. Raises `ModelError` as `cnn`."""
    check_kind("demo-segmenter", task, ("segmentation",))
    make = functools.partial(nets.Segmenter, width=options.width, depth=options.depth)
    return make_model("demo-segmenter", make, options, task, {"in_channels": _image("demo-segmenter", task)[0]})


def transformer(options: TransformerOptions, task: Task) -> Model:
    """The transformer for a text task: pooled for classes of texts, per token otherwise, causal for `causal-lm`.

    Raises:
        ModelError: if the task is of another kind, has no tokenizer, or does not fit the checkpoint.
    """
    check_kind("demo-transformer", task, (*POOLED, *DENSE))
    if task.tokenizer is None:
        raise ModelError(
            "demo-transformer reads input_ids: it needs data with a tokenizer, such as `topics` or `sentences`"
        )
    make = functools.partial(nets.Transformer, **options.model_dump(exclude={"checkpoint"}))
    facts = {"vocabulary": len(task.tokenizer), "pool": task.kind in POOLED, "causal": task.kind == "causal-lm"}
    return make_model("demo-transformer", make, options, task, facts)


def vit(options: ViTOptions, task: Task) -> Model:
    """The vision transformer for a task with images.

    Raises:
        ModelError: as `cnn`, and if the patches do not tile the images.
    """
    check_kind("demo-vit", task, POOLED)
    channels, height, width = _image("demo-vit", task)
    if options.checkpoint is None and (height % options.patch or width % options.patch):
        raise ModelError(
            f"demo-vit: images of {height}x{width} pixels cannot be divided into patches of side {options.patch}; "
            "set `patch` to a divisor of both"
        )
    make = functools.partial(nets.ViT, **options.model_dump(exclude={"checkpoint"}))
    return make_model("demo-vit", make, options, task, {"in_channels": channels, "image_size": [height, width]})


def make_model(
    name: str,
    make: Callable[..., Any],
    options: ModelOptions,
    task: Task,
    facts: dict[str, Any],
    call: Callable[[Any, Batch], Any] | None = None,
) -> Model:
    """A network made for the task, or the checkpoint's if it fits the task, behind the uniform call."""
    if options.checkpoint is None:
        net = make(num_classes=task.class_count, **facts)
    else:
        net = _load(name, student_folder(Path(options.checkpoint)), task, facts)
    labels = task.labels
    saved = {"classes": labels.names, "fingerprint": labels.vocabulary}
    return Model(net, call, save=functools.partial(nets.save, net, saved), labels=labels, stages=net.stages)


def _load(name: str, folder: Path, task: Task, facts: dict[str, Any]) -> Any:
    config = _read_config(folder)
    if config["architecture"] != name:
        raise ModelError(
            f"checkpoint {folder} holds a {config['architecture']}, not a {name}: `use: {config['architecture']}`"
        )
    arguments, names = config["arguments"], config["classes"]
    labels = Labels(arguments.get("num_classes"), names and tuple(names), config["fingerprint"])
    check_pair(labels, task.labels, (f"checkpoint {folder}", "the data"))
    for key, value in facts.items():
        if arguments.get(key) != value:
            raise ModelError(f"checkpoint {folder} was made for {key}={arguments.get(key)}, the data asks for {value}")
    try:
        return nets.load(folder)
    except Exception as error:  # safetensors and torch have no common class for a damaged or foreign file
        raise ModelError(f"checkpoint {folder}: {nets.WEIGHTS} cannot be loaded: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / nets.CONFIG).read_text())
        return {"architecture": config["architecture"], "arguments": dict(config["arguments"]),
                "classes": config.get("classes"), "fingerprint": config.get("fingerprint")}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"checkpoint {folder}: no readable {nets.CONFIG} of this plugin ({cause}); "
            "give a run folder, or the `student` folder in one"
        ) from None


def check_kind(name: str, task: Task, kinds: tuple[str, ...]) -> None:
    """Refuse a task of another kind with a `ModelError`."""
    if task.kind not in kinds:
        raise ModelError(
            f"{name} is made for tasks of kind {', '.join(kinds)}; the data poses one of kind {task.kind!r}"
        )


def _image(name: str, task: Task) -> tuple[int, int, int]:
    if task.image is None:
        raise ModelError(f"{name} must know the images' shape, but the data's task names no image shape (`Task.image`)")
    return task.image
