"""What every plugin has to hold. In a plugin's `tests/test_conformance.py`:

    from kdcore.testing import conformance

    TestConformance = conformance("kd-myplugin")

The quickstart of each method is run here cut to a few steps, in one process; `effect` runs it whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore import api
from kdcore.components import Component
from kdcore.errors import Interrupted, RecipeError
from kdcore.hookspecs import ENTRY_POINT_GROUP, hookimpl
from kdcore.plugins import PluginInfo, PluginManager
from kdcore.recipe import find_recipe, load
from kdcore.runner import Result
from kdcore.stages import Method

STEPS = 6


def conformance(distribution: str, manager: PluginManager | None = None) -> type:
    """The suite for one installed distribution, as a class for pytest to collect."""
    infos = [i for i in (manager or PluginManager()).plugins() if i.distribution == distribution]
    components = [c for info in infos for c in info.components]
    methods = [c.name for c in components if c.kind == "method" and "quickstart" in c.recipe_files()]
    tests: dict[str, Any] = {
        f"test{test.__name__}": staticmethod(test)
        for test in (_runs_again_the_same, _resumes_bit_for_bit, _student_reloads, _paper_recipe_plans)
        if methods
    }
    facts = {"distribution": distribution, "infos": infos, "components": components, "methods": methods}
    return type(f"Test{distribution.title().replace('-', '')}", (_Plugin,), {**facts, **tests})


class _Plugin:
    distribution: str
    infos: Sequence[PluginInfo]
    components: Sequence[Component]
    methods: Sequence[str]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "method" in metafunc.fixturenames:
            metafunc.parametrize("method", self.methods)

    def test_loads_without_error(self) -> None:
        assert self.infos, f"{self.distribution} has no entry point in the group {ENTRY_POINT_GROUP!r}"
        assert [i.error for i in self.infos] == [None] * len(self.infos)

    def test_hooks_and_options_import_no_torch(self) -> None:
        dist = importlib.metadata.distribution(self.distribution)
        modules = [e.module for e in dist.entry_points if e.group == ENTRY_POINT_GROUP]
        modules += [c.options.partition(":")[0] for c in self.components if isinstance(c.options, str)]
        code = f"import sys, {', '.join(sorted(set(modules)))}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, f"{modules} import torch"

    def test_metadata_is_complete(self) -> None:
        metadata = importlib.metadata.metadata(self.distribution)
        assert metadata["Summary"]
        assert metadata["License-Expression"] or metadata["License"]
        assert any(r.startswith("kdcore") for r in metadata.get_all("Requires-Dist") or ())
        for component in self.components:
            assert component.summary, f"{component.kind} {component.name} has no summary"
            assert component.tags, f"{component.kind} {component.name} has no tags"

    def test_every_option_is_documented_and_methods_and_losses_need_none(self) -> None:
        for component in self.components:
            model = component.load_options()
            for name, field in (model.model_fields if model else {}).items():
                assert field.description, f"{component.kind} {component.name}: option {name} has no description"
                if component.kind in ("method", "loss"):
                    assert not field.is_required(), f"{component.kind} {component.name}: option {name} has no default"

    def test_targets_load(self) -> None:
        for component in self.components:
            assert callable(component.load_target())

    def test_methods_ship_a_quickstart_and_a_paper_recipe(self) -> None:
        for component in self.components:
            if component.kind == "method" and component.paper:
                assert {"quickstart", "paper"} <= set(component.recipe_files()), component.name

    def test_wrong_options_are_named(self) -> None:
        for method in self.methods:
            with pytest.raises(RecipeError, match=r"no_such_option"):
                api.plan(method, ["method.no_such_option=1"])

    def test_two_processes_match_one(self, tmp_path: Path) -> None:
        """BatchNorm runs on its stored statistics and nothing is dropped out: these cannot be equal (see the docs)."""
        if not self.methods:
            pytest.skip("the plugin has no methods")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "-m", "kdcore.testing.worker", str(tmp_path / "two"), *self.methods]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        run_all(tmp_path / "one", self.methods)
        for method in self.methods:
            assert_same_students(tmp_path / "one" / method, tmp_path / "two" / method, tolerance=1e-5)


def _runs_again_the_same(method: str, tmp_path: Path) -> None:
    first, second = (run_cut(method, tmp_path / name) for name in ("a", "b"))
    assert first.metrics == second.metrics
    assert_same_students(first.path, second.path)


def _resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole = run_cut(method, tmp_path / "whole")
    for stop in (3, 2):  # steps of each session, counted over all stages
        manager = PluginManager()
        manager.register(_InterruptAt(stop), name="interrupt")
        with pytest.raises(Interrupted):
            run_cut(method, tmp_path / "stopped", manager)
    resumed = run_cut(method, tmp_path / "stopped")
    assert resumed.metrics == whole.metrics
    assert_same_students(whole.path, resumed.path)
    assert (whole.path / "metrics.jsonl").read_text() == (resumed.path / "metrics.jsonl").read_text()
    assert not list(resumed.path.rglob("*.tmp"))


def _student_reloads(method: str, tmp_path: Path) -> None:
    result = run_cut(method, tmp_path / "run")
    if result.student is None:
        pytest.skip("the method has no student of the role `student`")
    run, loaded = api.load_student(result.path)
    batch = run.data.sample(run.method.roles.splits[0])
    with torch.no_grad():
        ours, theirs = result.student.eval()(batch), loaded.eval()(batch)
    given = [name for name in ("logits", "embedding", "extras") if getattr(ours, name) not in (None, {})]
    assert given, "the student gives no signal"
    for name in given:  # of the same weights: kernels may round differently where memory is laid out differently
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
    weights = (model.module.state_dict() for model in (result.student, loaded))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def _paper_recipe_plans(method: str) -> None:
    if "paper" in PluginManager().get("method", method).recipe_files():
        assert api.plan(f"{method}/paper").resolved.recipe.method.use == method


class _InterruptAt:
    """Sends SIGINT to this process when the run has taken so many steps in this session."""

    def __init__(self, step: int) -> None:
        self.left = step

    @hookimpl
    def kd_step_finished(self, step: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def cut_recipe(method: str) -> dict[str, Any]:
    """The quickstart of a method, shortened to a few steps per stage."""
    manager = PluginManager()
    target = cast(type[Method], manager.get("method", method).load_target())
    cut = [f"{key}={json.dumps(value)}" for key, value in target.cut.items()]
    recipe = load(str(find_recipe(method, manager)[0]), cut)
    train = recipe.setdefault("train", {})
    train.update(steps=STEPS, save_every=2, eval_every=STEPS, log_every=2)
    train.pop("epochs", None)
    roles = [recipe.get(key) for key in ("teacher", "student")]
    roles += [spec for key in ("teachers", "students") for spec in (recipe.get(key) or {}).values()]
    for role in roles:
        if isinstance(role, dict) and role.get("train"):
            role["train"] = {**(role["train"] if isinstance(role["train"], dict) else {}), "steps": 3}
    for stage in (recipe.get("stages") or {}).values():
        stage.setdefault("train", {})["steps"] = STEPS
    return recipe


def run_all(folder: Path, methods: Sequence[str]) -> None:
    """Run shortened quickstarts, each in a folder of its name, without what differs between processes by nature."""
    with pytest.MonkeyPatch.context() as patch:
        for layer in (_BatchNorm, torch.nn.Dropout):
            patch.setattr(layer, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
        for method in methods:
            recipe = cut_recipe(method)
            recipe["train"]["optimizer"] = {"name": "sgd", "lr": 0.003}  # Adam blows up rounding of tiny gradients
            api.run(recipe, run_dir=folder / method)


def run_cut(method: str, path: Path, manager: PluginManager | None = None) -> Result:
    """Run the shortened quickstart."""
    return api.run(cut_recipe(method), run_dir=path, plugins=manager)


def effect(method: str, where: Path, seeds: Sequence[int] = (0, 1, 2)) -> float:
    """How much better a method's quickstart is than its own ablation: the difference of the mean of the first metric
    over seeds, positive if the method is better. Models that the recipe trains first are trained once per seed."""
    target = cast(type[Method], PluginManager().get("method", method).load_target())
    overrides = [f"{key}={value}" for key, value in target.ablation.items()]
    assert overrides, f"{method} names no ablation"
    scores: dict[str, list[float]] = {"method": [], "ablation": []}
    sign = 1.0
    for seed in seeds:
        shared: list[str] = [f"seed={seed}", "train.log_every=1000"]
        for name, more in (("method", []), ("ablation", overrides)):
            result = api.run(method, [*shared, *more], run_dir=where / f"{name}-{seed}")
            shared += [] if more else _trained_teachers(result.path)
            value = next(iter(result.metrics.values()))
            sign = 1.0 if json.loads((result.path / "run.json").read_text())["higher_is_better"] else -1.0
            scores[name].append(value)
    return sign * (statistics.mean(scores["method"]) - statistics.mean(scores["ablation"]))


def _trained_teachers(path: Path) -> list[str]:
    """Overrides that take the teachers that a run trained from its folder instead of training them again."""
    recipe = load(path / "recipe.yaml")
    found = []
    for role, spec in (recipe.get("teachers") or {}).items():
        if spec.get("train") is not None:
            (stage,) = (path / "stages").glob(f"*-{role}")
            found += [f"teachers.{role}.train=false", f"teachers.{role}.checkpoint={stage / 'artifact' / role}"]
    return found


def assert_same_students(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """The saved students of two runs hold the same tensors."""
    from safetensors.torch import load_file

    folders = [sorted(p for p in path.glob("student*/**/*.safetensors")) for path in (one, two)]
    assert folders[0]
    assert len(folders[0]) == len(folders[1])
    for a, b in zip(*folders, strict=True):
        first, second = load_file(a), load_file(b)
        assert first.keys() == second.keys()
        for key in first:
            got, wanted = first[key].double(), second[key].double()
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=f"{key} differs")
