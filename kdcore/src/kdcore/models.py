"""Models behind one call: `forward(batch) -> Outputs`, with taps, freezing, saving and a description."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.errors import ModelError, did_you_mean
from kdcore.outputs import Labels as Labels
from kdcore.outputs import Outputs as Outputs
from kdcore.outputs import map_tensors as map_tensors

if TYPE_CHECKING:
    from kdcore.options import Sampling

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
"""Tensors (and lists of raw text) by key; the keys are listed in `kdcore.data.BATCH_KEYS`."""


class Model(nn.Module):
    """An `nn.Module` behind the uniform call `forward(batch) -> Outputs`.

    Args:
        module: the network itself; its parameters are the model's.
        call: `call(module, batch)` returning `Outputs`, a tensor of logits, or an object with `.logits`. Default: the
            module is called with the batch entries its `forward` names, or else with the first entry.
        save: `save(folder)` writes the native format. Default: `model.safetensors` with the module's state.
        labels: what the logits mean.
        stages: module names of the network's stages, shallow to deep: what the taps `@0`, `@-1` and `@all` refer to.
        channels_last: whether the stages' maps are `[B, H, W, C]`; their taps are turned to `[B, C, H, W]`.
        writer: writes tokens after tokens, for a language model: `writer(module, contexts, sampling, seeds, limits,
            mix)`, with `mix` a module and its share.
        tokenizer: the tokenizer behind its tokens, where there is one.
        placed: whether the module stands on several devices, or the disk, and is not to be moved.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Any, Batch], Any] | None = None,
        *,
        save: Callable[[Path], None] | None = None,
        labels: Labels | None = None,
        stages: Sequence[str] = (),
        channels_last: bool = False,
        writer: Callable[..., list[list[int]]] | None = None,
        tokenizer: Any = None,
        placed: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.tokenizer = tokenizer
        self._writer = writer
        self.channels_last = channels_last
        self.labels = labels or Labels()
        self.stages = tuple(stages)
        self.frozen = False
        self.placed = placed
        self._call = call or call_by_name
        self._save = save
        self._taps: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._caught: dict[str, Any] = {}

    def forward(self, batch: Batch) -> Outputs:
        """Run the network on a batch; the features hold every tap of this call and of no other."""
        self._caught = {}
        outputs = as_outputs(self._call(self.module, batch))
        if self._taps:
            if outputs.pending and any(name not in self._caught for name in self._taps):
                outputs.need("logits")  # the head may be tapped
            outputs.features = {name: self._caught[name] for name in self._taps if name in self._caught}
            self._caught = {}
            for name in outputs.features if self.channels_last else ():
                if name.partition(":")[0] in self.stages and outputs.features[name].ndim == 4:
                    outputs.features[name] = outputs.features[name].movedim(-1, 1)
        if self.placed:
            home = next(value.device for value in batch.values() if isinstance(value, Tensor))
            outputs = map_tensors(outputs, lambda tensor: tensor.to(home))
        return outputs

    def _apply(self, fn: Any, recurse: bool = True) -> Model:
        return self if self.placed else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def tap(self, *patterns: str) -> list[str]:
        """Read the activations of the modules that match; returns the tap names, to be found in `Outputs.features`.

        A pattern is a module name with `*` and `?` wildcards (`layer3`, `blocks.*.attn`), a stage (`@0` is the first,
        `@-1` the last, `@all` all of them), or `@head`, the layer that makes the logits. The suffix `:input` reads
        what goes into the module instead, `:pre` what goes into the activation that the module ends with (what comes
        out, if it ends with none). In-place activations are switched off, or they would change what was read.

        Raises:
            ModelError: if a pattern matches nothing; near matches are listed.
        """
        names: list[str] = []
        for pattern in patterns:
            for name in self._matches(pattern):
                names.append(name)
                if name not in self._taps:
                    self._taps[name] = self._hook(name)
        if names:
            for module in self.module.modules():
                if getattr(module, "inplace", False) is True:
                    module.inplace = False  # type: ignore[assignment]
        return list(dict.fromkeys(names))

    def _matches(self, pattern: str) -> list[str]:
        path, colon, end = pattern.partition(":")
        if colon and end not in ("input", "output", "pre"):
            raise ModelError(f"tap {pattern!r}: after the colon comes 'input', 'output' or 'pre', not {end!r}")
        suffix = f":{end}" if end in ("input", "pre") else ""
        if path == "@head":
            return [self.head[0] + suffix]
        if stage := re.fullmatch(r"@(all|-?\d+)", path):
            return [name + suffix for name in self._stage_names(pattern, stage[1])]
        names = [name for name, _ in self.module.named_modules() if name]
        found = [name for name in names if fnmatch.fnmatchcase(name, path)]
        if not found:
            raise ModelError(f"tap {pattern!r} matches no module of {type(self.module).__name__}; "
                             f"{did_you_mean(path, names, 'modules')}")  # fmt: skip
        return [name + suffix for name in found]

    def _stage_names(self, pattern: str, stage: str) -> list[str]:
        if not self.stages:
            raise ModelError(
                f"tap {pattern!r}: {type(self.module).__name__} names no stages; write module names instead"
            )
        if stage == "all":
            return list(self.stages)
        try:
            return [self.stages[int(stage)]]
        except IndexError:
            raise ModelError(f"tap {pattern!r}: the model has {len(self.stages)} stages: "
                             f"{', '.join(self.stages)}") from None  # fmt: skip

    @property
    def head(self) -> tuple[str, nn.Module]:
        """Name and module of the layer that makes the logits: the last linear layer, or 1x1 convolution, with as many
        outputs as there are classes (of any width, where their number is not known).

        Raises:
            ModelError: if there is none.
        """
        wide = self.labels.count
        for name, module in reversed(list(self.module.named_modules())):
            size = getattr(module, "out_features", None) or (
                module.out_channels if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) else None
            )
            if size and wide in (None, size):
                return name, module
        raise ModelError(f"{type(self.module).__name__} has no linear layer that makes {wide} logits")

    def _hook(self, name: str) -> torch.utils.hooks.RemovableHandle:
        path, _, end = name.partition(":")
        module = self.module.get_submodule(path)
        catch = functools.partial(self._catch, name)  # bound, so that a deep copy of the model catches its own
        if end == "input":
            return module.register_forward_pre_hook(catch)
        if end == "pre":
            for part in module.modules():
                if not list(part.children()) and type(part).__module__.endswith((".activation", ".activations")):
                    part.register_forward_hook(functools.partial(self._remember, name))
            return module.register_forward_hook(functools.partial(self._catch_before_activation, name))
        return module.register_forward_hook(catch)

    def _remember(self, name: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._caught[name] = (inputs[0], output)

    def _catch_before_activation(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        before, after = self._caught.get(name, (None, None))
        self._caught[name] = before if after is output else _first(output)

    def _catch(self, name: str, _module: nn.Module, *values: Any) -> None:
        self._caught[name] = _first(values[-1])

    @property
    def writes(self) -> bool:
        """Whether it is a language model that writes: see `write`."""
        return self._writer is not None

    @torch.no_grad()
    def write(
        self, contexts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], *,
        limits: Sequence[int] | None = None, mix: tuple[Model, float] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """What the model writes after some tokens: up to and with the token that ends it, where one does.

        Each row is drawn with random numbers of its own, in evaluation mode.

        Args:
            contexts: tokens of each row, at least one.
            sampling: how: temperature, nucleus, penalties, and tokens at most.
            seeds: one for each row.
            limits: tokens at most, by row.
            mix: a model of the same tokens and the share that its probabilities have in what is drawn from.

        Raises:
            ModelError: if it is no language model that writes.
            DataError: on a context that fills, or is longer than, what the model can read.
        """
        if self._writer is None:
            raise ModelError(f"{type(self.module).__name__} writes no tokens: take a causal language model")
        was_training = self.training
        self.eval()
        other = (mix[0].eval().module, mix[1]) if mix else None
        try:
            return self._writer(self.module, contexts, sampling, seeds, limits, other)
        finally:
            self.train(was_training)

    def follow(self, model: Model, step: int) -> None:
        """Nothing to do: a model in this process has its weights."""

    def freeze(self) -> Model:
        """No gradients, and evaluation mode for good: `train()` no longer changes it. Returns the model."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Model:
        """As `nn.Module.train`, but a frozen model stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def save(self, folder: Path) -> None:
        """Write the model in its native format, which loads without this project."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._save is not None:
            return self._save(folder)
        from safetensors.torch import save_model

        save_model(self.module, str(folder / "model.safetensors"))
        return None

    def describe(self, batch: Batch, repeats: int = 10) -> dict[str, float]:
        """Parameters, FLOPs per sample and latency per sample in milliseconds (median), on the batch's first sample.
        What does not fall into samples (a graph) is taken whole."""
        from torch.utils.flop_counter import FlopCounterMode

        was_training, device = self.training, next(self.parameters(), torch.empty(0)).device
        one = {k: v[:1] if isinstance(v, Tensor | list | tuple) else v for k, v in batch.items()}
        one = {k: v.to(device) if hasattr(v, "to") else v for k, v in one.items()}
        self.eval()
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                self(one)
            times = [_timed(lambda: self(one), device) for _ in range(repeats)]
        self.train(was_training)
        parameters = sum(p.numel() for p in self.module.parameters())
        size = sum(t.numel() * t.element_size() for t in self.module.state_dict().values())
        return {"parameters": float(parameters), "flops": float(counter.get_total_flops()),
                "latency_ms": 1e3 * sorted(times)[len(times) // 2], "size_bytes": float(size)}  # fmt: skip


def call_by_name(module: nn.Module, batch: Batch) -> Any:
    """Call a module with the batch entries that its `forward` names, or else with the batch's first entry."""
    of_class = getattr(module.forward, "__func__", None) is getattr(type(module), "forward", None)
    takes = _parameters(type(module).forward) if of_class else inspect.signature(module.forward).parameters
    names = [p for p in takes if p in batch and p not in ("label", "labels")]
    return module(**{name: batch[name] for name in names}) if names else module(next(iter(batch.values())))


@functools.lru_cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a class's function, which Python takes a while to find out in each step."""
    return tuple(inspect.signature(forward).parameters)


def as_outputs(value: Any) -> Outputs:
    """Outputs from what networks commonly return: outputs, logits, a dict or object with logits, or a tuple."""
    if isinstance(value, Outputs):
        return value
    if isinstance(value, Tensor):
        return Outputs(logits=value)
    if isinstance(value, Mapping) and "logits" in value:
        return Outputs(value["logits"], value.get("embedding"), extras=value.get("extras") or {})
    if hasattr(value, "logits"):
        return Outputs(logits=value.logits, embedding=getattr(value, "embedding", None))
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return Outputs(logits=value[0])
    raise ModelError(f"a model returned {type(value).__name__}; return a tensor of logits or kdcore.Outputs")


class FromColumns(nn.Module):
    """A teacher whose signals stand in the data: `signal -> batch key`, such as `{"logits": "teacher_logits"}`."""

    def __init__(self, columns: Mapping[str, str], labels: Labels | None = None) -> None:
        super().__init__()
        self.columns = dict(columns)
        self.labels = labels or Labels()

    def forward(self, batch: Batch) -> Outputs:
        """The signals of a batch, read from its columns."""
        missing = [key for key in self.columns.values() if key not in batch]
        if missing:
            raise ModelError(f"the data has no column {', '.join(map(repr, missing))} for the teacher's signals; "
                             f"{did_you_mean(missing[0], batch, 'columns')}")  # fmt: skip
        return Outputs(**{signal: batch[key] for signal, key in self.columns.items()})

    def tap(self, *patterns: str) -> list[str]:
        """Refused: columns hold no activations."""
        raise ModelError(f"the teacher's signals come from columns ({', '.join(self.columns)}); "
                         f"features ({', '.join(patterns)}) need a live teacher")  # fmt: skip

    def freeze(self) -> FromColumns:
        """Nothing to freeze; returns itself."""
        return self


Source = Model | FromColumns
"""Anything that gives a role's signals for a batch."""


def check_pair(teacher: Labels, student: Labels, who: tuple[str, str] = ("teacher", "student")) -> None:
    """Refuse two sets of labels that do not mean the same. Names without anything in common only give a warning: they
    may be spellings of the same classes.

    Raises:
        ModelError: on different class counts, label orders or vocabularies.
    """
    same_tokens = teacher.vocabulary is not None and teacher.vocabulary == student.vocabulary
    if teacher.vocabulary and student.vocabulary and not same_tokens:
        raise ModelError(f"{who[0]} and {who[1]} have different vocabularies ({teacher.vocabulary} and "
                         f"{student.vocabulary}): their logits do not mean the same tokens. "
                         "Use one tokenizer, or a loss for two (kd list loss --tag two-tokenizers)")  # fmt: skip
    if teacher.count and student.count and teacher.count != student.count and not same_tokens:
        raise ModelError(f"{who[0]} has {teacher.count} classes, {who[1]} has {student.count}: give both the same "
                         "labels (see `checkpoint` and the data's classes)")  # fmt: skip
    ours, theirs = ([n.casefold() for n in labels.names or ()] for labels in (student, teacher))
    if not ours or not theirs or ours == theirs:
        return
    moved = [name for i, name in enumerate(theirs) if name in ours and ours.index(name) != i]
    if moved:
        raise ModelError(f"{who[0]} and {who[1]} order their labels differently: {moved[0]!r} is class "
                         f"{theirs.index(moved[0])} and {ours.index(moved[0])}. Give the data's classes in that "
                         f"order: {', '.join(theirs[:10])}")  # fmt: skip
    logger.warning(
        "%s and %s name their classes differently (%r, %r); taken to mean the same", *who, theirs[0], ours[0]
    )


def _first(value: Any) -> Any:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return getattr(value, "last_hidden_state", value)


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
