"""Several processes: shares of unequal size give what one process gives, and what goes wrong in one ends all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kdcore.testing.conformance import assert_same_students

VIT = ["teacher.use=demo-vit", "student.use=demo-vit", "teacher.width=16", "student.width=8"]
ODD = ["data.train_fraction=0.05", "train.batch_size=64", "train.steps=4", "train.optimizer={name: sgd, lr: 0.01}",
       "teacher.train={steps: 4}"]  # fmt: skip
APART = """
import sys
from pathlib import Path

import kdcore
from kdcore.errors import DataError, Interrupted, RunFailed
from kdcore.runner import Run

wrong = {"data": DataError("no such column"), "value": ValueError("broken"), "ctrl-c": KeyboardInterrupt()}[sys.argv[1]]
resolved = kdcore.plan("kd", ["trackers=[]"]).resolved
run = Run(resolved, kdcore.PluginManager(), Path("unused"))
try:
    with run.together():
        if run.accelerator.process_index == 1:
            raise wrong
except BaseException as error:
    Path(f"said-{run.accelerator.process_index}").write_text(f"{type(error).__name__}: {error}")
"""

GATHERED = """
import sys

import torch
from torch import distributed

from kdcore.processes import gather_with_grad

distributed.init_process_group("gloo")
rank = distributed.get_rank()
x = torch.arange(24.0).view(2, 3, 4).add(100 * rank).requires_grad_()
weights = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0))
loss = (gather_with_grad(x).transpose(1, 2) ** 2 * weights).sum() / 2  # its gradient is laid out the other way round
loss.backward()
wanted = 2 * x.detach() * weights.transpose(1, 2)[2 * rank : 2 * rank + 2]
torch.testing.assert_close(x.grad, wanted)  # half of the sum over two processes
"""


def test_a_split_that_is_smaller_than_a_batch_and_odd_gives_what_one_process_gives(kd_process, here):
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        done = kd_process("run", "rkd", *VIT, *ODD, "--run-dir", name, "--json", *more)
        assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(name, "run.json").read_text()) for name in ("one", "two"))
    assert [run["hardware"]["processes"] for run in (one, two)] == [1, 2]
    assert_same_students(here / "one", here / "two", tolerance=1e-5)


def test_what_goes_wrong_in_one_process_is_told_to_all(here):
    told = {
        "data": ["DataError: no such column"] * 2,
        "ctrl-c": ["Interrupted: process 1 was interrupted", "KeyboardInterrupt: "],
        "value": ["RunFailed: process 1 failed: ValueError: broken", "ValueError: broken"],
    }
    Path("apart.py").write_text(APART)
    for kind, said in told.items():
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "apart.py",
            kind,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert [Path(f"said-{rank}").read_text() for rank in (0, 1)] == said


def test_gathered_tensors_get_their_gradient_however_it_lies_in_memory(here):
    Path("gathered.py").write_text(GATHERED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "gathered.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
