"""The stages of a network, and running a part of it on features that are not its own.

Source: Zhu et al. 2023 (arXiv 2307.12574); how features of one network are made use of in the other is a
reconstruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from kd_gsc_kd.options import GSCKDOptions, StudentOptions
from kdcore import Model, Outputs
from kdcore.errors import ModelError

MOST_STAGES = 5
"""Of a network with a pyramid of maps; one with more blocks than these has to say which of them are stages."""


class NextStage(nn.Module):
    """The modules of a network between the map of one stage and that of the next, one after the other."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Any) -> Any:
        """The next map. Hooks of the parts themselves are passed over: they are taps of the network's own maps."""
        for part in self.parts:
            features = part.forward(features)
            features = features[0] if isinstance(features, tuple) else features
        return features


@dataclass(frozen=True)
class Places:
    """Where the maps of a student are found: tap names, and the modules from `low` to `next`.

    `low` and `next` are empty, and `crossing` is `None`, where low maps are not compared (or `hfd: direct`).
    """

    low: str
    next: str
    high: str
    crossing: NextStage | None


def frozen_call(module: nn.Module, *inputs: Any) -> Any:
    """What a module says with its weights as constants, leaving its buffers (running statistics) as they are."""
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, state, inputs)


def cross_stage_feature(stage: nn.Module, features: Tensor) -> Tensor:
    """Features `[B, C, h, w]` of another network after this one's stage, with gradient to the features alone.

    Dropout is off. Batch norms that are in training take the statistics of these features, and keep none of them.
    """
    with _without_dropout(stage):
        found: Tensor = frozen_call(stage, features)
    return found


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, all but the batch norms are in evaluation mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for part, mode in modes.items():
        if isinstance(part, _BatchNorm):
            part.train(mode)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def find_places(model: Model, role: str, options: GSCKDOptions) -> Places:
    """Tap the maps that the options ask for.

    Raises:
        ModelError: if the stages are not known, are too few, or nothing is known to lead from one to the next; it says
            what to name.
    """
    own: StudentOptions = getattr(options, role)
    names = model.tap(*(own.stages or _known_stages(model, role)))
    if not options.compares_low:
        return Places("", "", names[-1], None)
    if options.hfd_layer >= len(names):
        raise ModelError(f"gsc-kd: method.hfd_layer {options.hfd_layer} has no next stage: the {role} has "
                         f"{len(names)} stages ({', '.join(names)}); name more in method.{role}.stages, lower "
                         "hfd_layer, or set hfd: off")  # fmt: skip
    low, following = names[options.hfd_layer - 1 : options.hfd_layer + 1]
    if options.hfd == "direct":
        return Places(low, "", names[-1], None)
    parts = own.next_stage or _between(model.module, low, following)
    if not parts:
        raise ModelError(f"gsc-kd: it is not known what leads from {low} to {following} in the {role} "
                         f"({type(model.module).__name__}); {_what_to_name(role)}")  # fmt: skip
    return Places(low, following, names[-1], NextStage([_submodule(model, role, name) for name in parts]))


def check_crossing(places: Places, role: str, outputs: Outputs) -> None:
    """Refuse a next stage that does not make of the network's own low map what the network makes of it.

    Args:
        places: of the student.
        role: of the student.
        outputs: of the network in evaluation mode.

    Raises:
        ModelError: saying what to name.
    """
    if places.crossing is None:
        return
    low, following = outputs.select([places.low, places.next])
    try:
        found = cross_stage_feature(places.crossing, low)
        wrong = "they make something else of it"
        alike = found.shape == following.shape and torch.allclose(found, following, rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError, ValueError) as error:
        alike, wrong = False, " ".join(str(error).split())[:200]
    if not alike:
        kinds = ", ".join(type(part).__name__ for part in places.crossing.parts)
        raise ModelError(f"gsc-kd: the modules taken for the way from {places.low} to {places.next} in the {role} "
                         f"({kinds}) are not it: {wrong}; {_what_to_name(role)}")  # fmt: skip


def check_map(outputs: Outputs, name: str, role: str) -> None:
    """Refuse a stage that gives no map `[B, C, h, w]`. Raises `ModelError`."""
    found = outputs.features.get(name)
    if not isinstance(found, Tensor) or found.ndim != 4:
        gives = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(f"gsc-kd: stage {name} of the {role} gives {gives}, which is no map [B, C, h, w]; name other "
                         f"modules in method.{role}.stages, shallow to deep")  # fmt: skip


def _known_stages(model: Model, role: str) -> tuple[str, ...]:
    if not 2 <= len(model.stages) <= MOST_STAGES:
        known = f"{len(model.stages)} stages are" if model.stages else "no stages are"
        raise ModelError(f"gsc-kd: {known} known of the {role} ({type(model.module).__name__}): name the modules that "
                         f"give its maps in method.{role}.stages, shallow to deep")  # fmt: skip
    return model.stages[-4:]


def _between(module: nn.Module, low: str, following: str) -> list[str]:
    """Names of the modules registered after `low`, up to and with `following`; none if they have other parents."""
    parent, _, first = low.rpartition(".")
    other, _, last = following.rpartition(".")
    names = [name for name, _ in module.get_submodule(parent).named_children()]
    if parent != other or first not in names or last not in names:
        return []
    return [f"{parent}.{name}".lstrip(".") for name in names[names.index(first) + 1 : names.index(last) + 1]]


def _submodule(model: Model, role: str, name: str) -> nn.Module:
    try:
        return model.module.get_submodule(name)
    except AttributeError:
        raise ModelError(f"gsc-kd: method.{role}.next_stage: {type(model.module).__name__} has no module {name!r}; "
                         f"{_what_to_name(role)}") from None  # fmt: skip


def _what_to_name(role: str) -> str:
    return (f"name the modules that do, one after the other, in method.{role}.next_stage, other stages in "
            f"method.{role}.stages, or set hfd: direct or off")  # fmt: skip
