"""Networks of segmentation_models_pytorch behind the uniform call."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders import encoders, get_preprocessing_params
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from kd_smp.options import SMPOptions
from kd_timm.models import BYTES_PER_WEIGHT, cached, check_classes, explained, per_channel
from kd_timm.models import published_weights as timm_weights
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError, did_you_mean
from kdcore.models import Batch, Labels, Model, Outputs
from kdcore.options import Download

WEIGHTS = "imagenet"
TIMM = "tu-"
"""What the library puts before timm's names."""
PREFIX = "encoder.model."
"""Where a backbone of timm stands in a network."""


def segmenter(options: SMPOptions, task: Task) -> Model:
    """A network with as many input channels and classes as the task has.

    Its logits are `[B, C, H, W]` of the image's own size (with `settings: {upsampling: 1}`, those of the decoder); taps
    read modules such as `encoder.layer3`, `decoder` or `segmentation_head.0`, the logits before they are enlarged.

    Raises:
        ModelError: if there is no such backbone, it does not fit the architecture, its weights cannot be had, or a
            checkpoint does not fit.
    """
    if task.kind != "segmentation":
        raise ModelError(f"smp networks segment images, but the data poses a task of kind {task.kind!r}")
    if options.checkpoint is None:
        network, normalisation = untrained(options, task), published_normalisation(options)
    else:
        network, normalisation = from_folder(student_folder(Path(options.checkpoint)), options, task)
    channels = network.config["in_channels"]
    for key, values in zip(("mean", "std"), normalisation, strict=True):
        shaped = torch.tensor(per_channel(values, channels)).view(-1, 1, 1)
        network.register_buffer(f"input_{key}", shaped, persistent=False)

    def save(folder: Path) -> None:
        """The folder that `segmentation_models_pytorch.from_pretrained` reads; what is ours has an underscore."""
        own = {"_mean": list(normalisation[0]), "_std": list(normalisation[1]), "_classes": list(task.classes)}
        network.config.update(encoder_weights=None, **own)
        network.save_pretrained(folder)

    labels = Labels(network.config["classes"], tuple(network.config.get("_classes") or task.classes) or None)
    return Model(network, read, save=save, labels=labels, stages=stages(network))


def read(network: Any, batch: Batch) -> Outputs:
    """The outputs for `image` `[B, C, H, W]` in [0, 1]. Raises `ModelError` if the batch has no images.

    An image whose sides are no multiples of the network's stride is filled up on the right and below, with what is grey
    to the network, and the logits are cut back.
    """
    if "image" not in batch:
        raise ModelError(f"smp networks read the batch entry 'image'; the data gives: {', '.join(batch)}")
    image = (batch["image"] - network.input_mean) / network.input_std
    height, width = image.shape[-2:]
    stride = network.encoder.output_stride
    below, right = -height % stride, -width % stride
    logits: Tensor = network(F.pad(image, (0, right, 0, below)))
    if below or right:
        rows, columns = (round(size * side / (side + more)) for size, side, more in
                         zip(logits.shape[-2:], (height, width), (below, right), strict=True))  # fmt: skip
        logits = logits[..., :rows, :columns]
    return Outputs(logits)


def library_name(encoder: str) -> str:
    """What the library calls a backbone. Raises `ModelError` if neither it nor timm knows the name."""
    if encoder in encoders:
        return encoder
    name = encoder.removeprefix(TIMM)
    if timm.is_model(name.partition(".")[0]):
        return TIMM + name
    raise ModelError(f"encoder: neither segmentation_models_pytorch nor timm has a backbone {encoder!r}; "
                     f"{did_you_mean(name, [*encoders, *timm.list_models()], 'backbones')}")  # fmt: skip


