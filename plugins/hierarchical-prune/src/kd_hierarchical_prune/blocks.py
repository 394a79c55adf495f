"""The blocks of a transformer, and the components inside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_hierarchical_prune.functional import Part
from kdcore.errors import ModelError, did_you_mean

LISTS = ("transformer_blocks", "single_transformer_blocks")
JOINT = {"norm1": ("norm1",), "norm1_context": ("norm1_context",), "attention": ("attn", "attn2"),
         "feed-forward": ("ff",), "context-feed-forward": ("ff_context",)}  # fmt: skip
COMPONENTS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "JointTransformerBlock": JOINT,
    "FluxTransformerBlock": JOINT,
    "FluxSingleTransformerBlock": {"norm": ("norm",), "attention": ("attn",), "mlp": ("proj_mlp", "proj_out")},
    "BasicTransformerBlock": {"attention": ("attn1",), "cross-attention": ("attn2",), "feed-forward": ("ff",)},
}
"""The removable components of a block by its class, and the modules each is made of."""
NORM_OUTPUTS = {"AdaLayerNormZero": 5, "SD35AdaLayerNormZeroX": 7, "AdaLayerNormZeroSingle": 2}
"""How many tensors an adaptive norm returns; others return one."""


@dataclass(frozen=True)
class Block:
    """One block of a transformer.

    Args:
        index: its number, counted through all lists.
        path: its module name.
        components: modules of its removable components, by name.
    """

    index: int
    path: str
    components: Mapping[str, tuple[str, ...]]

    def paths(self, component: str | None) -> list[str]:
        """Module names of a component, or of the whole block."""
        return [self.path] if component is None else [f"{self.path}.{name}" for name in self.components[component]]


def find_blocks(module: nn.Module, lists: Sequence[str] = ()) -> list[Block]:
    """The blocks of a network in the order they are run, numbered through.

    Args:
        module: the network.
        lists: module names of its lists of blocks; default: `transformer_blocks`, then `single_transformer_blocks`.

    Raises:
        ModelError: if a name is no list of modules, or the network has none of the usual ones.
    """
    modules = dict(module.named_modules())
    known = [name for name, part in modules.items() if isinstance(part, nn.ModuleList | nn.Sequential) and name]
    for name in lists:
        if name not in known:
            raise ModelError(f"method.blocks: {type(module).__name__} has no list of blocks {name!r}; "
                             f"{did_you_mean(name, known, 'lists in it')}")  # fmt: skip
    names = list(lists) or [name for name in LISTS if name in known]
    if not names:
        near = did_you_mean("blocks", known, "lists in it")
        raise ModelError(f"{type(module).__name__} has no ordered list of blocks named {' or '.join(LISTS)}, so there "
                         f"is nothing to prune; name one with method.blocks: {near}")  # fmt: skip
    paths = [f"{name}.{place}" for name in names for place in range(len(modules[name]))]  # type: ignore[arg-type]
    return [Block(index, path, _components(modules[path])) for index, path in enumerate(paths)]


def _components(block: nn.Module) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, modules in COMPONENTS.get(type(block).__name__, {}).items():
        if there := tuple(m for m in modules if getattr(block, m, None) is not None):
            found[name] = there
    return found


def count(module: nn.Module, paths: Collection[str] = ("",)) -> int:
    """Parameters below these module names."""
    return sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())


class PassAttention(nn.Module):
    """In place of an attention: its normed inputs, image and (where it is joint) text, or zeros."""

    def __init__(self, joint: bool, zero: bool) -> None:
        super().__init__()
        self.joint, self.zero = joint, zero

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:
        """Both streams, or the only one."""
        image = torch.zeros_like(hidden_states) if self.zero else hidden_states
        if not self.joint or encoder_hidden_states is None:
            return image
        return image, torch.zeros_like(encoder_hidden_states) if self.zero else encoder_hidden_states


class Pass(nn.Module):
    """In place of a feed-forward net: its input, or zeros."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.zero = zero

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """`[B, N, D]`, as it came."""
        return torch.zeros_like(hidden_states) if self.zero else hidden_states


class Nothing(nn.Module):
    """In place of the layer that widens inside a Flux single block: no channel at all, `[B, N, 0]`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, N, D]` becomes `[B, N, 0]`."""
        return hidden_states[..., :0]


