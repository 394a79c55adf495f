"""timm models behind the uniform call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, load_state_dict, parse_model_name, save_for_hf, split_model_name_tag
from torch import Tensor, nn
from torch.nn import functional as F

from kd_timm.options import TimmOptions, TimmTeacherOptions
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError, did_you_mean
from kdcore.models import Batch, Labels, Model, Outputs
from kdcore.options import Download

TASKS = ("classification", "multilabel", "regression", "unlabelled")
BYTES_PER_WEIGHT = 4  # published weights are float32


def timm_model(options: TimmOptions, task: Task) -> Model:
    """A timm model with as many input channels and classes as the task has.

    Its logits are `[B, C]`, its embedding `[B, D]` is what its classifier reads. A distilled transformer gives the mean
    of its two classifiers as logits, and each of them in the extras `cls_logits` and `dist_logits` (Touvron et al.,
    Training data-efficient image transformers & distillation through attention, ICML 2021, section 4).

    Raises:
        ModelError: if the name is unknown, the weights cannot be had, or they do not fit the task.
    """
    if task.kind not in TASKS:
        raise ModelError(f"timm models classify images, but the data poses a task of kind {task.kind!r}")
    check_name(options.model)
    network: Any
    if options.checkpoint is None:
        network = published(options, task)
    elif (path := student_folder(Path(options.checkpoint))).is_dir():
        network = from_folder(path, options, task)
    else:
        network = from_file(path, options, task)
    reader = Reader(network, task, options.image_size)
    names = network.pretrained_cfg.get("label_names") if options.checkpoint else None
    labels = Labels(network.num_classes, tuple(names if isinstance(names, list) else task.classes) or None)
    last = getattr(network, "output_fmt", None) == "NHWC"  # Swin and its kin
    return Model(network, reader.read, save=reader.save, labels=labels, stages=stages(network), channels_last=last)


def stages(network: nn.Module) -> list[str]:
    """Module names of the stages as timm lists them: stem and stages of a CNN, every block of a transformer."""
    modules = dict(network.named_modules())
    return [entry["module"] for entry in getattr(network, "feature_info", ()) if entry["module"] in modules]


def check_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ModelError: with the nearest names.
    """
    try:
        source, model = parse_model_name(name)
    except ValueError as error:
        raise ModelError(str(error)) from None
    architecture, tag = split_model_name_tag(model)
    if source is not None:
        return
    if not is_model(architecture):
        near = did_you_mean(architecture, timm.list_models(), "models")
        raise ModelError(f"timm has no model {architecture!r}; {near}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"timm has no weights {tag!r} of {architecture!r}; {did_you_mean(tag, tags, 'weights')}")


def published(options: TimmOptions, task: Task) -> Any:
    """The model by its name, with its published weights if they are asked for.

    Raises:
        ModelError: if they cannot be fetched, there are none, or a teacher would get an untrained classifier.
    """
    arguments = factory_arguments(options, task, options.model)
    if not options.pretrained:
        return create(options.model, arguments)
    try:
        network = create(options.model, {**arguments, "pretrained": True})
    except ModelError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        raise ModelError(
            f"the weights of {options.model!r} could not be fetched ({cause}). Once fetched they are kept; without a "
            "connection, point `checkpoint:` to a .safetensors or .pth file of them, or set `pretrained: false`"
        ) from error
    trained, wanted = network.pretrained_cfg["num_classes"], network.num_classes
    if isinstance(options, TimmTeacherOptions) and not options.new_head and wanted != trained:
        raise ModelError(
            f"the weights of {options.model!r} are for {trained} classes, the data has {wanted}: give a `checkpoint:` "
            "trained on them, or `new_head: true` with `train:` to train it first"
        )
    return network


def from_folder(path: Path, options: TimmOptions, task: Task) -> Any:
    """A model from a folder in timm's own format: `config.json` and the weights.

    Raises:
        ModelError: if the folder is not one, holds another model, or one with other classes.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"checkpoint {path}: no config.json in it, so it is no folder of a saved timm model")
    with explained(path):
        config = dict(json.loads((path / "config.json").read_text()))
    source, name = parse_model_name(options.model)
    asked, found = split_model_name_tag(name)[0], config.get("architecture")
    if source is None and found != asked:
        raise ModelError(f"checkpoint {path} holds {found!r}, not {asked!r}: set `model: {found}`")
    check_classes(path, config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes")), task)
    where = f"local-dir:{path}"
    with explained(path):
        return create(where, {**factory_arguments(options, task, where), "pretrained": True})


def from_file(path: Path, options: TimmOptions, task: Task) -> Any:
    """A model from a file of its weights, read without unpickling code.

    Raises:
        ModelError: if the file is missing, unreadable, or does not fit the model and the number of classes.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path}: there is no such file or folder")
    network = create(options.model, factory_arguments(options, task, options.model))
    with explained(path):
        state = load_state_dict(str(path), weights_only=True)
        for name in classifiers(network):
            if (weight := state.get(f"{name}.weight")) is not None:
                check_classes(path, weight.shape[0], task)
        network.load_state_dict(state)
    return network


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what timm and torch raise while they read a checkpoint into one line about that checkpoint."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        raise ModelError(f"checkpoint {path} cannot be loaded: {cause[:300]}") from error


def check_classes(path: Path, found: int | None, task: Task) -> None:
    """Refuse a checkpoint with another number of classes than the task. Raises `ModelError`."""
    if found is not None and task.num_classes is not None and found != task.num_classes:
        raise ModelError(f"checkpoint {path} has {found} classes, the data has {task.num_classes}: use the data it was "
                         "trained for, or a checkpoint of this data")  # fmt: skip


