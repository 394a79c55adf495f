"""The hook specifications: everything a plugin can add to, or be told by, the core.

A plugin is any module, class or instance with methods marked `@kdcore.hookimpl`. An installed plugin is found by
its entry point in the group `kd`. Neither this module nor a plugin's own hook module imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore.components import Component
    from kdcore.runner import Result, Run
    from kdcore.stages import Stage

PROJECT = "kd"
ENTRY_POINT_GROUP = "kd"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kd_register_teachers() -> Sequence[Component]:  # type: ignore[empty-body]
    """Teachers the plugin offers: components of kind `teacher`."""


@hookspec
def kd_register_students() -> Sequence[Component]:  # type: ignore[empty-body]
    """Students the plugin offers: components of kind `student`."""


@hookspec
def kd_register_losses() -> Sequence[Component]:  # type: ignore[empty-body]
    """Losses the plugin offers: components of kind `loss`."""


@hookspec
def kd_register_data() -> Sequence[Component]:  # type: ignore[empty-body]
    """Data the plugin offers: components of kind `data`."""


@hookspec
def kd_register_methods() -> Sequence[Component]:  # type: ignore[empty-body]
    """Methods the plugin offers: components of kind `method`."""


@hookspec
def kd_run_started(run: Run) -> None:
    """A run begins, after its recipe was validated and its folder locked."""


@hookspec
def kd_stage_started(run: Run, stage: Stage) -> None:
    """A stage begins or resumes. A stage that finished in an earlier session is not announced again."""


@hookspec
def kd_step_finished(run: Run, stage: Stage, step: int, terms: Mapping[str, Tensor]) -> None:
    """One optimizer step is done; in other stages one trial of a search, or one shard of a corpus.

    `terms` holds the weighted terms of this process as detached scalar tensors on the device: reading one waits
    for the device, so read rarely. To end the stage early, call `run.request_stop(reason)`.
    """


@hookspec
def kd_evaluated(run: Run, stage: Stage, metrics: Mapping[str, float]) -> None:
    """A model was evaluated; `metrics` maps `split/metric` to its value. `run.request_stop(reason)` ends the stage."""


@hookspec
def kd_checkpoint_saved(run: Run, stage: Stage, path: Path) -> None:
    """A checkpoint is complete on disk at `path`."""


@hookspec
def kd_run_finished(run: Run, result: Result) -> None:
    """The run is done and its student saved."""


REGISTRATION = {
    "kd_register_teachers": "teacher",
    "kd_register_students": "student",
    "kd_register_losses": "loss",
    "kd_register_data": "data",
    "kd_register_methods": "method",
}
