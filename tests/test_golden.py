"""Every plugin's functions agree with the papers' own implementations, by the command that plugin authors use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdcore.testing import golden

ROOT = Path(__file__).parents[1]
VECTORS = ROOT.parent / "shared" / "golden"
SLUGS = sorted(path.parents[1].name for path in ROOT.glob("plugins/*/tests/golden.py"))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the folder ../shared/golden of golden vectors is not here")
@pytest.mark.parametrize("slug", SLUGS)
def test_all_vectors_agree(slug, monkeypatch, capsys):
    arguments = ["golden", str(VECTORS), "--plugin", slug, "--plugins", str(ROOT / "plugins")]
    monkeypatch.setattr(sys, "argv", arguments)
    status = golden.main()
    table = capsys.readouterr().out
    assert status == 0, table
    assert "FAILED" not in table
    assert not table.splitlines()[-1].startswith("0 agree")
