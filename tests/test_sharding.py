"""FSDP2 on two processes: the same students as on one, resumed by any number of processes; each holds its part only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import kdcore
from kdcore.testing.conformance import assert_same_students

SMALL = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 2,
         "eos_token_id": 3, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "tie_word_embeddings": True}  # fmt: skip
LM = {
    "method": "distill", "trackers": [], "losses": [{"use": "cross-entropy"}, {"use": "fkl"}],
    "data": {"use": "sentences", "prompt": 2, "train": 128, "val": 24}, "eval": {"metrics": ["perplexity"]},
    "teacher": {"use": "transformers", "train": {"steps": 2}, "config": {**SMALL, "hidden_size": 64}},
    "student": {"use": "transformers", "config": SMALL},
    "train": {"steps": 24, "batch_size": 16, "save_every": 8, "log_every": 1, "clip_norm": 1.0,
              "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
}  # fmt: skip
DIVIDED = """
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import kdcore
from kdcore import Model, hookimpl


class Look:
    @hookimpl
    def kd_step_finished(self, run, stage):
        world = run.accelerator.num_processes
        for root in (stage, stage.teachers["teacher"].module.model.layers):  # what is around them stays for the losses
            whole = sum(p.numel() for p in root.parameters())
            held = sum(p.to_local().numel() for p in root.parameters())
            assert all(isinstance(p, DTensor) for p in root.parameters())
            assert 0.4 < held / whole < 0.6, held / whole
        blocks = [name for name, part in stage.named_modules() if type(part).__name__.startswith("FSDP")]
        assert len(blocks) == 1 + 2, blocks  # the stage, and each layer of the student
        open(f"looked-{run.accelerator.process_index}", "w").close()


manager = kdcore.PluginManager()
manager.register(Look())
recipe = {RECIPE}
kdcore.run(recipe, ["train.steps=1"], run_dir="run", plugins=manager)
student = kdcore.load_student("run")[1]
assert type(student.module).__name__ == "LlamaForCausalLM"
assert not any(isinstance(p, DTensor) for p in student.parameters())
"""


REFUSED = """
import os
import sys

import torch
from torch import nn

import kdcore
from kdcore import Component, Distill, Loss, Method, Model, Roles, hookimpl
from kdcore.errors import RecipeError
from kdcore.losses import Weighted

kind = ""


class Scaled(Loss):
    def __init__(self, options=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0) if kind == "scalar" else torch.ones(1))

    def forward(self, student, teacher, batch):
        return (self.scale * student.logits).square().mean()


class Says(Distill):
    shardable = False


class Scale(Method):
    roles = Roles()
    stage_names = ("scale",)

    def stages(self, run):
        student = run.student
        if kind == "closure":
            student = Model(student.module, lambda module, batch: run.student(batch), labels=student.labels)
        stage = Says if kind == "says" else Distill
        yield stage(student, [Weighted(Scaled(), name="scaled")], run.teacher, name="scale")


class Plugin:
    @hookimpl
    def kd_register_methods(self):
        return [Component("method", "scale", target=Scale, summary="scales")]


manager = kdcore.PluginManager()
manager.register(Plugin())
recipe = {**{RECIPE}, "method": "scale", "losses": []}
for kind in sys.argv[1:]:
    try:
        kdcore.run(recipe, run_dir="run-" + kind, plugins=manager)
    except RecipeError as error:
        open(f"said-{kind}-{os.environ['RANK']}", "w").write(str(error))
"""


def recipe(path: str, **train: object) -> str:
    Path(path).write_text(yaml.safe_dump({**LM, "train": {**LM["train"], **train}}))
    return path


def on_two(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of one process."""
    path = tmp_path_factory.mktemp("whole") / "run"
    kdcore.run(LM, run_dir=path)
    return path


@pytest.mark.parametrize("shard", ["student", "all"])
def test_a_language_model_in_parts_learns_what_it_learns_whole(kd_process, here, whole, shard):
    done = kd_process("run", recipe("lm.yaml", shard=shard), "--run-dir", "parts", "--json", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert_same_students(whole, here / "parts", tolerance=1e-5)
    for ours, theirs in zip(journal(here / "parts"), journal(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def journal(run: Path) -> list[dict[str, float]]:
    """The numbers of each row."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**row.get("terms", {}), **row.get("metrics", {}), "norm": row.get("gradient_norm") or 0.0} for row in rows]


def test_texts_of_a_student_in_parts_differ_in_length(kd_process, here):
    """On-policy: every process writes its own texts, from whole weights."""
    given = ["data.train=32", "data.val=8", "data.test=8", "train.steps=3", "train.batch_size=8", "method.lmbda=1.0",
             "teacher.train={steps: 2}", "train.optimizer={name: sgd, lr: 0.003}"]  # fmt: skip
    for name, more in (("whole", []), ("parts", ["train.shard=all"])):
        done = kd_process("run", "llm-kd-suite", *given, "--run-dir", name, "--json", "--processes", "2", *more)
        assert done.returncode == 0, done.stderr
    assert_same_students(here / "whole", here / "parts", tolerance=1e-5)


def test_batch_norm_and_adam_in_parts(kd_process, here):
    for name, more in (("whole", []), ("parts", ["train.shard=student"])):
        done = kd_process("run", "kd", "train.steps=5", "teacher.train.steps=3", "--run-dir", name, "--json",
                          "--processes", "2", *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert_same_students(here / "whole", here / "parts", tolerance=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_in_parts_goes_on_after_a_kill_on_any_number_of_processes(kd_process, here, whole, before, after):
    path = recipe("lm.yaml", shard="all")
    run = [sys.executable, "-m", "kd_cli", "run", path, "--json", "--run-dir"]
    process = subprocess.Popen([*run, "killed", "--processes", str(before)], start_new_session=True)
    saved = Path("killed/stages/02-distill/checkpoints")
    end = time.monotonic() + 120
    while not list(saved.glob("step-*[0-9]")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path("killed/student").exists()
    done = kd_process("run", path, "--run-dir", "killed", "--json", "--processes", str(after), "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_students(whole, here / "killed", tolerance=1e-5)


def test_each_process_holds_its_part_and_the_run_ends_with_the_whole(here):
    given = {**LM, "train": {**LM["train"], "shard": "all"}}
    given["teacher"] = {key: value for key, value in LM["teacher"].items() if key != "train"}
    Path("divided.py").write_text(DIVIDED.replace("{RECIPE}", repr(given)))
    on_two("divided.py")
    assert [Path(f"looked-{rank}").exists() for rank in (0, 1)] == [True, True]


def test_what_cannot_be_in_parts_is_told(here):
    """A scalar parameter, a stage that says so, and a model whose call leads to the original of what was copied."""
    given = {**LM, "train": {**LM["train"], "shard": "all", "steps": 1}}
    given["teacher"] = {key: value for key, value in LM["teacher"].items() if key != "train"}
    told = {"scalar": "cannot be divided: .*scalar", "closure": "no gradient reached 'student", "says": "by themselves"}
    Path("refused.py").write_text(REFUSED.replace("{RECIPE}", repr(given)))
    on_two("refused.py", *told)
    for kind, message in told.items():
        for rank in (0, 1):
            assert re.search(message, Path(f"said-{kind}-{rank}").read_text())


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_what_else_divides_weights_is_refused(kd_process, here, way):
    done = kd_process("run", "quickstart", "--run-dir", "run", **{f"ACCELERATE_USE_{way}": "true"})
    assert done.returncode == 2
    assert f"Accelerate is configured for {way}" in done.stderr
    assert "train.shard=all" in done.stderr