def factory_arguments(options: TimmOptions, task: Task, name: str) -> dict[str, Any]:
    """The arguments of `timm.create_model` that follow from the options and the task."""
    given: dict[str, Any] = {"num_classes": task.num_classes, "in_chans": task.image[0] if task.image else None,
                             "drop_rate": options.drop_rate, "drop_path_rate": options.drop_path_rate}  # fmt: skip
    arguments = {key: value for key, value in given.items() if value is not None}
    size = input_size(options.image_size, task)
    if size and fixed_size(name):
        arguments["img_size"] = size
    return arguments


def input_size(image_size: int | None, task: Task) -> tuple[int, int] | None:
    """Height and width in pixels of what the network reads, where they are known."""
    return (image_size, image_size) if image_size else task.image[1:] if task.image else None


def fixed_size(name: str) -> bool:
    """Whether the model is built for one image size."""
    source, model = parse_model_name(name)
    if source == "local-dir":
        config = json.loads((Path(model) / "config.json").read_text())
        return bool(config.get("pretrained_cfg", config).get("fixed_input_size"))
    cfg = timm.get_pretrained_cfg(model, allow_unregistered=True) if source is None else None
    return cfg is not None and bool(cfg.fixed_input_size)


def create(name: str, arguments: dict[str, Any]) -> Any:
    """`timm.create_model`; an argument that the model does not take is a `ModelError`."""
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise ModelError(f"timm's {name!r} cannot be built with {arguments}: {error}") from error


def classifiers(network: Any) -> list[str]:
    """Module names of the last layers."""
    names = network.pretrained_cfg.get("classifier") or ()
    modules = dict(network.named_modules())
    return [name for name in ([names] if isinstance(names, str) else names) if name in modules]


class Reader:
    """Reads and saves one timm network.

    The normalisation is that of the network's `pretrained_cfg`, averaged over the channels where their number differs.
    It is kept on the network as buffers outside its state, so that it moves with it and is not saved among the weights.

    Args:
        network: the timm network; forward hooks on its classifiers are registered here.
        task: gives class names and image size for the saved configuration.
        image_size: side in pixels to which the input is resized, or `None`.
    """

    def __init__(self, network: Any, task: Task, image_size: int | None) -> None:
        self.network, self.task, self.image_size = network, task, image_size
        self.caught: list[tuple[Tensor, Tensor]] = []
        names = classifiers(network)
        self.distilled = len(names) == 2 and "dist" in names[1]
        for name in names:
            network.get_submodule(name).register_forward_hook(self.catch)
        cfg = network.pretrained_cfg
        self.normalisation = {key: per_channel(cfg[key], network.in_chans) for key in ("mean", "std")}
        for key, values in self.normalisation.items():
            network.register_buffer(f"input_{key}", torch.tensor(values).view(-1, 1, 1), persistent=False)

    def catch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps what a classifier reads `[B, D]` and says `[B, C]` until the call is over."""
        self.caught.append((inputs[0], output))

    def read(self, network: Any, batch: Batch) -> Outputs:
        """The outputs for `image` `[B, C, H, W]` in [0, 1]. Raises `ModelError` if the batch has no images."""
        if "image" not in batch:
            raise ModelError(f"timm models read the batch entry 'image'; the data gives: {', '.join(batch)}")
        self.caught = []
        output = network(self.normalised(network, batch["image"]))
        caught, self.caught = self.caught, []
        if self.distilled:
            (cls_token, cls_logits), (dist_token, dist_logits) = caught
            extras = {"cls_logits": cls_logits, "dist_logits": dist_logits}
            return Outputs((cls_logits + dist_logits) / 2, (cls_token + dist_token) / 2, extras=extras)
        logits = output[0] if isinstance(output, tuple) else output
        return Outputs(logits, caught[0][0].flatten(1) if caught else None)

    def normalised(self, network: Any, image: Tensor) -> Tensor:
        """The images as the network wants them: resized where the options say so, then mean and deviation removed."""
        side = self.image_size
        if side and image.shape[-2:] != (side, side):
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
        normalised: Tensor = (image - network.input_mean) / network.input_std
        return normalised

    def save(self, folder: Path) -> None:
        """Write the folder that `timm.create_model("local-dir:<folder>", pretrained=True)` reads."""
        network = self.network
        data: dict[str, Any] = dict(self.normalisation)
        if size := input_size(self.image_size, self.task):
            data["input_size"] = (network.in_chans, *size)
        model = {"label_names": list(self.task.classes)} if len(self.task.classes) == network.num_classes else None
        save_for_hf(network, str(folder), model_config=model, safe_serialization=True, data_config=data)


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """One value per channel: as they are if they fit, else their average for each."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def published_weights(name: str) -> list[Download]:
    """What the published weights of a model would fetch; nothing if they are in the local cache.

    Raises:
        ModelError: if timm does not know the name.
    """
    check_name(name)
    source, model = parse_model_name(name)
    if source == "local-dir":
        return []
    if source == "hf-hub":
        return [] if cached(model) else [Download(model, "Hugging Face Hub")]
    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        raise ModelError(f"timm has no published weights of {name!r}; set `pretrained: false` or give a `checkpoint:`")
    if cfg.hf_hub_id and cached(cfg.hf_hub_id):
        return []
    with torch.device("meta"):
        weights = sum(t.numel() for t in timm.create_model(model).state_dict().values())
    source = "Hugging Face Hub" if cfg.hf_hub_id else str(cfg.url)
    return [Download(cfg.hf_hub_id or model, source, BYTES_PER_WEIGHT * weights)]


def cached(repository: str) -> bool:
    """Whether the weights of a Hub repository (`owner/name` or `owner/name@revision`) are in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in files)
