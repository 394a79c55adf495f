"""A corpus of 1,000 prompts from a server that fails: killed half way and resumed, on two processes, out of budget."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kdcore.errors import ModelError, RunFailed

PROGRAM = Path(__file__).parent / "corpus.py"
PROMPTS = 1000
CONCURRENCY = 32


def start(server, folder, *launcher):
    command = [sys.executable, *launcher, str(PROGRAM), server.url, str(folder), str(PROMPTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def program():
    """The program's functions, for running it in this process."""
    spec = importlib.util.spec_from_file_location("corpus_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_whole(folder, prompts=PROMPTS):
    """Every prompt is answered exactly once, in order, with its own answer."""
    from datasets import load_from_disk

    found = load_from_disk(str(folder / "stages/01-corpus/artifact/data")).to_list()
    assert [row["number"] for row in found] == list(range(prompts))
    assert all(re.fullmatch(rf"<number {row['number']}> by \d+", row["answer"]) for row in found)
    assert {row["teacher"] for row in found} == {"tiny"}


def test_killed_half_way_and_resumed_every_prompt_is_answered_exactly_once(serve, tmp_path, program, quick):
    server = serve(faults=0.15)
    echo, killed = server.answer, start(server, tmp_path)

    def kill_half_way(prompt, seed):
        if len(server.answered) == PROMPTS // 2:
            os.killpg(killed.pid, signal.SIGKILL)
        return echo(prompt, seed)

    server.answer = kill_half_way
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert PROMPTS // 2 <= len(set(server.answered)) < PROMPTS
    server.answer = echo
    assert program.write(server.url, tmp_path, PROMPTS).metrics == {"rows": PROMPTS}
    assert_whole(tmp_path / "run")
    answered = Counter(server.answered)
    assert len(answered) == PROMPTS
    assert sum(answered.values()) - PROMPTS <= CONCURRENCY  # what was under way when it was killed


def test_on_two_processes_every_prompt_is_answered_exactly_once(serve, tmp_path):
    server = serve(faults=0.15)
    two = start(server, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors[-3000:]
    assert_whole(tmp_path / "run")
    assert sorted(server.answered) == sorted(f"number {i}" for i in range(PROMPTS))


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


def test_a_run_without_a_server_leaves_no_folder_behind(tmp_path, program, free_port):
    with pytest.raises(ModelError, match="no server of this kind"):
        program.write(f"http://127.0.0.1:{free_port}/v1", tmp_path, 10)
    assert not (tmp_path / "run").exists()
