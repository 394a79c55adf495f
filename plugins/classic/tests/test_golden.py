from pathlib import Path

import pytest

from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_every_function_with_an_adapter_agrees_with_its_golden_vectors():
    adapters = golden.adapters("classic", PLUGINS)
    cases = [case for case in golden.run(FOLDER, PLUGINS, only="classic") if case.note != "no adapter"]
    assert {case.name.removeprefix("classic-").rpartition("-")[0] for case in cases} == set(adapters)
    assert [case for case in cases if not case.passed] == []
