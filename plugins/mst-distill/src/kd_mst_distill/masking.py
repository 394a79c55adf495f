"""Masks on a model's layers: layers by name, hooks that replace what a layer gives, a masked model as one more."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import Model
from kdcore.errors import ModelError, did_you_mean
from kdcore.models import Batch

Change = Callable[[Tensor], Tensor]


def find_layers(model: Model, patterns: Sequence[str]) -> list[str]:
    """The names of the modules that the patterns match, each once, in the order of the patterns.

    A pattern is a dotted module name with `*` and `?` wildcards (`encoder.fc1`, `blocks.*.mlp`), or one of the model's
    stages: `@0` is the first, `@-1` the last, `@all` all of them.

    Raises:
        ModelError: if a pattern matches nothing; near matches are listed.
    """
    found: list[str] = []
    names = [name for name, _ in model.module.named_modules() if name]
    for pattern in patterns:
        if pattern.startswith("@"):
            found += _stages(model, pattern)
        elif matches := [name for name in names if fnmatch.fnmatchcase(name, pattern)]:
            found += matches
        else:
            raise ModelError(f"{pattern!r} matches no module of {type(model.module).__name__}; "
                             f"{did_you_mean(pattern, names, 'modules')}")  # fmt: skip
    return list(dict.fromkeys(found))


def _stages(model: Model, pattern: str) -> list[str]:
    if not model.stages:
        raise ModelError(f"{pattern!r}: {type(model.module).__name__} names no stages; write module names instead")
    if pattern == "@all":
        return list(model.stages)
    try:
        return [model.stages[int(pattern[1:])]]
    except (ValueError, IndexError):
        raise ModelError(
            f"{pattern!r}: write @all or the number of a stage; the stages are {', '.join(model.stages)}"
        ) from None


@contextlib.contextmanager
def replaced_outputs(module: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Inside, what these layers of a module give is replaced by `change(output)`; afterwards no hook is left.

    A change sees the layer's output before any activation that is applied outside the layer.

    Args:
        module: the network.
        changes: by dotted name of the layer.

    Raises:
        ModelError: if there is no such layer, or it does not give a tensor.
    """

    def hook(change: Change, name: str, _module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ModelError(f"layer {name!r} gives a {type(output).__name__}, not a tensor: name a layer inside it")
        return change(output)

    with contextlib.ExitStack() as hooks:
        for name, change in changes.items():
            try:
                layer = module.get_submodule(name)
            except AttributeError:
                names = [n for n, _ in module.named_modules() if n]
                raise ModelError(f"there is no layer {name!r}; {did_you_mean(name, names, 'layers')}") from None
            hooks.callback(layer.register_forward_hook(functools.partial(hook, change, name)).remove)
        yield


def masked(features: Tensor, mask_net: nn.Module, channels_last: bool = False) -> Tensor:
    """Features `[B, C]` or `[B, C, H, W]` times their mask; of maps `[B, H, W, C]` with `channels_last`."""
    maps = features.movedim(-1, 1) if channels_last else features
    mask = mask_net(maps)
    product: Tensor = maps * mask.reshape(mask.shape + (1,) * (maps.ndim - 2))
    return product.movedim(1, -1) if channels_last else product


def specialise(teacher: Model, layers: Sequence[str], masks: Sequence[nn.Module]) -> Model:
    """The teacher with masks on some of its layers, as a model whose own parameters are the masks'.

    The teacher itself is neither copied nor registered, and carries the hooks only while it is called.
    """

    def call(nets: nn.ModuleList, batch: Batch) -> Any:
        changes = {layer: functools.partial(masked, mask_net=net, channels_last=_channels_last(teacher, layer))
                   for layer, net in zip(layers, nets, strict=True)}  # fmt: skip
        with replaced_outputs(teacher.module, changes):
            return teacher(batch)

    return Model(nn.ModuleList(masks), call, labels=teacher.labels)


def layer_shapes(model: Model, layers: Sequence[str], batch: Batch) -> list[torch.Size]:
    """The shapes of what layers give for a batch, channels second.

    Raises:
        ModelError: if a layer gives no tensor, or is not called.
    """
    shapes: dict[str, torch.Size] = {}

    def look(name: str, output: Tensor) -> Tensor:
        shapes[name] = (output.movedim(-1, 1) if _channels_last(model, name) else output).shape
        return output

    with torch.no_grad(), replaced_outputs(model.module, {name: functools.partial(look, name) for name in layers}):
        model(batch)
    if unused := [name for name in layers if name not in shapes]:
        raise ModelError(f"layer {unused[0]!r} is not called when the model runs")
    return [shapes[name] for name in layers]


def _channels_last(model: Model, layer: str) -> bool:
    return model.channels_last and layer in model.stages
