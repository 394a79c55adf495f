"""Distributions broken in every way, really installed: each is named with its cause, and harms nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import kdcore
from kdcore.testing import conformance
from kdcore.testing.conformance import assert_same_students

MINE = """
method: distill
student: {use: demo-cnn, width: 2}
data: digits
losses: [cross-entropy]
train: {steps: 3, batch_size: 8}
trackers: []
"""
IMPORTS = "from kdcore import Component, hookimpl\n\n\n"


@dataclass(frozen=True)
class Broken:
    source: str
    cause: str
    entry: str = ""
    requires: str = "kdcore"


def hook(body: str, signature: str = "kd_register_losses()", imports: str = IMPORTS) -> str:
    return f"{imports}@hookimpl\ndef {signature}:\n    {body}\n"


def offers(kind: str, name: str, options: str | None = None) -> str:
    body = f"return [Component({kind!r}, {name!r}, target='builtins:print', options={options!r}, summary='odd')]"
    return hook(body, "kd_register_data()" if kind == "data" else "kd_register_losses()")


BROKEN = {
    "import-error": Broken("raise ImportError('libodd.so.3: cannot open')", "ImportError: libodd.so.3: cannot open"),
    "missing-dependency": Broken("import nobody_has_this", "No module named 'nobody_has_this'"),
    "syntax": Broken("def :", "SyntaxError: invalid syntax"),
    "exits": Broken("raise SystemExit('no licence')", "SystemExit: no licence"),
    "recursion": Broken("def down():\n    down()\n\n\ndown()\n", "RecursionError: maximum recursion depth exceeded"),
    "raises": Broken(hook("raise ValueError('the table is gone')"), "ValueError: the table is gone"),
    "raises-halfway": Broken(hook("yield Component('loss', 'half', target=print)\n    1 / 0"), "ZeroDivisionError"),
    "none": Broken(hook("return None"), "must return a list of components, not NoneType"),
    "string": Broken(hook("return 'loss'"), "must return a list of components, not str"),
    "numbers": Broken(hook("return [1, 2]"), "returned a int, not a kdcore.Component"),
    "wrong-kind": Broken(
        hook("return [Component('data', 'odd', target=print)]"), "returned 'odd' of kind 'data', not 'loss'"
    ),
    "bad-name": Broken(hook("return [Component('loss', 'Odd One', target=print)]"), "use lower case letters"),
    "misspelt": Broken(hook("return []", "kd_register_loses()"), "did you mean 'kd_register_losses'"),
    "arguments": Broken(hook("return []", "kd_register_losses(recipe)"), "{'recipe'}"),
    "future": Broken(offers("loss", "future"), "it needs kdcore>=9, but this is kdcore", requires="kdcore>=9"),
    "requirement": Broken(offers("loss", "unread"), "InvalidRequirement", requires="kdcore ((("),
    "no-module": Broken("", "No module named 'odd_nowhere'", entry="odd-no-module = odd_nowhere.plugin"),
    "no-attribute": Broken("", "has no attribute 'plugin'", entry="odd-no-attribute = odd_no_attribute:plugin"),
}
"""What is broken, and the cause that is to be told."""

WORKING = {
    "torch": hook("return []", imports=f"import torch\n\n{IMPORTS}"),
    "twin": offers("loss", "kd"),
    "given": offers("data", "given"),
    "namesake": offers("loss", "namesake"),
    "options": offers("loss", "odd-options", options="odd_options.options:Odd"),
    "endless": offers("loss", "odd-endless", options="odd_endless.options:Endless"),
    "target": hook("return [Component('loss', 'odd-target', 'odd_target.nowhere:Odd', summary='odd')]"),
    "observer": hook("raise RuntimeError('the tracker is down')", "kd_step_finished(run, step)"),
}
"""What is admitted, and shows its faults later or not at all."""

ENDLESS = """
from pydantic import model_validator
from kdcore.options import Options


