"""Search: candidates are proposed and scored one after another; every score is on disk before the next is asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data import derive_seed
from kdcore.errors import Interrupted, RecipeError, RunFolderError
from kdcore.folder import write_text
from kdcore.stages import Stage

if TYPE_CHECKING:
    from kdcore.runner import Run

logger = logging.getLogger(__name__)

ARCHIVE = "archive.jsonl"


@dataclass(frozen=True)
class Trial:
    """One line of a search's archive.

    Args:
        candidate: what was tried, as JSON holds it.
        scores: what came out, by name.
    """

    candidate: Any
    scores: dict[str, float]


class SearchStage(Stage):
    """A search. A subclass implements `propose` and `score`; the artifact is the archive, a list of `Trial`.

    A search that was killed goes on after its last trial: what is proposed may depend on the archive and on the
    generator that `propose` is given, and on nothing else.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def propose(self, archive: Sequence[Trial], rng: random.Random) -> Any:
        """The next candidate, a JSON value; `None` ends the search."""
        raise TypeError(f"{type(self).__name__} does not implement propose(archive, rng)")

    def score(self, run: Run, candidate: Any) -> Mapping[str, float]:
        """The scores of a candidate."""
        raise TypeError(f"{type(self).__name__} does not implement score(run, candidate)")

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Try candidates until none is proposed.

        Raises:
            RecipeError: if there is no candidate at all.
            Interrupted: after a signal; the archive is on disk.
        """
        path, key = workspace / ARCHIVE, run.resolved.fingerprint
        archive = read_archive(path, key)
        write_text(path, "".join(_line(trial, key) for trial in archive))  # without a last line that was cut off
        if (lost := run.last_checkpoint(self.name) - len(archive)) > 0:
            logger.warning("%s is damaged: its last %d trials are gone, and are made again", path, lost)
        run.forget_rows_after(self.name, len(archive))
        with run.signals() as signals, open(path, "a", encoding="utf-8") as file:
            while (candidate := self.propose(archive, self._generator(run, len(archive)))) is not None:
                candidate = json.loads(json.dumps(candidate))  # as it will be after a resume
                trial = Trial(candidate, {k: float(v) for k, v in self.score(run, candidate).items()})
                archive.append(trial)
                # first the row: one without its trial is dropped after a kill, a trial without its row would stay so
                run.log({"stage": self.name, "step": len(archive), "metrics": trial.scores})
                file.write(_line(trial, key))
                file.flush()
                os.fsync(file.fileno())
                run.note_checkpoint(self.name, len(archive))
                terms = {name: torch.tensor(value) for name, value in trial.scores.items()}
                run.notify("kd_step_finished", stage=self, step=len(archive), terms=terms)
                if signals:
                    raise Interrupted(f"interrupted in stage {self.name!r} after {len(archive)} trials; "
                                      "the same command goes on from here")  # fmt: skip
        if not archive:
            raise RecipeError(f"stage {self.name!r}: there is no candidate to try")
        shutil.copyfile(path, artifact / ARCHIVE)

    def load(self, run: Run, artifact: Path) -> list[Trial]:
        """The trials in the order they were made."""
        return read_archive(artifact / ARCHIVE, run.resolved.fingerprint)

    def _generator(self, run: Run, trial: int) -> random.Random:
        return random.Random(derive_seed(run.seed, self.name, trial))


def read_archive(path: Path, recipe: str = "") -> list[Trial]:
    """The trials of an archive; none where there is no file. A last line that was cut off does not count.

    Args:
        path: the file.
        recipe: fingerprint of the recipe that its lines must belong to; none for any.

    Raises:
        RunFolderError: on a line that is damaged, or of another recipe.
    """
    trials = []
    *lines, _ = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else [""]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            trial = Trial(row["candidate"], row["scores"])
            whole = f"{line}\n" == _line(trial, recipe or row["recipe"])
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise RunFolderError(f"{path}, line {number}: this trial is damaged, or of another recipe; delete the "
                                 "lines from there on to try these candidates again")  # fmt: skip
        trials.append(trial)
    return trials


def _line(trial: Trial, recipe: str) -> str:
    return json.dumps({**asdict(trial), "recipe": recipe, "digest": _digest(trial, recipe)}) + "\n"


def _digest(trial: Trial, recipe: str) -> str:
    return hashlib.blake2b(json.dumps([recipe, asdict(trial)]).encode(), digest_size=8).hexdigest()
