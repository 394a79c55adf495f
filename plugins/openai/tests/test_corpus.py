"""A corpus of 1,000 prompts from a server that fails: killed half way and resumed, on two processes, out of budget."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from kdcore.errors import ModelError, RecipeError, RunFailed

PROGRAM = Path(__file__).parent / "corpus.py"
PROMPTS = 1000
CONCURRENCY = 32
SAME_SEED = ("busy", "broken", "away", "cut", "drop", "malformed", "html", "shape", "delay")
"""Faults after which a prompt is asked again with the same seed, so that its answer is that of a run without faults."""


@pytest.fixture(scope="module")
def program():
    """The plugin's module, for running it in this process."""
    spec = importlib.util.spec_from_file_location("corpus_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path, program):
    """`start(server, *arguments)`: `kd run` of the corpus in `run`, as a program; the plugin is installed for it."""
    installed = tmp_path / "site" / "corpus-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: corpus\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[kd]\ncorpus = corpus:Plugin\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KD_PLUGINS": "corpus,openai",
                   "PYTHONPATH": os.pathsep.join([str(installed.parent), str(PROGRAM.parent)])}  # fmt: skip

    def run(server, *arguments, prompts=PROMPTS):
        (tmp_path / "corpus.yaml").write_text(json.dumps(program.recipe(server.url, tmp_path, prompts)))
        command = [sys.executable, "-m", "kd_cli", "run", str(tmp_path / "corpus.yaml"), "--run-dir",
                   str(tmp_path / "run"), "--quiet", *arguments]  # fmt: skip
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return run


def kill(process):
    """End a program and all that it started, which have process groups of their own, at once."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()


def rows(folder):
    from datasets import load_from_disk

    return load_from_disk(str(folder / "stages/01-corpus/artifact/data")).to_list()


def assert_whole(folder, prompts=PROMPTS):
    """Every prompt is answered exactly once, in order, with its own answer."""
    found = rows(folder)
    assert [row["number"] for row in found] == list(range(prompts))
    assert all(re.fullmatch(rf"<number {row['number']}> by \d+", row["answer"]) for row in found)
    assert {row["teacher"] for row in found} == {"tiny"}


def kill_half_way(server, process, prompts):
    """Kill a program when the server has answered half of its prompts; wait for it."""
    answer = server.answer

    def answer_or_kill(prompt, seed):
        if len(server.answered) == prompts // 2:
            kill(process)
        return answer(prompt, seed)

    server.answer = answer_or_kill
    process.communicate(timeout=300)
    server.answer = answer
    assert process.returncode == -signal.SIGKILL
    assert prompts // 2 <= len(set(server.answered)) < prompts


def test_killed_half_way_and_resumed_every_prompt_is_answered_exactly_once(serve, tmp_path, start, program, quick):
    server = serve(faults=0.15)
    kill_half_way(server, start(server), PROMPTS)
    assert program.write(server.url, tmp_path, PROMPTS).metrics == {"rows": PROMPTS}
    assert_whole(tmp_path / "run")
    answered = Counter(server.answered)
    assert len(answered) == PROMPTS
    assert sum(answered.values()) - PROMPTS <= CONCURRENCY  # what was under way when it was killed


def test_on_two_processes_killed_half_way_and_resumed_the_corpus_is_that_of_an_uninterrupted_run(
    serve, tmp_path, start, program, quick
):
    prompts = 500  # two shards
    server = serve(faults=0.15, kinds=SAME_SEED)
    kill_half_way(server, start(server, "--processes", "2", prompts=prompts), prompts)
    again = start(server, "--processes", "2", prompts=prompts)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert_whole(tmp_path / "run", prompts)
    answered = Counter(server.answered)
    assert len(answered) == prompts
    assert sum(answered.values()) - prompts <= 2 * CONCURRENCY
    program.write(server.url, tmp_path / "whole", prompts)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole" / "run")


def test_a_run_that_has_spent_its_budget_keeps_what_it_paid_for(serve, tmp_path, program):
    server = serve()  # two tokens for each prompt, four for each answer: "<number 0> by 0"
    with pytest.raises(RunFailed, match=r"the budget of tiny is spent: 1,2\d\d of 1,200 tokens"):
        program.write(server.url, tmp_path, 300, budget={"tokens": 1200})
    paid = len(server.asked)
    assert 190 <= paid < 240
    with pytest.raises(RunFailed, match="is spent"):  # the same command: nothing more
        program.write(server.url, tmp_path, 300, budget={"tokens": 1200})
    assert len(server.asked) == paid
    program.write(server.url, tmp_path, 300, budget={"tokens": 10_000})  # it goes on
    assert_whole(tmp_path / "run", 300)
    assert len(server.asked) == 300


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [({"base_url": "http://127.0.0.1:9/v1"}, ModelError, "no server of this kind"),
     ({"model": "smal"}, ModelError, "does not know the model 'smal'; did you mean 'small'"),
     ({"key_env": "KD_TEST_KEY"}, ModelError, "KD_TEST_KEY, which `key_env` names, holds no key"),
     ({"cache": __file__}, ModelError, "cache: the folder .* cannot be made"),
     ({"template": "number {{ nmber }}"}, RecipeError, "no field 'nmber'; did you mean 'number'")],
)  # fmt: skip
def test_wrong_input_is_told_and_leaves_no_folder_behind(serve, tmp_path, program, wrong, error, words):
    with pytest.raises(error, match=words):
        program.write(serve().url, tmp_path, 10, **wrong)
    assert not (tmp_path / "run").exists()


def test_the_key_is_in_no_file_of_a_run_that_failed_or_went_well(serve, tmp_path, program, monkeypatch):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(key="sk-secret-1", fault=lambda number, body: "400 sk-secret-1" if number == 9 else "ok")
    with pytest.raises(RunFailed, match=r"400 \*\*\*"):
        program.write(server.url, tmp_path, 20, key_env="KD_TEST_KEY")
    program.write(server.url, tmp_path, 20, key_env="KD_TEST_KEY")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 25
    assert [path for path in files if b"sk-secret" in path.read_bytes()] == []


def test_a_finished_corpus_is_made_again_from_the_cache_alone(serve, tmp_path, program, monkeypatch):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(key="sk-secret-1")
    program.write(server.url, tmp_path, 20, key_env="KD_TEST_KEY")
    (tmp_path / "run").rename(tmp_path / "before")
    monkeypatch.delenv("KD_TEST_KEY")
    program.write(server.url, tmp_path, 20, key_env="KD_TEST_KEY")
    assert rows(tmp_path / "run") == rows(tmp_path / "before")
    assert len(server.asked) == 20
