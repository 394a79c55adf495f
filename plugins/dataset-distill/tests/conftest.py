"""Makes the helpers of these tests importable, and runs recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import kdcore

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """`run(recipe, name, *plugins)`: its result."""

    from dataset_distill_toy import manager

    def go(made: dict[str, Any], name: str = "run", *plugins: Any) -> kdcore.Result:
        return kdcore.run(made, run_dir=tmp_path / name, plugins=manager(*plugins))

    return go
