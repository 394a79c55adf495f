"""How far a run is: a live display on a terminal, plain lines elsewhere. Both are observers like any plugin's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kd_cli import tables
from kdcore.errors import visible
from kdcore.hookspecs import hookimpl
from kdcore.plugins import PluginManager

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from kdcore.runner import Run
    from kdcore.stages import Stage

_READ_EVERY = 0.5  # seconds: reading a term waits for the device


@contextlib.contextmanager
def shown(manager: PluginManager) -> Iterator[None]:
    """Inside, runs with this manager show their progress on standard output."""
    out = tables.console()
    if not out.is_terminal:
        manager.register(Lines(), name="progress")
        yield
        return
    with live_display() as display:
        manager.register(Live(display), name="progress")
        yield


def values(numbers: Mapping[str, Any]) -> str:
    """Terms or metrics on one line."""
    return "  ".join(f"{visible(tables.number(name))} {tables.number(float(value))}" for name, value in numbers.items())


class _Rarely:
    """Says yes at most once in a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, float("-inf")

    def __call__(self) -> bool:
        now = time.monotonic()
        due = now - self.last >= self.seconds
        self.last = now if due else self.last
        return due


class Lines:
    """A line per stage, log interval, evaluation and checkpoint; steps too quick to read are passed over."""

    def __init__(self) -> None:
        self._due = _Rarely(_READ_EVERY)
        self._log_every = 1
        self._first: tuple[int, float] | None = None

    @hookimpl
    def kd_stage_started(self, run: Run, stage: Stage) -> None:
        """Announce it."""
        self._first = None
        typer.echo(f"stage {stage.name}" + (f": {stage.note}" if stage.note else ""))

    @hookimpl
    def kd_step_finished(self, run: Run, stage: Stage, step: int, terms: Mapping[str, Tensor]) -> None:
        """A line at the log interval; for stages that do not train, whenever there is time to read it."""
        if self._first is None:
            self._first = step, time.monotonic()
            overrides = getattr(stage, "overrides", None)
            self._log_every = 1 if overrides is None else run.recipe.train_for(stage.name, overrides).log_every
        total = stage.total_steps
        if step == total or (step % self._log_every == 0 and self._due()):
            of = f"/{total}" if total else ""
            typer.echo(f"{stage.name}  step {step}{of}{self._pace(step, total)}  {values(terms)}".rstrip())

    def _pace(self, step: int, total: int) -> str:
        """Steps per second since the stage began or resumed, and the time left at that pace, where the end is known."""
        first, since = self._first or (step, 0.0)
        if step == first:
            return ""
        rate = (step - first) / max(time.monotonic() - since, 1e-9)
        return f"  {rate:.1f} steps/s" + (f"  {clock((total - step) / rate)} left" if total else "")

    @hookimpl
    def kd_evaluated(self, run: Run, stage: Stage, metrics: Mapping[str, float]) -> None:
        """The metrics."""
        typer.echo(f"{stage.name}  {values(metrics)}")

    @hookimpl
    def kd_checkpoint_saved(self, run: Run, stage: Stage, path: Path) -> None:
        """Where it is."""
        typer.echo(f"{stage.name}  checkpoint {path}")


class Live:
    """One bar per stage; below them the terms and metrics of the moment."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._task = display.add_task("starting", total=None)
        self._due = _Rarely(_READ_EVERY)
        self._running = False
        self._parts: dict[str, str] = {}

    @hookimpl
    def kd_stage_started(self, run: Run, stage: Stage) -> None:
        """A new bar, without a length until the first step."""
        self._close()
        self._task = self._display.add_task(stage.name, total=None)
        if stage.note:
            self._tell("takes", stage.note)

    @hookimpl
    def kd_step_finished(self, run: Run, stage: Stage, step: int, terms: Mapping[str, Tensor]) -> None:
        """Move the bar."""
        if not self._running:
            self._display.reset(self._task, total=stage.total_steps or None, completed=step, counted=True)
            self._running = True
        if self._due() or step == stage.total_steps:
            self._display.update(self._task, completed=step)
            self._tell("terms", values(terms))

    @hookimpl
    def kd_evaluated(self, run: Run, stage: Stage, metrics: Mapping[str, float]) -> None:
        """Show the metrics."""
        self._tell("metrics", values(metrics))

    @hookimpl
    def kd_checkpoint_saved(self, run: Run, stage: Stage, path: Path) -> None:
        """Show its name."""
        self._tell("checkpoint", f"saved {path.name}")

    @hookimpl
    def kd_run_finished(self, run: Run, result: Any) -> None:
        """Only the bars stay."""
        self._close()

    def _tell(self, part: str, text: str) -> None:
        self._parts[part] = text
        self._display.update(self._task, details="\n".join(f"  {k}: {v}" for k, v in self._parts.items()))

    def _close(self) -> None:
        """End the stage's bar, or drop it where there was nothing to count."""
        task = self._display.tasks[-1]
        done = task.completed if self._running else 1
        self._display.update(self._task, details="", total=done, completed=done, visible=task.description != "starting")
        self._parts, self._running = {}, False


def live_display() -> Progress:
    """The bars of a terminal: stage, steps, rate, time left, and the details of the stage under way below them."""
    from rich.console import RenderableType
    from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Steps(TextColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            rate = f"  {speed:.1f} steps/s" if speed else ""
            of = f"/{task.total:.0f}" if task.total else ""
            return Text(f"{task.completed:.0f}{of}{rate}" if task.fields.get("counted") else "")

    class Display(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            for task in self.tasks:
                if details := task.fields.get("details"):
                    yield Text(details, style="dim")

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False), BarColumn(), Steps(""),
               TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
    return Display(*columns, refresh_per_second=4)


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
