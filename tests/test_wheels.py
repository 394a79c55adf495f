"""The core, the command line and two plugins as wheels, installed with pip into an empty environment elsewhere.

What they depend on is not downloaded again: the environment sees the third-party packages of this one, by links, and
pip finds every requirement of the wheels among them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

MEMBERS = ("kdcore", "cli", "plugins/classic", "plugins/demo")
OURS = ("kd_", "kdcore", "_editable_", "__editable__", "__pycache__")
CUT = ("train.steps=5", "train.batch_size=16", "teacher.width=4", "student.width=2", "teacher.train={steps: 2}")

Call = Callable[..., str]


def link_third_party(folder: Path) -> None:
    """Links to every installed package but the workspace's own."""
    folder.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(site).iterdir():
            if not path.name.startswith(OURS):
                (folder / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """An environment with the wheels, and nothing of the workspace."""
    base = tmp_path_factory.mktemp("wheels")
    for member in MEMBERS:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(base / "dist"), member]
        subprocess.run(build, cwd=root, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")], check=True)
    link_third_party(base / "third_party")
    (site,) = base.glob("venv/lib/python*/site-packages")
    (site / "third_party.pth").write_text(f"import site; site.addsitedir({str(base / 'third_party')!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", str(base / "venv" / "bin" / "python")]
    install = [*pip, "install", "--no-index", *map(str, (base / "dist").glob("*.whl"))]
    done = subprocess.run(install, capture_output=True, text=True, check=False, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return base


def clean_environment() -> dict[str, str]:
    """This one's, without what would lead back to the workspace."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KD_", "PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def call(environment: Path) -> Call:
    """A command of the environment, called in a folder of its own; what it prints."""
    where = environment / "elsewhere"
    where.mkdir()

    def run(command: str, *arguments: str) -> str:
        program = [str(environment / "venv" / "bin" / command), *arguments]
        done = subprocess.run(program, cwd=where, capture_output=True, text=True, check=False, env=clean_environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_packages_and_recipes_come_from_the_wheels(environment, call):
    code = """
import json, kd_classic, kd_cli, kd_demo, kdcore
from kdcore.plugins import PluginManager
methods = [c for _, c in PluginManager().components("method")]
files = [str(f) for c in methods for f in c.recipe_files().values()]
print(json.dumps([p.__file__ for p in (kdcore, kd_cli, kd_classic, kd_demo)] + files))
"""
    files = json.loads(call("python", "-c", code))
    (site,) = environment.glob("venv/lib/python*/site-packages")
    assert [file for file in files if not Path(file).is_relative_to(site)] == []
    assert {"kd_classic/recipes/kd/quickstart.yaml", "kd_demo/recipes/quickstart.yaml"} <= {
        str(Path(file).relative_to(site)) for file in files
    }


def test_typed_markers_and_licence_are_in_the_wheels(environment):
    for name in ("kdcore", "kd_cli", "kd_classic", "kd_demo"):
        (site,) = environment.glob("venv/lib/python*/site-packages")
        assert (site / name / "py.typed").is_file()
        (info,) = site.glob(f"{name}-*.dist-info")
        metadata = (info / "METADATA").read_text()
        assert "License-Expression: Apache-2.0" in metadata
        assert "Requires-Python: >=3.11" in metadata


def test_the_list_holds_what_the_wheels_offer_and_no_more(call):
    found = json.loads(call("kd", "list", "--json"))
    assert found["broken"] == []
    assert {c["distribution"] for c in found["components"]} == {"kd-classic", "kd-demo"}
    assert {
        ("loss", "kd"),
        ("method", "kd"),
        ("method", "quickstart"),
        ("data", "digits"),
        ("student", "demo-cnn"),
    } <= {(c["kind"], c["name"]) for c in found["components"]}


def test_a_method_shows_its_recipes(call):
    assert "kd run kd/quickstart" in call("kd", "show", "kd")
    call("kd", "cp", "kd/quickstart", "mine.yaml")


def test_a_quickstart_runs_and_its_student_loads_without_the_core(environment, call):
    assert "run folder:" in call("kd", "run", "kd", *CUT)
    student = environment / "elsewhere" / "runs" / "kd-quickstart" / "student"
    alone = environment / "alone"
    (site,) = environment.glob("venv/lib/python*/site-packages")
    shutil.copytree(site / "kd_demo", alone / "kd_demo")
    code = f"""
import sys
sys.path[:] = [{str(alone)!r}, {str(environment / "third_party")!r}] + [p for p in sys.path if "site-packages" not in p]
import torch
from kd_demo import nets
with torch.no_grad():
    print(tuple(nets.load({str(student)!r})(torch.rand(2, 1, 8, 8))["logits"].shape))
try:
    import kdcore
except ModuleNotFoundError:
    print("no kdcore")
"""
    assert call("python", "-c", code).splitlines() == ["(2, 10)", "no kdcore"]
