"""Looking into runs: the first number that goes wrong, and the first that differs between two runs of one recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from kdcore.errors import RunFolderError
from kdcore.guards import FAILURE, first_not_finite
from kdcore.hookspecs import hookimpl
from kdcore.models import map_tensors
from kdcore.plugins import PluginManager
from kdcore.recipe import Resolved, find_recipe, load, resolve
from kdcore.runner import Run
from kdcore.stages import Stage, TrainStage

Event = tuple[str, int, str, str, str]
"""Stage, step, kind (`module`, `term`, `parameter`), name, digest."""


@dataclass(frozen=True)
class Difference:
    """Where two runs of one recipe part: the first value, in the order of computation, that is not the same."""

    stage: str
    step: int
    kind: str
    name: str


@dataclass(frozen=True)
class Audit:
    """What two runs of one recipe have in common.

    Args:
        steps: how many steps of each training stage were compared.
        values: how many values were compared: outputs of modules, terms, parameters after each step.
        first: the first difference; none if there is none.
        term: the first term that differs, and the step it does so.
    """

    steps: int
    values: int
    first: Difference | None = None
    term: Difference | None = None


def audit(recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), *, steps: int = 20,
          plugins: PluginManager | None = None) -> Audit:  # fmt: skip
    """Run a recipe twice in this process, with the first steps of every training stage, and compare all that modules
    return, all terms and all parameters, bit for bit.

    Raises:
        UserError: as `kdcore.run`.
    """
    manager = plugins or PluginManager()
    source, _ = find_recipe(recipe, manager)
    resolved = resolve(load(source, overrides), manager, str(recipe))
    one, two = (_Recorder(steps) for _ in range(2))
    for number, recorder in enumerate((one, two)):
        with tempfile.TemporaryDirectory() as folder:
            _execute(resolved, manager, Path(folder), recorder, f"audit-{number}")
    pairs = [(a, b) for a, b in zip(one.events, two.events, strict=False) if a != b]
    first = next((Difference(*a[:4]) for a, _ in pairs), None)
    if first is None and len(one.events) != len(two.events):
        longer = max(one.events, two.events, key=len)
        first = Difference(*longer[min(len(one.events), len(two.events))][:4])
    return Audit(steps, len(one.events), first, next((Difference(*a[:4]) for a, _ in pairs if a[2] == "term"), None))


@dataclass(frozen=True)
class Replay:
    """What was found when a step that went wrong was taken again.

    Args:
        stage, step, samples: which step, and the samples of its batch.
        said: what the run said of it.
        inputs: entries of the batch that were not finite already.
        module: the first module that returned NaN or infinity.
        terms: the terms.
        parameter: the first parameter that was no longer finite after the step.
    """

    stage: str
    step: int
    samples: list[int]
    said: str
    inputs: list[str] = field(default_factory=list)
    module: str | None = None
    terms: dict[str, float] = field(default_factory=dict)
    parameter: str | None = None


def replay(run_dir: str | Path, plugins: PluginManager | None = None) -> Replay | None:
    """Take the steps from the last checkpoint to the one that went wrong again, and look at every module on the way.
    The run folder is left as it is. `None` if nothing goes wrong this time, as may happen on accelerators.

    Raises:
        RunFolderError: if no step of this run went wrong.
    """
    path, manager = Path(run_dir), plugins or PluginManager()
    try:
        record = json.loads((path / FAILURE).read_text())
        failed = Replay(record["stage"], record["step"], record["samples"], record["what"])
    except (OSError, ValueError, KeyError):
        raise RunFolderError(f"{path}: no step of this run went wrong: it has no {FAILURE}") from None
    resolved = resolve(load(path / "recipe.yaml"), manager, str(path / "recipe.yaml"))
    watcher = _Watcher(failed)
    with tempfile.TemporaryDirectory() as folder:
        if (path / "stages").is_dir():
            shutil.copytree(path / "stages", Path(folder) / "stages")
        _execute(resolved, manager, Path(folder), watcher, "replay")
    return watcher.found


class _Seen(BaseException):
    """Enough was seen. (No `Exception`: those of observers are caught.)"""


def _execute(resolved: Resolved, manager: PluginManager, folder: Path, observer: _Observer, name: str) -> None:
    """Run a recipe without writing a journal, watched."""
    manager.register(observer, name=name)
    try:
        with ExitStack() as stack:
            for hook in observer.hooks():
                stack.callback(hook.remove)
            run = Run(resolved, manager, folder)
            run.execute()
    except _Seen:
        pass
    finally:
        manager.unregister(name)


class _Observer:
    """Sees every call of a module."""

    def __init__(self) -> None:
        self.stage: Any = None

    def hooks(self) -> list[Any]:
        """The hooks on all modules, in place."""
        return [register_module_forward_hook(self.called)]

    def called(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A module returned."""

    def name_of(self, module: nn.Module) -> str | None:
        """A module's name in the stage under way, or in one of its frozen models."""
        if not isinstance(self.stage, TrainStage):
            return None
        for prefix, root in (("", self.stage), *self.stage.frozen.items()):
            for name, part in root.named_modules() if isinstance(root, nn.Module) else ():
                if part is module:
                    return ".".join(filter(None, (prefix, name))) or type(module).__name__
        return None

    @hookimpl
    def kd_stage_started(self, stage: Stage) -> None:
        """Another stage is under way."""
        self.stage = stage


