"""For every test of the workspace."""

import sys
from pathlib import Path

import kdcore.errors  # noqa: F401 - imported first: the folder kdcore/ must not pass for the package

WHOLE_SUITE = not any(Path(arg.partition("::")[0]).exists() for arg in sys.argv[1:] if not arg.startswith("-"))
# tests/test_conformance.py covers every plugin; a plugin's own file is for running its folder alone.
collect_ignore_glob = ["plugins/*/tests/test_conformance.py"] if WHOLE_SUITE else []
