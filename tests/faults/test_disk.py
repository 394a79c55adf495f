"""Disks that are full, closed or odd, and clocks that go backwards: one clear message, what was saved stays whole, and
after room is made the same command ends with the student of a run that nothing happened to."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdcore
from kdcore.errors import Interrupted, RunFailed, RunFolderError, UserError
from kdcore.folder import verify
from kdcore.testing.conformance import assert_same_students

sys.path.insert(0, str(Path(__file__).parent))
from toys import Action, At, as_command, go, interrupt

SIZE = 2_000_000
"""Of the small disk."""
LIMIT = 10_000
"""Bytes of a file: those of models are larger, all others smaller."""


KEPT = {"checkpoint": ["step-00000003", "step-00000006"], "journal": ["step-00000003", "step-00000006"],
        "artifact": ["step-00000006", "step-00000009"], "student": []}  # fmt: skip
"""The checkpoints there are when something else could not be written."""


def at_the_student(action: Action) -> Action:
    """An action that waits until the student is written."""

    def later(run: kdcore.Run) -> None:
        finish = run._finish
        run._finish = lambda: (action(run), finish())[1]

    return later


def moment(what: str, action: Action) -> At:
    """The last step before something is written."""
    if what == "student":
        return At("distill", 12, at_the_student(action))
    return At(*{"checkpoint": ("distill", 9), "journal": ("distill", 8), "artifact": ("distill", 12)}[what], action)


def limit(what: str) -> At:
    """From that moment on no file may become larger than it is to be."""

    def set_limit(run: kdcore.Run) -> None:
        size = (run.path / "metrics.jsonl").stat().st_size + 10 if what == "journal" else LIMIT
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return moment(what, set_limit)


def fill(disk: Path) -> None:
    """Leave no room on it."""
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def checkpoints(path: Path) -> list[str]:
    """The checkpoints of the last stage; all are whole."""
    found = sorted((path / "stages/05-distill/checkpoints").glob("step-*[0-9]"))
    for folder in found:
        verify(folder)
    return [folder.name for folder in found]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return go(tmp_path_factory.mktemp("whole") / "run").path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def in_process(path: Path, prepare: functools.partial[At], log: Path) -> multiprocessing.process.BaseProcess:
    """The run in a process of its own, begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_cli.main", "kdcore.api", "accelerate", "torchmetrics", "datasets"])
    process = context.Process(target=as_command, args=(path, log, prepare))
    process.start()
    return process