class PlainNorm(nn.Module):
    """In place of an adaptive norm: a layer norm without parameters, gates 1, shifts and scales 0.

    Args:
        outputs: how many tensors the adaptive norm returns.
        normalize: whether to normalise at all.
    """

    def __init__(self, outputs: int, normalize: bool = True) -> None:
        super().__init__()
        self.outputs, self.normalize = outputs, normalize

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """What the adaptive norm returns, `[B, N, D]` and `[B, 1]`."""
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) if self.normalize else x
        one, zero = x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], 1)
        if self.outputs == 1:
            return x
        return (x, one, zero, zero, one, x, one)[: self.outputs]


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a removed component; see the options `removed` and `removed_norm`."""

    zero: bool = False
    normalize: bool = True

    def make(self, block: nn.Module, component: str, name: str) -> nn.Module:
        """The module for one module of a component."""
        if component.startswith("norm"):
            old = type(getattr(block, name)).__name__
            return PlainNorm(NORM_OUTPUTS.get(old, 1), self.normalize)
        if component == "mlp":
            return Nothing() if name == "proj_mlp" else Pass()
        if component in ("attention", "cross-attention"):
            return PassAttention(name == "attn" and hasattr(block, "norm1_context"), self.zero)
        return Pass(self.zero)

    def put(self, module: nn.Module, block: Block, component: str) -> dict[str, nn.Module]:
        """Replace a component in place; the old modules by name."""
        parent, old = module.get_submodule(block.path), {}
        for name in block.components[component]:
            old[f"{block.path}.{name}"] = getattr(parent, name)
            setattr(parent, name, self.make(parent, component, name))
        return old


@contextmanager
def without(module: nn.Module, block: Block, component: str | None, how: Replacement) -> Iterator[None]:
    """Inside, the network lacks a block or one component of it."""
    if component is not None:
        old = how.put(module, block, component)
        try:
            yield
        finally:
            for path, part in old.items():
                set_module(module, path, part)
        return
    where, _, place = block.path.rpartition(".")
    whole = module.get_submodule(where)
    kept = [part for i, part in enumerate(whole.children()) if i != int(place)]
    set_module(module, where, _list_like(whole, kept))
    try:
        yield
    finally:
        set_module(module, where, whole)


def keep_blocks(module: nn.Module, removed: Collection[str]) -> None:
    """Take blocks, by their module names, out of their lists."""
    for where in {path.rpartition(".")[0] for path in removed}:
        whole = module.get_submodule(where)
        kept = [part for i, part in enumerate(whole.children()) if f"{where}.{i}" not in removed]
        set_module(module, where, _list_like(whole, kept))


def _list_like(whole: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    return nn.Sequential(*parts) if isinstance(whole, nn.Sequential) else nn.ModuleList(parts)


def set_module(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put a module at a module name."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)


def joined(parts: Collection[Part], blocks: Sequence[Block]) -> list[Part]:
    """The parts, sorted, a block of which every component is removed as the whole block."""
    whole = {i for i, component in parts if component is None}
    for block in blocks:
        if block.components and all((block.index, c) in parts for c in block.components):
            whole.add(block.index)
    rest = [part for part in parts if part[0] not in whole]
    order: Callable[[Part], tuple[int, str]] = lambda part: (part[0], part[1] or "")  # noqa: E731
    return sorted({*rest, *((i, None) for i in whole)}, key=order)


class Recorder:
    """Reads image and text tokens after blocks, and attention outputs, of every forward.

    Args:
        module: the network.
        blocks: those to be read, by the number they are to be known by.
        streams: which of `img`, `txt` (after the block), `sa`, `ca` (attention output for image and text tokens).
    """

    def __init__(self, module: nn.Module, blocks: Mapping[int, Block], streams: Sequence[str]) -> None:
        self.streams = streams
        self.caught: dict[tuple[int, str], Tensor] = {}
        self._handles = []
        for index, block in blocks.items():
            part = module.get_submodule(block.path)
            if {"img", "txt"} & set(streams):
                self._handles.append(part.register_forward_hook(functools.partial(self._catch, index, ("txt", "img"))))
            attention = getattr(part, "attn", None)
            if {"sa", "ca"} & set(streams) and attention is not None and not isinstance(attention, PassAttention):
                names = ("sa", "") if getattr(part, "context_pre_only", False) else ("sa", "ca")
                self._handles.append(attention.register_forward_hook(functools.partial(self._catch, index, names)))

    def _catch(self, index: int, names: tuple[str, str], _module: nn.Module, _inputs: Any, output: Any) -> None:
        only = "img" if "img" in names else "sa"
        pairs = zip(names, output, strict=False) if isinstance(output, tuple | list) else [(only, output)]
        for name, value in pairs:
            if name in self.streams and isinstance(value, Tensor):
                self.caught[index, name] = value

    def take(self) -> dict[tuple[int, str], Tensor]:
        """What the last forward left, by (block, stream); it is given once."""
        found, self.caught = self.caught, {}
        return found

    def close(self) -> None:
        """Read no more."""
        for handle in self._handles:
            handle.remove()
