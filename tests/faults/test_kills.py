"""A short series of kills; `make faults` makes a long one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from killing import CASES, Case, Faults


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in [name for name in os.environ if name.startswith("KD_")]:
            patch.delenv(name)
        yield Faults(tmp_path_factory.mktemp("faults"), warm=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nobody_had_killed_it(case: Case, faults: Faults):
    kills = 4 if case.processes == 1 else 2
    outcome = faults.series(case, case.kinds, kills)
    assert not outcome.problems, "\n".join(outcome.problems)
    assert len(outcome.hits) == kills
