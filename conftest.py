"""For every test of the workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

import kdcore.errors  # noqa: F401 - imported first: the folder kdcore/ must not pass for the package

EVERY_PLUGIN = Path(__file__).parent / "tests" / "test_conformance.py"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A plugin's own `test_conformance.py` is for running its folder alone: `tests/test_conformance.py`, where it is
    part of the run, covers every plugin."""
    if collection_path.name != EVERY_PLUGIN.name or collection_path == EVERY_PLUGIN:
        return None
    asked = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    return any(path.resolve() in (EVERY_PLUGIN, *EVERY_PLUGIN.parents) for path in asked) or None
