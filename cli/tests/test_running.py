from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


def test_a_run_ends_with_metrics_table_folder_and_what_to_do_next(kd):
    result = kd("run", "toy")
    assert result.exit_code == 0, result.output
    assert "stage teacher" in result.stdout
    assert "stage distill" in result.stdout
    assert "distill  step 24/24" in result.stdout
    assert "match " in result.stdout
    assert "0.91 ± 0.02" in result.stdout
    assert "runs/toy-quickstart/student" in result.stdout
    assert "kd eval runs/toy-quickstart" in result.stdout
    assert "kd run toy/paper --dry-run" in result.stdout
    assert Path("runs/toy-quickstart/student/model.safetensors").is_file()


def test_json_is_all_that_stands_on_stdout(kd):
    result = kd("run", "toy", "train.epochs=1", "--run-dir", "out", "--json")
    found = json.loads(result.stdout)
    assert found["path"] == "out"
    assert found["metrics"]["val/accuracy"] > 0.5
    assert found["rows"] == [{"model": "student", "val/accuracy": "0.91 ± 0.02", "parameters": 10}]
    again = kd("eval", "out", "--json")
    assert json.loads(again.stdout) == found["metrics"]
    assert f"{found['metrics']['val/accuracy']:.4g}" in kd("eval", "out", "--split", "val").stdout


def test_quiet_prints_nothing(kd):
    result = kd("run", "toy", "train.epochs=1", "--quiet")
    assert result.exit_code == 0
    assert result.output == ""


def test_a_finished_run_is_refused_and_shown_again_on_resume(kd):
    assert kd("run", "toy", "train.epochs=1", "-q").exit_code == 0
    refused = kd("run", "toy", "train.epochs=1")
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert "val/accuracy" in kd("run", "toy", "train.epochs=1", "--resume").stdout


def test_a_dry_run_prints_recipe_and_downloads_and_writes_nothing(kd, here):
    result = kd("run", "toy/paper", "train.epochs=7", "--dry-run")
    assert result.exit_code == 0
    recipe, _, downloads = result.stdout.partition("Would be downloaded")
    assert yaml.safe_load(recipe)["train"]["epochs"] == 7
    assert "1.5 MB" in downloads
    assert "size unknown" in downloads
    assert "total: at least 1.5 MB" in downloads
    assert list(here.iterdir()) == []


def test_a_dry_run_counts_what_two_roles_share_once(kd):
    result = kd("run", "toy/paper", "student.remote=big", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert plan["total"] == 1_500_000
    assert plan["downloads"][0]["keys"] == ["teachers.teacher", "students.student"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tox",), "did you mean 'toy'"),
        (("toy/fast",), "ships no recipe 'fast'"),
        (("missing.yaml",), "there is no such file"),
        (("toy", "train.epoch=3"), "did you mean 'epochs'"),
        (("toy", "epochs"), "write key=value"),
        (("toy", "train.epoch=3", "--processes", "2"), "did you mean 'epochs'"),
        (("toy", "--processes", "0"), "--processes"),
    ],
)
def test_wrong_input_is_told_without_a_traceback(kd, here, arguments, message):
    result = kd("run", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(here.iterdir()) == []


def test_evaluating_what_is_no_run_is_refused(kd):
    result = kd("eval", "nowhere")
    assert result.exit_code == 2
    assert "is not a run folder" in result.stderr


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(kd, monkeypatch):
    result = kd("run", "toy", "method={use: toy, crash: true}", "--run-dir", "a")
    assert result.exit_code == 1
    assert "unexpected error: ZeroDivisionError: nobody expects this\nset KD_DEBUG=1 for the traceback" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("KD_DEBUG", "1")
    result = kd("run", "toy", "method={use: toy, crash: true}", "--run-dir", "b")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "set KD_DEBUG" not in result.stderr


def test_no_noise_of_libraries_reaches_the_terminal(kd_process):
    result = kd_process("run", "toy", "train.epochs=1")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_not(kd, number, status):
    recipe = ("toy", "train.epochs=150", "train.save_every=25", "train.eval_every=1000")
    with subprocess.Popen(
        [sys.executable, "-m", "kd_cli", "run", *recipe, "--run-dir", "cut"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("distill  checkpoint"):
                process.send_signal(number)
                break
        process.stdout.read()
        error = process.stderr.read()
        assert process.wait(60) == status
    assert error.startswith("interrupted: interrupted in stage 'distill'")
    assert kd("run", *recipe, "--run-dir", "cut", "-q", "--resume", "auto").exit_code == 0
    assert kd("run", "--resume", "auto", *recipe, "--run-dir", "whole", "-q").exit_code == 0
    assert kd("run", *recipe, "--run-dir", "whole", "-q", "--resume=auto").exit_code == 0
    weights = [Path(run, "student", "model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_two_processes_give_one_result_and_one_error(kd_process):
    result = kd_process("run", "toy", "--processes", "2", "--run-dir", "two", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["path"] == "two"
    assert json.loads(Path("two/run.json").read_text())["hardware"]["processes"] == 2
    result = kd_process("run", "toy", "--processes", "2", "--run-dir", "two")
    assert result.returncode == 2
    assert result.stderr.count("holds a finished run") == 1
    assert "Traceback" not in result.stderr


def test_the_live_display_shows_bars_and_erases_nothing_at_the_end(here):
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "120"}
        os.execv(sys.executable, [sys.executable, "-m", "kd_cli", "run", "toy", "train.epochs=1"])
    text, since = b"", time.monotonic()
    while time.monotonic() - since < 120:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    last = text.decode().rpartition("terms: match")[2]
    assert "8/8" in last
    assert "Comparison" in last
