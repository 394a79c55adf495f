from __future__ import annotations

import json
import subprocess
import sys

import pytest

import kd_cli.main
from kdcore import Component, PluginManager, hookimpl

HEAVY = ("torch", "numpy", "yaml", "omegaconf", "pandas", "matplotlib", "accelerate", "kdcore.options")


@pytest.mark.parametrize("kind", ["method", "methods", "Method"])
def test_kinds_may_be_singular_or_plural(kd, kind):
    result = kd("list", kind)
    assert result.exit_code == 0
    assert "match [logits]" in result.stdout
    assert "toy-points" not in result.stdout


def test_an_unknown_kind_names_the_nearest(kd):
    result = kd("list", "metods")
    assert result.exit_code == 2
    assert "did you mean 'methods'" in result.stderr


def test_tags_filter(kd):
    names = [c["name"] for c in json.loads(kd("list", "--tag", "toy", "--json").stdout)["components"]]
    assert names == ["toy-points", "toy"]
    assert "did you mean 'toy'" in kd("list", "--tag", "toys").stderr


def test_each_component_is_one_line_where_the_output_is_no_terminal(kd):
    lines = kd("list").stdout.splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["method", "toy", "match", "[logits]", "toy", "kd-toy", "0.1.0"]


def test_a_broken_plugin_is_listed_with_its_cause_and_hides_nothing(kd, broken_site, monkeypatch):
    monkeypatch.syspath_prepend(broken_site)
    result = kd("list")
    assert result.exit_code == 0
    assert "toy-points" in result.stdout
    assert "kd-broken 0.1.0): RuntimeError: it does not work here" in result.stderr
    assert json.loads(kd("list", "--json").stdout)["broken"][0]["distribution"] == "kd-broken"


def test_without_plugins_it_says_how_to_get_some(kd):
    result = kd("--no-plugins", "list")
    assert result.exit_code == 0
    assert "pip install" in result.stderr


def test_names_that_two_plugins_offer_are_written_in_full(kd, monkeypatch):
    class Other:
        @hookimpl
        def kd_register_methods(self):
            return [Component("method", "toy", target=dict)]

    manager = PluginManager()
    manager.register(Other(), name="other")
    monkeypatch.setattr(kd_cli.main, "make_manager", lambda no_plugins: manager)
    out = kd("list", "method").stdout
    assert "kd-toy:toy" in out
    assert "other:toy" in out


def test_listing_imports_nothing_heavy(here):
    code = f"""
import sys
sys.argv = ["kd", "list"]
from kd_cli.main import main
try:
    main()
finally:
    print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "toy-points" in result.stdout
    assert result.stdout.splitlines()[-1] == "loaded:"


def test_showing_imports_no_torch(here):
    code = "import sys; sys.argv = ['kd', 'show', 'toy']\nfrom kd_cli.main import main\ntry: main()\n"
    code += "finally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_show_prints_options_paper_and_recipes(kd):
    out = kd("show", "toy").stdout
    assert "l1 | l2" in out
    assert "how logits are compared" in out
    assert "Ada Toy and Bob Toy. Toys Teach. Proceedings of Play, 2024, arXiv:2401.00001." in out
    assert "@inproceedings{toy2024toys," in out
    assert "kd run toy/quickstart" in out
    assert "A teacher is trained on points, then matched." in out


def test_show_gives_every_kind_of_a_name_or_the_one_asked_for(kd):
    assert [c["kind"] for c in json.loads(kd("show", "toy-linear", "--json").stdout)] == ["student", "teacher"]
    found = json.loads(kd("show", "kd-toy:toy-linear", "--kind", "students", "--json").stdout)
    assert [c["kind"] for c in found] == ["student"]
    assert found[0]["options"]["properties"]["remote"]["description"] == "name of weights to download"


@pytest.mark.parametrize("arguments", [("tou",), ("kd-other:toy",), ("tou", "--kind", "method")])
def test_showing_what_there_is_not_names_the_nearest(kd, arguments):
    result = kd("show", *arguments)
    assert result.exit_code == 2
    assert "'toy'" in result.stderr
    assert result.stdout == ""


def test_options_that_cannot_be_loaded_do_not_hide_the_rest(kd, monkeypatch):
    class Half:
        @hookimpl
        def kd_register_losses(self):
            return [Component("loss", "half", target=dict, options="no_such_module:X", summary="half a loss")]

    manager = PluginManager(discover=False)
    manager.register(Half())
    monkeypatch.setattr(kd_cli.main, "make_manager", lambda no_plugins: manager)
    result = kd("show", "half")
    assert result.exit_code == 0
    assert "half a loss" in result.stdout
    assert "No module named 'no_such_module'" in result.stdout
