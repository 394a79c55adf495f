"""Damaged state: noticed before it is used, named, and either what is still whole is used, with a warning, or nothing
is: the run is refused. What comes out is always the student of a run that nothing happened to."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import kdcore
from kdcore.errors import Interrupted, RunFolderError, UserError
from kdcore.folder import FORMAT, MANIFEST, RunFolder
from kdcore.testing.conformance import assert_same_students

sys.path.insert(0, str(Path(__file__).parent))
from toys import At, go, interrupt

State = Callable[..., Path]

STOPS = {"searching": ("search", 3), "asking": ("corpus", 2), "training": ("distill", 8), "finished": ("", 0)}
MEAN, SEARCH, CORPUS, WARM = (f"stages/{name}/artifact" for name in ("01-mean", "02-search", "03-corpus", "04-warm"))
SHARD, STEPS = "stages/03-corpus/shards/000000", "stages/05-distill/checkpoints"
NEWEST, OLDER = f"{STEPS}/step-00000008", f"{STEPS}/step-00000006"
IN_FOLDERS = {
    NEWEST: ["model.safetensors", "optimizer.bin", "random_states_0.pkl", MANIFEST],
    MEAN: ["tensors.safetensors", MANIFEST],
    SEARCH: ["archive.jsonl", MANIFEST],
    CORPUS: ["data/data-00000-of-00001.arrow", "data/dataset_info.json", "data/state.json", "report.json", MANIFEST],
    WARM: ["stage.safetensors", "student/model.safetensors", MANIFEST],
    SHARD: ["data-00000-of-00001.arrow", "dataset_info.json", "state.json", MANIFEST],
}
FILES = [f"{folder}/{name}" for folder, names in IN_FOLDERS.items() for name in names]
ARCHIVE = "stages/02-search/archive.jsonl"

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda old: old[: len(old) // 2],
    "emptied": lambda old: b"",
    "flipped": lambda old: old[: len(old) // 2] + bytes([old[len(old) // 2] ^ 1]) + old[len(old) // 2 + 1 :],
    "missing": lambda old: b"",
}


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    """Runs that stopped in a state, of this recipe or of another; each is made once."""
    where = tmp_path_factory.mktemp("states")

    def stopped(name: str, seed: int = 0) -> Path:
        path = where / f"{name}-{seed}"
        if not path.exists():
            try:
                go(path, At(*STOPS[name], interrupt), seed=seed)
            except Interrupted:
                assert name != "finished"
        return path

    return stopped


@pytest.fixture
def run(state: State, tmp_path: Path) -> Callable[[str], Path]:
    """A run that stopped in a state, to be damaged."""
    return lambda name: Path(shutil.copytree(state(name), tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    old = path.read_bytes()
    new = DAMAGES[how](old)
    assert new != old
    path.write_bytes(new)
    if how == "missing":
        path.unlink()


def replace(folder: Path, by: Path) -> None:
    """Put another folder in its place."""
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def raise_format(path: Path) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "format": FORMAT + 1}))


def manifests(path: Path) -> set[Path]:
    return set(path.rglob(MANIFEST))


def end(path: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What was said when the run was to go on: it was refused and nothing was thrown away, or it was warned of and the
    student is the right one."""
    before = manifests(path)
    caplog.set_level(logging.WARNING)
    try:
        result = go(path)
    except UserError as error:
        said, status = str(error), error.exit_code
    else:
        assert_same_students(whole, result.path)
        return "\n".join(record.getMessage() for record in caplog.records)
    assert (status, manifests(path)) == (2, before)
    return said


def state_with(file: str) -> str:
    """The state in which a file is read next."""
    return "asking" if file.startswith(SHARD) else "searching" if file == ARCHIVE else "training"


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_folder_is_named(file, how, state, run, caplog):
    path = run(state_with(file))
    damage(path / file, how)
    said = end(path, state("finished"), caplog)
    folder = next(folder for folder in IN_FOLDERS if file.startswith(folder))
    assert str(path / folder) in said
    name = file.removeprefix(f"{folder}/")
    assert name in said or (name, how) == (MANIFEST, "flipped")  # which may be in the name of another