class Endless(Options):
    depth: int = 0

    @model_validator(mode="after")
    def _again(self):
        type(self)(depth=self.depth + 1)
        return self
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, install) -> Path:
    """All of them at once, in one folder."""
    folder = tmp_path_factory.mktemp("site")
    for name, broken in BROKEN.items():
        install(folder, f"odd-{name}", broken.source, entry=broken.entry, requires=broken.requires)
    for name, source in WORKING.items():
        entry = "demo = odd_namesake" if name == "namesake" else ""
        options = ENDLESS if name == "endless" else "raise RuntimeError('options need a GPU')"
        install(folder, f"odd-{name}", source, entry=entry, options=options)
    return folder


@pytest.fixture
def installed(here, site, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    Path("mine.yaml").write_text(MINE)
    return site


def test_the_list_carries_every_broken_plugin_with_distribution_and_cause(kd_process, installed):
    alone = json.loads(kd_process("list", "--json", PYTHONPATH="").stdout)
    done = kd_process("list", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert {b["plugin"]: (b["distribution"], b["version"]) for b in found["broken"]} == {
        f"odd-{name}": (f"odd-{name}", "1.0") for name in BROKEN
    }
    errors = {b["plugin"].removeprefix("odd-"): b["error"] for b in found["broken"]}
    assert [name for name, broken in BROKEN.items() if broken.cause not in errors[name]] == []
    assert alone["broken"] == []
    assert [c for c in alone["components"] if c not in found["components"]] == []
    more = {(c["kind"], c["name"]) for c in found["components"] if c["distribution"].startswith("odd-")}
    assert more == {
        ("loss", "kd"),
        ("data", "given"),
        *(("loss", n) for n in ("namesake", "odd-endless", "odd-options", "odd-target")),
    }


def test_the_table_names_each_broken_plugin_and_its_cause(kd, installed):
    result = kd("list")
    assert result.exit_code == 0
    told = result.stderr.split("broken plugin: ")
    for name, broken in BROKEN.items():
        (one,) = [text for text in told if text.startswith(f"odd-{name} (odd-{name} 1.0): ")]
        assert broken.cause in one
    assert "Traceback" not in result.output
    assert "kd-classic:kd" in result.stdout
    assert "odd-twin:kd" in result.stdout


def test_the_doctor_names_every_broken_plugin_and_every_clash_and_ends_with_1(kd_process, installed):
    done = kd_process("doctor", "--json")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    problems = json.loads(done.stdout)["problems"]
    for name, broken in BROKEN.items():
        (problem,) = [p for p in problems if p.startswith(f"plugin odd-{name} (odd-{name} 1.0): ")]
        assert broken.cause in problem
    assert [p for p in problems if "loss 'kd' is offered by kd-classic and odd-twin" in p]


def test_a_run_without_them_is_the_same_run(kd, installed, monkeypatch):
    assert kd("run", "mine.yaml", "--run-dir", "among").exit_code == 0
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(installed)])
    assert "odd-" not in kd("list", "--json").stdout
    assert kd("run", "mine.yaml", "--run-dir", "alone").exit_code == 0
    assert_same_students(Path("among"), Path("alone"))


@pytest.mark.parametrize("name", BROKEN)
def test_asking_for_a_component_of_it_tells_the_cause(kd, installed, name):
    for command in (("show", f"odd-{name}:half"), ("run", "mine.yaml", f"losses=[{{use: 'odd-{name}:half'}}]")):
        result = kd(*command)
        assert result.exit_code == 2
        assert f"odd-{name} (odd-{name}): " in result.stderr
        assert BROKEN[name].cause in result.stderr
        assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


def test_a_name_taken_twice_is_settled_by_the_distribution(kd, installed):
    refused = kd("run", "mine.yaml", "teacher=demo-cnn", "losses=[kd]")
    assert refused.exit_code == 2
    assert "'kd-classic:kd' or 'odd-twin:kd'" in refused.stderr
    assert not Path("runs").exists()
    assert kd("run", "mine.yaml", "teacher=demo-cnn", "losses=['kd-classic:kd']").exit_code == 0
    assert kd("show", "odd-twin:kd").exit_code == 0


