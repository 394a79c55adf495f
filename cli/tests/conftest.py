"""The toy plugin as an installed distribution, and ways to call `kd`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kd_cli.main import app

TOY = Path(__file__).parent / "toy"


def _install(site: Path, name: str, entry: str, requires: str = "kdcore") -> None:
    """Write what pip would: a distribution of one entry point into a folder of the path."""
    info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\nRequires-Dist: {requires}\n")
    (info / "entry_points.txt").write_text(f"[kd]\n{entry}\n")


@pytest.fixture(scope="session")
def install() -> Callable[..., None]:
    return _install


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    _install(folder, "kd-toy", "toy = kd_toy.plugin")
    (folder / "kd_toy").symlink_to(TOY / "kd_toy")
    return folder


@pytest.fixture
def broken_site(tmp_path: Path) -> Path:
    folder = tmp_path / "broken_site"
    folder.mkdir()
    _install(folder, "kd-broken", "broken = kd_broken")
    (folder / "kd_broken.py").write_text("raise RuntimeError('it does not work here')\n")
    return folder


@pytest.fixture
def here(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which only the toy plugin is installed."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("KD_PLUGINS", "toy,broken")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("KD_DEBUG", raising=False)
    return folder


@pytest.fixture
def kd(here: Path) -> Callable[..., Result]:
    """`kd` in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def kd_process(here: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`kd` in a process of its own."""

    def call(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kd_cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env, timeout=120)

    return call