class _Recorder(_Observer):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.events: list[Event] = []
        self._calls: list[tuple[nn.Module, str]] = []

    def called(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._calls.append((module, _digest(output)))

    @hookimpl
    def kd_step_finished(self, run: Run, stage: Stage, step: int, terms: Mapping[str, Tensor]) -> None:
        """Write down what was computed since the last step."""
        names: dict[int, str | None] = {}
        for module, digest in self._calls:
            name = names.setdefault(id(module), self.name_of(module)) or type(module).__name__
            self.events.append((stage.name, step, "module", name, digest))
        self._calls.clear()
        self.events += [(stage.name, step, "term", name, _digest(value)) for name, value in terms.items()]
        if isinstance(stage, TrainStage):
            self.events += [(stage.name, step, "parameter", name, _digest(value))
                            for name, value in stage.named_parameters()]  # fmt: skip
            if step >= self.steps:
                run.request_stop("enough steps were compared")


class _Watcher(_Observer):
    def __init__(self, failed: Replay) -> None:
        super().__init__()
        self.failed = failed
        self.found: Replay | None = None
        self._module: nn.Module | None = None
        self._inputs: list[str] = []

    def hooks(self) -> list[Any]:
        return [*super().hooks(), register_module_forward_pre_hook(self.begins)]

    def begins(self, module: nn.Module, inputs: Any) -> None:
        """A step begins: look at its batch."""
        if module is self.stage and inputs and isinstance(inputs[0], dict):
            self._inputs = [name for name, value in inputs[0].items() if _wrong(value)]

    def called(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._module is None and module is not self.stage and _wrong(output):
            self._module = module

    @hookimpl
    def kd_step_finished(self, stage: Stage, step: int, terms: Mapping[str, Tensor]) -> None:
        """Tell what went wrong in this step, if anything did."""
        if not isinstance(stage, TrainStage):
            return
        values = {name: float(value) for name, value in terms.items()}
        parameter = first_not_finite(stage.named_parameters())
        if parameter or first_not_finite(terms.items()):
            module = self.name_of(self._module) if self._module else None
            self.found = Replay(stage.name, step, self.failed.samples, self.failed.said, self._inputs, module, values,
                                parameter)  # fmt: skip
            raise _Seen
        if (stage.name, step) == (self.failed.stage, self.failed.step):
            raise _Seen
        self._module = None


def _tensors(value: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(dict(value) if isinstance(value, Mapping) else value, keep)
    return iter(found)


def _wrong(value: Any) -> bool:
    return first_not_finite((str(i), tensor) for i, tensor in enumerate(_tensors(value))) is not None


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in _tensors(value):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
