"""What can only be seen on a GPU: every method trains there, runs resume, memory runs out and is found again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import kdcore
from kdcore.diagnose import audit
from kdcore.errors import Interrupted, RunFailed
from kdcore.guards import first_not_finite
from kdcore.plugins import PluginManager
from kdcore.testing.conformance import assert_same_students, cut_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

METHODS = sorted(c.name for _, c in PluginManager().components("method") if "quickstart" in c.recipe_files())
BIG = ["student.width=64", "teacher.width=8", "teacher.train={steps: 1, batch_size: 32}", "train.steps=3",
       "data.val_fraction=0.1", "data.test_fraction=0.1", "train.batch_size=512", "train.eval_batch_size=32",
       "trackers=[]"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_method_trains_on_the_gpu_and_its_student_reloads(method, precision, tmp_path):
    recipe = cut_recipe(method)
    recipe["train"]["precision"] = precision
    result = kdcore.run(recipe, run_dir=tmp_path)
    if result.student is not None:
        assert first_not_finite(result.student.named_parameters()) is None
        _, loaded = kdcore.load_student(tmp_path)
        theirs, ours = loaded.module.state_dict(), result.student.module.state_dict()
        torch.testing.assert_close({k: v.cpu() for k, v in ours.items()}, {k: v.cpu() for k, v in theirs.items()})


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "srkl"])
def test_a_divergence_over_a_large_vocabulary_is_that_of_all_positions_at_once(name):
    from kd_llm_kd_suite.functional import DIVERGENCES
    from kd_llm_kd_suite.losses import Divergence
    from kdcore.models import Outputs

    torch.manual_seed(0)
    heads = [torch.nn.Linear(64, 50_000, bias=False, device="cuda") for _ in range(2)]
    hidden = [torch.randn(4, 512, 64, device="cuda", requires_grad=i == 0) for i in range(2)]
    labels = torch.randint(0, 50_000, (4, 512), device="cuda").masked_fill(torch.rand(4, 512).cuda() < 0.3, -100)
    kept = labels != -100
    whole = DIVERGENCES[name](heads[0](hidden[0])[kept], heads[1](hidden[1])[kept]).mean()
    wanted = [hidden[0], heads[0].weight]
    expected = torch.autograd.grad(whole, wanted)
    outputs = [Outputs(embedding=x, head=head) for x, head in zip(hidden, heads, strict=True)]
    found = Divergence(name)(*outputs, {"labels": labels})
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    for one, two in zip(torch.autograd.grad(found, wanted), expected, strict=True):
        assert (one - two).norm() < 1e-3 * two.norm()


class InterruptAt:
    def __init__(self, step: int) -> None:
        self.step = step

    @kdcore.hookimpl
    def kd_step_finished(self, stage, step):
        if stage.name == "distill" and step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_interrupted_run_ends_like_one_that_was_not(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or two runs differ, interrupted or not
    recipe = cut_recipe("kd")
    recipe["train"]["precision"] = precision
    whole = kdcore.run(recipe, run_dir=tmp_path / "whole")
    manager = kdcore.PluginManager()
    manager.register(InterruptAt(3), name="interrupt")
    with pytest.raises(Interrupted):
        kdcore.run(recipe, run_dir=tmp_path / "cut", plugins=manager)
    assert_same_students(whole.path, kdcore.run(recipe, run_dir=tmp_path / "cut").path, tolerance=1e-3)


@pytest.fixture
def little_memory():
    """Not enough for a whole batch of a wide network, enough for a part of it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield lambda gib: torch.cuda.set_per_process_memory_fraction(
        gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_without_memory_the_run_says_how_much_there_was_and_halving_finds_it(little_memory, tmp_path):
    whole = kdcore.run("kd", BIG, run_dir=tmp_path / "whole")
    need = torch.cuda.max_memory_allocated() / 2**30
    del whole
    little_memory(0.6 * need)
    with pytest.raises(RunFailed, match=r"out of memory on cuda(:0)? at step \d with 512 samples.*peak .* GiB.*on_oom"):
        kdcore.run("kd", BIG, run_dir=tmp_path / "stopped")
    result = kdcore.run("kd", [*BIG, "train.on_oom=halve"], run_dir=tmp_path / "halved")
    assert Path(result.path, "student").is_dir()


def test_an_audit_compares_two_runs(tmp_path):
    found = audit("kd", ["train.batch_size=32", "trackers=[]"], steps=3)
    print(found)
    assert found.values > 100
