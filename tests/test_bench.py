"""`kd bench` and `kd compare`: what runs, what is compared, and what is not run again."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdcore
from kd_cli.main import app
from kdcore import leaderboard
from kdcore.errors import UserError
from kdcore.leaderboard import Trial, interval, standings

CHANGES = ["train.steps=4", "teachers.teacher.train.steps=3", "train.log_every=2"]
METHODS = ["kd,temperature=2", "skd"]


def trial(name, seed, value=None, higher=True, teacher=False):
    facts = {"metrics": {"test/x": value}, "higher_is_better": higher, "seconds": 2.0, "peak_memory": 7}
    return Trial(name, seed, Path(name), teacher=teacher, error="" if value else "why", facts=facts if value else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished bench of two entries, and one that cannot run on this data."""
    where = tmp_path_factory.mktemp("bench") / "all"
    board = kdcore.bench(METHODS, "kd", CHANGES, seeds=2, run_dir=where)
    return where, board


def test_every_method_runs_with_every_seed_beside_the_student_alone(folder):
    where, board = folder
    assert {s.method: sorted(s.values) for s in board} == {
        "teacher": [0], "supervised": [0, 1], "kd,temperature=2": [0, 1], "skd": []
    }  # fmt: skip
    assert board[-1].method == "skd"
    assert "needs score maps" in board[-1].errors[0]
    recipe = (where / "kd_temperature=2" / "seed-1" / "recipe.yaml").read_text()
    assert "temperature: 2" in recipe
    assert "seed: 1" in recipe
    assert not (where / "kd_temperature=2" / "seed-0" / "stages" / "01-teacher").exists()  # trained once, for all


def test_what_is_finished_is_not_run_again_and_the_page_is_written(folder, monkeypatch):
    where, board = folder

    begun = []

    class Process:
        exitcode = 2

        def __init__(self, target, args):
            begun.append(args[1].parent.name)

        start = join = lambda self: None

    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(context, "Process", Process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: context)
    monkeypatch.setattr(context, "set_forkserver_preload", lambda names: None)
    arguments = ["bench", *METHODS, "--recipe", "kd", "--seeds", "2", "--run-dir", str(where)]
    shown = CliRunner().invoke(app, [*arguments, *(part for c in CHANGES for part in ("--set", c))])
    assert shown.exit_code == 1
    assert "kd,temperature=2" in shown.output
    assert "needs score maps" in shown.output
    assert set(begun) == {"skd"}
    saved = json.loads((where / "leaderboard.json").read_text())
    assert [s["method"] for s in saved["standings"]] == [s.method for s in board]
    page = (where / "leaderboard.html").read_text()
    assert "<svg" in page
    assert "kd,temperature=2" in page
    assert (where / "leaderboard.csv").read_text().startswith("method,test/accuracy %,")


def test_another_bench_in_the_same_folder_is_refused(folder):
    with pytest.raises(UserError, match="belongs to another bench, with other settings of 'teacher'"):
        kdcore.bench(["kd"], "kd", ["train.steps=5"], seeds=2, run_dir=folder[0])


def test_runs_are_compared_by_what_they_reached_and_where_they_differ(folder, tmp_path):
    where, _ = folder
    runs = [where / "kd_temperature=2" / "seed-0", where / "supervised" / "seed-0"]
    rows = kdcore.compare(runs)
    assert {row["method.use"]: row["method.temperature"] for row in rows} == {"kd": 2.0, "supervised": None}
    assert not {"seed", "train.steps", "students.student.width"} & rows[0].keys()  # what is alike is left out
    assert rows[0]["test/accuracy"] >= rows[1]["test/accuracy"]
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["compare", *map(str, runs), "--html", str(page)])
    assert shown.exit_code == 0
    assert "<svg" in page.read_text()
    with pytest.raises(UserError, match="is not a run folder"):
        kdcore.compare([where])


def test_where_lower_is_better_the_lowest_comes_first(tmp_path):
    for name, value in (("a", 2.0), ("b", 1.0), ("c", 3.0)):
        (tmp_path / name).mkdir()
        facts = {"metrics": {"val/mse": value}, "higher_is_better": False, "timings": {"s": {"seconds": 1.0}}}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
        (tmp_path / name / "recipe.yaml").write_text(f"method: {{use: kd}}\ndata: {{use: digits}}\nseed: {value:.0f}\n")
    rows = kdcore.compare([tmp_path / name for name in "abc"])
    assert [(row["val/mse"], row["seed"]) for row in rows] == [(1.0, 1), (2.0, 2), (3.0, 3)]


@pytest.mark.parametrize(
    ("methods", "message"),
    [(["nosuch"], "unknown method 'nosuch'"), (["kd", "kd,temprature=3"], "kd,temprature=3: .*\n.*did you mean"),
     (["kd,train.epochs=no"], "train.epochs"), ([], "name the methods"),
     (["distill"], "needs a `losses:` list")],
)  # fmt: skip
def test_wrong_entries_are_refused_before_anything_runs(methods, message, tmp_path):
    with pytest.raises(UserError, match=message):
        kdcore.bench(methods, "kd", run_dir=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_an_entry_changes_its_own_recipe_and_brackets_keep_their_commas():
    base = {"method": {"use": "kd", "temperature": 2}, "losses": [{"use": "kd"}], "train": {"epochs": 3}}
    own = leaderboard._recipe(base, base, "kd,weight=0.5,train.epochs=1", 4)
    assert own["method"] == {"use": "kd", "temperature": 2, "weight": 0.5}
    assert (own["train"]["epochs"], own["seed"]) == (1, 4)
    other = leaderboard._recipe(base, base, "distill,losses=[{use: lsr, alpha: 0.2}, cross-entropy]", 0)
    assert other["method"] == {"use": "distill"}
    assert other["losses"] == [{"use": "lsr", "alpha": 0.2}, "cross-entropy"]


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_comes_first_and_gains_are_paired_by_seed(higher):
    sign = 1 if higher else -1
    found = standings([
        trial("teacher", 0, 9.0, higher, teacher=True),
        *(trial("supervised", seed, 5.0 + seed, higher) for seed in (0, 1, 2)),
        *(trial("better", seed, 5.0 + seed + sign * gain, higher) for seed, gain in ((0, 1.0), (1, 1.5), (2, 2.0))),
        trial("half", 0, 5.0, higher), trial("half", 1), trial("failed", 0),
    ])  # fmt: skip
    by_name = {standing.method: standing for standing in found}
    assert [s.method for s in found].index("better") < [s.method for s in found].index("supervised")
    assert found[-1].method == "failed"
    better = by_name["better"]
    assert better.gain == pytest.approx(1.5)
    assert (better.low, better.high) == pytest.approx((1.5 - 1.2421, 1.5 + 1.2421), abs=1e-3)  # t(2) = 4.303
    assert by_name["half"].errors == {1: "why"}
    assert (by_name["half"].gain, by_name["half"].low) == (0.0, None)
    assert by_name["teacher"].gain is by_name["supervised"].gain is None


def test_one_value_has_no_interval():
    assert interval([]) == (None, None, None)
    assert interval([3.0]) == (3.0, None, None)


def test_a_trial_writes_what_is_wrong_beside_its_folder(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: nosuch\ndata: digits\n")
    process = multiprocessing.get_context("spawn").Process(
        target=leaderboard.work, args=(path, tmp_path / "run", 1, None)
    )
    process.start()
    process.join()
    assert process.exitcode == UserError.exit_code
    assert "unknown method" in (tmp_path / "run.log").read_text()