@pytest.mark.parametrize("folder", [NEWEST, SHARD])
def test_every_byte_of_a_manifest_counts(folder, run):
    path = run(state_with(folder)) / folder
    old = (path / MANIFEST).read_bytes()
    for at, byte in enumerate(old):
        (path / MANIFEST).write_bytes(old[:at] + bytes([byte ^ 1]) + old[at + 1 :])
        with pytest.raises(RunFolderError) as error:
            kdcore.folder.verify(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("folder", [NEWEST, STEPS, MEAN, SEARCH, CORPUS, WARM, SHARD, "stages"])
def test_a_folder_that_is_gone_is_missed(folder, state, run, caplog):
    path = run(state_with(folder))
    shutil.rmtree(path / folder)
    assert str(path / folder) in end(path, state("finished"), caplog)


@pytest.mark.parametrize("folder", IN_FOLDERS)
def test_a_folder_of_a_run_of_another_recipe_is_not_taken_for_its_own(folder, state, run, caplog):
    path = run(state_with(folder))
    replace(path / folder, state(state_with(folder), seed=1) / folder)
    said = end(path, state("finished"), caplog)
    assert f"{path / folder} belongs to a run of another recipe" in said


@pytest.mark.parametrize("folder", IN_FOLDERS)
def test_a_folder_of_a_later_version_is_not_read(folder, state, run, caplog):
    path = run(state_with(folder))
    raise_format(path / folder / MANIFEST)
    said = end(path, state("finished"), caplog)
    assert f"{path / folder} was written by a later version of kdcore (format {FORMAT + 1}" in said


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", IN_FOLDERS[NEWEST])
def test_without_one_whole_checkpoint_the_stage_does_not_begin_again(file, how, run):
    path = run("training")
    for folder in (NEWEST, OLDER):
        damage(path / folder / file, how)
    before = manifests(path)
    with pytest.raises(RunFolderError, match=f"no checkpoint of this stage can be used: .*{OLDER}") as error:
        go(path)
    assert file in str(error.value) or (file, how) == (MANIFEST, "flipped")
    assert manifests(path) == before


def test_a_damaged_checkpoint_that_is_not_the_last_does_no_harm(state, run):
    path = run("training")
    damage(path / OLDER / "model.safetensors", "half")
    assert_same_students(state("finished"), go(path).path)


@pytest.mark.parametrize("how", [*DAMAGES, "foreign"])
def test_a_damaged_archive_of_a_search_is_named(how, state, run, caplog):
    path = run("searching")
    if how == "foreign":
        shutil.copyfile(state("searching", seed=1) / ARCHIVE, path / ARCHIVE)
    else:
        damage(path / ARCHIVE, how)
    assert str(path / ARCHIVE) in end(path, state("finished"), caplog)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_journal_is_named(how, state, run, caplog):
    path = run("training")
    damage(path / "metrics.jsonl", how)
    assert str(path / "metrics.jsonl") in end(path, state("finished"), caplog)


def test_a_byte_of_the_journal_that_is_no_text_is_named(tmp_path, caplog):
    folder = RunFolder(tmp_path / "run", {"seed": 0})
    folder.log({"stage": "search", "step": 1, "metrics": {"near": -1.0}})
    journal = tmp_path / "run/metrics.jsonl"
    old = journal.read_bytes()
    for at in range(len(old) - 1):
        journal.write_bytes(old[:at] + bytes([old[at] ^ 128]) + old[at + 1 :])
        caplog.clear()
        folder.keep_rows(lambda row: row.get("stage") == "search")
        assert f"{journal} is damaged: line 1 cannot be read" in caplog.text, at


@pytest.mark.parametrize("name", ["training", "finished"])
@pytest.mark.parametrize(
    ("file", "how"),
    [*((file, how) for file in ("run.json", "recipe.yaml") for how in (*DAMAGES, "foreign")), ("run.json", "newer")],
)
def test_a_folder_whose_run_or_recipe_is_damaged_is_refused(file, how, name, state, run):
    path = run(name)
    if how == "newer":
        raise_format(path / file)
    elif how == "foreign":
        shutil.copyfile(state(name, seed=1) / file, path / file)
    else:
        damage(path / file, how)
    with pytest.raises(RunFolderError) as error:
        go(path, resume=True)
    assert str(path) in str(error.value)


DEMO = {"method": "distill", "teacher": {"use": "demo-cnn", "width": 2}, "student": {"use": "demo-cnn", "width": 2},
        "data": "digits", "losses": ["cross-entropy", "kd"], "trackers": [],
        "train": {"steps": 2, "batch_size": 8}}  # fmt: skip


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of two recipes."""
    where = tmp_path_factory.mktemp("taught")
    return [kdcore.run(DEMO, [f"seed={seed}"], run_dir=where / str(seed)).path for seed in (0, 1)]


STUDENT_FILES = ["model.safetensors", "config.json", MANIFEST]


def damage_student(path: Path, file: str, how: str, other: Path) -> None:
    if how == "newer":
        raise_format(path / "student" / MANIFEST)
    elif how == "foreign":
        replace(path / "student", other / "student")
    elif how == "gone":
        shutil.rmtree(path / "student")
    else:
        damage(path / "student" / file, how)


@pytest.mark.parametrize(
    ("file", "how"),
    [*((file, how) for file in STUDENT_FILES for how in DAMAGES), *(("", h) for h in ("newer", "foreign", "gone"))],
)
def test_a_damaged_student_is_neither_a_teacher_nor_measured(file, how, kd, taught, here):
    path = Path(shutil.copytree(taught[0], here / "run"))
    damage_student(path, file, how, taught[1])
    Path("mine.yaml").write_text(yaml.safe_dump(DEMO))
    for command in (("run", "mine.yaml", "teacher.checkpoint=run"), ("eval", "run")):
        result = kd(*command)
        assert result.exit_code == 2, (command, result.output)
        assert "Traceback" not in result.output
        assert ("run: the run has no finished student" if how == "gone" else "run/student") in result.stderr
        assert file in result.stderr or (file, how) == (MANIFEST, "flipped")  # which may be in the name of another
    assert not list(Path().glob("runs/mine/stages/*"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_recipe_that_changed_after_the_run_does_not_change_what_is_measured(how, kd, taught, here):
    path = Path(shutil.copytree(taught[0], here / "run"))
    damage(path / "recipe.yaml", how)
    result = kd("eval", "run")
    assert result.exit_code == 2, result.output
    assert "run" in result.stderr


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_student_is_not_handed_back_by_a_finished_run(how, here):
    def distill() -> kdcore.Result:
        torch.manual_seed(0)
        data = [(torch.rand(4), i % 3) for i in range(16)]
        return kdcore.distill(nn.Linear(4, 3), nn.Linear(4, 3), data, train={"steps": 2, "batch_size": 8},
                              run_dir="run", resume=True)  # fmt: skip

    distill()
    damage(Path("run/student/model.safetensors"), how)
    with pytest.raises(UserError, match=r"student.*model\.safetensors"):
        distill()
