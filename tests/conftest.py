"""Ways to be a user: a working folder, `kd` in this process or in one of its own, and packages that are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kd_cli.main import app

Kd = Callable[..., Result]
KdProcess = Callable[..., subprocess.CompletedProcess[str]]
Install = Callable[..., None]


@pytest.fixture(scope="session")
def root() -> Path:
    """The workspace."""
    return Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nothing in the environment changes what `kd` does."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("KD_DEBUG", "KD_PLUGINS", "KD_DISABLE_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def kd(here: Path) -> Kd:
    """`kd` in this process: quick, as torch is imported once."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def kd_process(here: Path) -> KdProcess:
    """`kd` in a process of its own, by its console script's module."""

    def call(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kd_cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | env, timeout=300)

    return call


@pytest.fixture(scope="session")
def install() -> Install:
    """Installs a distribution of one module and one entry point into a folder of the path, as pip would leave it."""

    def into(site: Path, name: str, source: str, *, entry: str = "", requires: str = "kdcore", **files: str) -> None:
        module = name.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        written = {
            site / module / "__init__.py": source,
            **{site / module / f"{stem}.py": text for stem, text in files.items()},
            info / "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: {requires}\n",
            info / "entry_points.txt": f"[kd]\n{entry or f'{name} = {module}'}\n",
        }
        for path, text in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        record = [f"{path.relative_to(site)},,\n" for path in (*written, info / "RECORD")]
        (info / "RECORD").write_text("".join(record))

    return into
