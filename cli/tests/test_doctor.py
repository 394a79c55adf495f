from __future__ import annotations

import json

import kd_cli.main
from kd_cli import doctor
from kdcore import Component, PluginManager, hookimpl


def test_a_sound_installation_ends_with_0(kd):
    result = kd("doctor")
    assert result.exit_code == 0, result.output
    assert "kd-toy 0.1.0" in result.stdout
    assert "CPU threads" in result.stdout
    assert "all is well" in result.stdout


def test_a_broken_plugin_and_a_wrong_core_version_are_problems_with_their_cause(kd, broken_site, install, monkeypatch):
    install(broken_site, "kd-future", "future = kd_toy.plugin", requires="kdcore>=99")
    monkeypatch.syspath_prepend(broken_site)
    monkeypatch.setenv("KD_PLUGINS", "toy,broken,future")
    result = kd("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    states = {plugin["plugin"]: plugin["error"] for plugin in report["plugins"]}
    assert states["toy"] is None
    assert states["broken"] == "RuntimeError: it does not work here"
    assert "kdcore>=99" in states["future"]
    assert len(report["problems"]) == 2
    assert "problem: plugin broken (kd-broken 0.1.0): RuntimeError" in kd("doctor").stderr


def test_a_name_offered_twice_is_a_problem(kd, monkeypatch):
    class Other:
        @hookimpl
        def kd_register_methods(self):
            return [Component("method", "toy", target=dict)]

    manager = PluginManager()
    manager.register(Other(), name="other")
    monkeypatch.setattr(kd_cli.main, "make_manager", lambda no_plugins: manager)
    result = kd("doctor", "--json")
    assert result.exit_code == 1
    assert "write 'kd-toy:toy'" in json.loads(result.stdout)["problems"][0]


def test_a_torchvision_that_does_not_import_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problems: list[str] = []
    doctor._check_torchvision(problems)
    assert "operator torchvision::nms does not exist" in problems[0]


def test_a_core_out_of_range_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["kdcore<0.0.1,>=0.0", "rich>=13"])
    problems: list[str] = []
    doctor._check_core_range(problems)
    assert len(problems) == 1
    assert "kd-cli needs kdcore<0.0.1" in problems[0]


def test_an_audit_says_that_two_runs_are_the_same(kd):
    result = kd("doctor", "--determinism", "toy", "--steps", "2", "train.epochs=1")
    assert result.exit_code == 0, result.stderr
    assert "values of both runs are the same, bit for bit" in result.stdout


def test_a_replay_shows_where_a_number_went_wrong(kd):
    assert kd("run", "toy", "train.optimizer={name: sgd, lr: 1e30}", "--run-dir", "bad").exit_code == 1
    result = kd("doctor", "--replay", "bad")
    assert result.exit_code == 1
    assert "first module" in result.stdout
    assert "parameter after it" in result.stdout
    assert kd("doctor", "--replay", "nowhere").exit_code == 2