def untrained(options: SMPOptions, task: Task) -> Any:
    """A new network; its backbone with published weights, if they are asked for."""
    name = library_name(options.encoder)
    weights = None if not options.pretrained else True if name.startswith(TIMM) else WEIGHTS
    given = {"in_channels": task.image[0] if task.image else 3, "classes": task.num_classes, **check_settings(options)}
    try:
        return smp.create_model(options.arch, name, weights, **given)
    except Exception as error:  # what the library and timm raise has no common class
        cause = " ".join(str(error).split())[:300]
        more = "; without a connection, set `pretrained: false`" if options.pretrained else ""
        raise ModelError(f"{options.arch} cannot be built over {options.encoder!r}: {cause}{more}") from error


def check_settings(options: SMPOptions) -> dict[str, Any]:
    """The settings. Raises `ModelError` for one that the architecture does not have."""
    network = smp.MODEL_ARCHITECTURES_MAPPING[options.arch]
    taken = set(inspect.signature(network.__init__).parameters) - {"self", "kwargs", "encoder_name", "encoder_weights"}
    for key in options.settings:
        if key not in taken or key in ("in_channels", "classes", "aux_params", "activation"):
            raise ModelError(
                f"settings: {options.arch} has none called {key!r}; {did_you_mean(key, taken, 'settings')}"
            )
    return options.settings


def from_folder(path: Path, options: SMPOptions, task: Task) -> tuple[Any, tuple[Sequence[float], Sequence[float]]]:
    """A network from a folder in the library's own format, and the normalisation of its input.

    Raises:
        ModelError: if the folder is not one, holds another network, or one with other classes.
    """
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise ModelError(f"checkpoint {path}: no config.json and model.safetensors in it, so it is no saved network")
    with explained(path):
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
        found = str(config["_model_class"]).lower(), config["encoder_name"]
    wanted = options.arch, library_name(options.encoder)
    if found != wanted:
        raise ModelError(f"checkpoint {path} holds a {found[0]} over {found[1]}, not a {wanted[0]} over {wanted[1]}: "
                         f"set `arch: {found[0]}` and `encoder: {found[1]}`")  # fmt: skip
    check_classes(path, config.get("classes"), task)
    with explained(path):
        network = smp.from_pretrained(str(path), encoder_weights=None)
        network.config.update({key: value for key, value in config.items() if key.startswith("_")})
    return network.train(), (config.get("_mean", IMAGENET_DEFAULT_MEAN), config.get("_std", IMAGENET_DEFAULT_STD))


def published_normalisation(options: SMPOptions) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the images that a backbone was trained on; ImageNet's for one that was not."""
    if options.pretrained:
        found = get_preprocessing_params(library_name(options.encoder), WEIGHTS)
        return found["mean"], found["std"]
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def stages(network: Any) -> list[str]:
    """Module names of the backbone's stages, where it has modules for them."""
    names = [name for name, _ in network.named_modules()]
    backbone = getattr(network.encoder, "model", None)
    info: Any = getattr(backbone, "feature_info", None)
    if isinstance(backbone, nn.Module) and info is not None:
        found = [PREFIX + name for name in info.module_name()]
        wanted = [name if name in names else PREFIX + name.removeprefix(PREFIX).replace(".", "_") for name in found]
    else:
        wanted = [f"encoder.{stem}{number}" for number in range(1, 5) for stem in ("layer", "block")]
    return [name for name in wanted if name in names]


def published_weights(encoder: str) -> list[Download]:
    """What the published weights of a backbone would fetch; nothing if they are in the local cache.

    Raises:
        ModelError: if there is no such backbone, or none of it was published.
    """
    name = library_name(encoder)
    if name.startswith(TIMM):
        return timm_weights(name.removeprefix(TIMM))
    published = encoders[name]["pretrained_settings"].get(WEIGHTS)
    if published is None:
        raise ModelError(f"there are no published ImageNet weights of {encoder!r}: set `pretrained: false`")
    repository = published["repo_id"]
    if cached(f"{repository}@{published['revision']}"):
        return []
    size = None
    with torch.device("meta"), contextlib.suppress(RuntimeError):  # some cannot be built without memory
        size = BYTES_PER_WEIGHT * sum(t.numel() for t in smp.encoders.get_encoder(name).state_dict().values())
    return [Download(repository, "Hugging Face Hub", size)]