@pytest.mark.parametrize("what", KEPT)
def test_a_disk_that_is_full_ends_the_run_and_with_room_it_goes_on(what, disk, whole):
    path = disk / "run"
    with pytest.raises(RunFailed) as error:
        go(path, moment(what, lambda run: fill(disk)))
    assert error.value.exit_code == 1
    assert f"the run folder {path} cannot be written any more" in str(error.value)
    assert "No space left" in str(error.value)
    assert "make room, and give the same command again" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoints(path) == KEPT[what]
    (disk / "ballast").unlink()
    assert_same_students(whole, go(path).path)
    assert (whole / "metrics.jsonl").read_text() == (path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("what", KEPT)
def test_a_file_that_may_not_grow_ends_the_command_with_1_and_a_message(what, tmp_path, whole):
    path, log = tmp_path / "run", tmp_path / "log"
    process = in_process(path, functools.partial(limit, what), log)
    process.join(120)
    said = log.read_text()
    assert process.exitcode == 1, said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    assert f"the run folder {path} cannot be written any more: " in said
    assert "make room, and give the same command again" in said
    assert "Traceback" not in said
    assert checkpoints(path) == KEPT[what]
    assert_same_students(whole, go(path).path)


def test_on_a_disk_that_is_full_nothing_begins(disk):
    fill(disk)
    with pytest.raises(UserError, match=f"{disk / 'run'}: the run folder cannot be written: No space left"):
        go(disk / "run")
    assert not (disk / "run/stages").exists()


@pytest.mark.parametrize("stop", [("distill", 8), ("", 0)])
def test_a_folder_on_a_disk_that_is_read_only_is_refused(stop, disk):
    with contextlib.suppress(Interrupted):
        go(disk / "run", At(*stop, interrupt))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for path in (disk / "run", disk / "new"):
        with pytest.raises(RunFolderError, match=f"{path}: the run folder cannot be written: Read-only"):
            go(path, resume=True)
    assert checkpoints(disk / "run") == (["step-00000006", "step-00000008"] if stop[1] else [])


def test_a_student_on_a_disk_that_is_read_only_is_measured(disk):
    models = {role: {"use": "demo-cnn", "width": 2} for role in ("teacher", "student")}
    recipe = {"method": "distill", **models, "data": "digits", "losses": ["kd"], "trackers": []}
    result = kdcore.run(recipe, ["train.steps=1", "train.batch_size=8"], run_dir=disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert kdcore.evaluate(disk / "run") == result.metrics


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is closed to root")
def test_a_folder_that_is_closed_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match=f"{tmp_path / 'run'}: the run folder cannot be written: Permission"):
        go(tmp_path / "run")


@pytest.mark.parametrize(
    "mine", ["run", "run/run.json", "run/stages", "run/student", "run/stages/mine", "run/.lock/mine", "run/mine",
             "run/run.json/mine", "run/recipe.yaml/mine"]
)  # fmt: skip
def test_what_is_in_the_way_is_refused_by_name_and_left_alone(mine, tmp_path):
    file = tmp_path / mine
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(RunFolderError) as error:
        go(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)
    assert file.read_text() == "mine"
    assert not list(tmp_path.glob("run/stages/*/*"))


@pytest.mark.parametrize("left", [".lock", "recipe.yaml", ".run.json.tmp", ".probe"])
def test_what_a_run_leaves_that_was_killed_before_it_began_is_in_nobodys_way(left, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("half")
    assert go(tmp_path / "run").metrics


def wait(there: Path, go_on: Path) -> At:
    """In a step, say that it has come, and wait."""

    def hold(run: kdcore.Run) -> None:
        there.touch()
        while not go_on.exists():
            time.sleep(0.01)

    return At("distill", 4, hold)


def test_a_folder_in_which_another_process_runs_is_refused_with_its_number(tmp_path, whole):
    path, there, go_on = tmp_path / "run", tmp_path / "there", tmp_path / "go-on"
    process = in_process(path, functools.partial(wait, there, go_on), tmp_path / "log")
    while not there.exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(RunFolderError, match=rf"{path} is in use by another run \(process {process.pid}\)"):
        go(path)
    go_on.touch()
    process.join(120)
    assert process.exitcode == 0
    assert_same_students(whole, path)


def backwards(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Clocks of the day that are an hour earlier, and go back with each look at them."""
    now = [time.time() - 3_600]

    def earlier() -> float:
        now[0] -= step
        return now[0]

    class Earlier(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(earlier(), tz)

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(datetime, "datetime", Earlier)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, whole, monkeypatch):
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        go(path, At("distill", 8, interrupt))
    newest, older = (path / f"stages/05-distill/checkpoints/step-0000000{step}" for step in (8, 6))
    os.utime(newest, (1, 1))  # the last checkpoint looks the oldest
    assert older.stat().st_mtime > newest.stat().st_mtime
    backwards(monkeypatch, step=60.0)
    result = go(path)
    facts = json.loads((path / "run.json").read_text())
    assert facts["finished"] < facts["started"]  # the clock did go back
    assert min(timing["seconds"] for timing in facts["timings"].values()) >= 0
    assert facts["timings"]["distill"]["steps"] == 4
    assert_same_students(whole, result.path)
    assert (whole / "metrics.jsonl").read_text() == (path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTSUP])
def test_a_disk_on_which_no_file_takes_anothers_place_is_refused_before_anything_is_trained(
    number, tmp_path, monkeypatch
):
    replace = os.replace

    def only_new(source: Path, target: Path) -> None:
        if Path(target).exists():
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_new)
    with pytest.raises(RunFolderError, match=f"{tmp_path / 'run'}: the file system cannot put a file in another's"):
        go(tmp_path / "run")
    assert not (tmp_path / "run/stages").exists()
    monkeypatch.setattr(os, "replace", replace)
    shutil.rmtree(tmp_path / "run")
    assert go(tmp_path / "run").metrics