def test_a_namesake_of_a_plugin_hides_neither(installed):
    found = {info.distribution for info, _ in kdcore.PluginManager().components()}
    assert {"kd-demo", "odd-namesake"} <= found


@pytest.mark.parametrize(
    ("loss", "cause"),
    [("odd-options", "RuntimeError: options need a GPU"), ("odd-target", "No module named 'odd_target.nowhere'")],
)
def test_a_component_that_cannot_be_loaded_is_told_when_it_is_used(kd, installed, loss, cause):
    result = kd("run", "mine.yaml", f"losses=[{loss}]")
    assert result.exit_code == 2
    assert f"loss '{loss}': cannot load" in result.stderr
    assert cause in result.stderr
    assert "Traceback" not in result.stderr


def test_options_that_cannot_be_loaded_can_still_be_asked_about(kd, installed):
    result = kd("show", "odd-options")
    assert result.exit_code == 0
    assert "options need a GPU" in result.stdout


def test_an_observer_that_raises_is_named_once_and_the_run_goes_on(kd, installed):
    result = kd("run", "mine.yaml")
    assert result.exit_code == 0
    assert result.stderr.count("odd-observer") == 1
    assert "failed in kd_step_finished" in result.stderr
    assert "RuntimeError: the tracker is down" in result.stderr


def test_options_that_recurse_for_ever_are_told_at_their_key(kd, installed):
    result = kd("run", "mine.yaml", "losses=[{use: odd-endless, depth: 1}]")
    assert result.exit_code == 2
    assert "losses.0: the options of 'odd-endless' fail: RecursionError" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_doctor_names_a_plugin_that_imports_torch(kd_process, installed):
    problems = json.loads(kd_process("doctor", "--json", KD_PLUGINS="odd-torch,odd-options").stdout)["problems"]
    assert problems == ["plugin odd-torch (odd-torch 1.0): it imports torch when it is loaded, for which every command "
                        "of kd waits"]  # fmt: skip


def test_a_plugin_that_imports_torch_is_found_by_conformance(installed):
    suite = conformance("odd-torch")()
    suite.test_loads_without_error()
    with pytest.raises(AssertionError, match=r"\['odd_torch'\] import torch"):
        suite.test_hooks_and_options_import_no_torch()


def test_a_name_that_the_core_gives_itself_may_be_taken(installed):
    data = [(torch.rand(4), i % 3) for i in range(8)]
    result = kdcore.distill(nn.Linear(4, 3), nn.Linear(4, 3), data, train={"steps": 2, "batch_size": 4})
    assert (result.path / "student" / "model.safetensors").is_file()


def test_what_is_switched_off_is_not_imported(kd, installed, monkeypatch):
    assert json.loads(kd("--no-plugins", "list", "--json").stdout) == {"components": [], "broken": []}
    monkeypatch.setenv("KD_PLUGINS", "kd-classic,odd-none")
    found = json.loads(kd("list", "--json").stdout)
    assert {c["distribution"] for c in found["components"]} == {"kd-classic"}
    assert [b["plugin"] for b in found["broken"]] == ["odd-none"]
    monkeypatch.setenv("KD_DISABLE_PLUGINS", "odd-none")
    assert json.loads(kd("list", "--json").stdout)["broken"] == []


def test_an_unreadable_list_of_entry_points_hides_no_other_plugin(kd, here, tmp_path, install, monkeypatch):
    install(tmp_path / "site", "odd-list", "", entry="no equals sign")
    monkeypatch.syspath_prepend(tmp_path / "site")
    result = kd("list", "--json")
    assert result.exit_code == 0, result.stderr
    assert "kd-classic" in result.stdout
