"""Texts written in training are the same on two processes as on one, and so is the student."""

import os
import subprocess
import sys

import pytest

from kdcore.testing.conformance import assert_same_students

SMALL = ["data.train=64", "data.val=16", "teacher.train.epochs=1", "method.sft_epochs=0", "train.steps=5",
         "train.batch_size=8", "method.answers=4", "method.max_new_tokens=6", "train.optimizer.name=sgd",
         "method.candidates=2", "trackers=[]"]  # fmt: skip


@pytest.mark.parametrize("more", [
    ["method.algorithm=minillm"],
    ["method.algorithm=rm_rl", "method.elicit=feedback"],
])  # fmt: skip
def test_two_processes_give_the_student_of_one(more, tmp_path):
    for name, processes in (("one", []), ("two", ["--processes", "2"])):
        command = [sys.executable, "-m", "kd_cli", "run", "llm-kd-suite", *SMALL, *more, *processes,
                   "--run-dir", str(tmp_path / name)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_students(tmp_path / "one", tmp_path / "two", tolerance=1e-6)
