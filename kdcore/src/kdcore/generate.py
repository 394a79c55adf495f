"""Corpora written by a teacher: prompts, answers in shards, what is kept of them, and where every row comes from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore import folder
from kdcore.data import derive_seed
from kdcore.errors import DataError, Interrupted, RunFailed, RunFolderError
from kdcore.options import Sampling
from kdcore.stages import Stage
from kdcore.text import Answer, Prompt, TextTeacher, render

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from kdcore.runner import Run

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Filter = Callable[[list[Row]], Sequence[bool]]
"""Which of some rows are kept. A critic is one: it is given many rows at once."""

PROVENANCE = {"prompt": "string", "answer": "string", "finish": "string", "logprob": "float64",
              "teacher": "string", "sampling": "string", "seed": "int64"}  # fmt: skip
"""The columns a corpus has beside those of the rows that were asked about. `prompt` is JSON where it is a chat."""


class GenerateStage(Stage):
    """A teacher answers one prompt per row of data; the artifact is a `datasets.Dataset` with a row per answer kept.

    Answers are written in shards of `shard_size` prompts, spread over the processes. A shard is on disk whole or not at
    all: a run that was killed asks again only for those that were under way. When all are there, the answers that hold
    nothing but blanks are dropped, then each is parsed, filtered and held against those kept before it.

    Args:
        name: the stage's name.
        teacher: who answers.
        rows: what is asked about: a `datasets.Dataset`, or mappings with the same keys.
        prompt: a Jinja2 template over the fields of a row, or `row -> prompt`.
        sampling: how answers are drawn; `n` of them for each prompt.
        parse: `row -> rows`, where an answer is not yet a row of the corpus: none for one that cannot be used.
        filters: by name, which rows are kept, tried in order. The artifact's `report.json` counts what each dropped.
        unique: columns in which no two rows may be alike, but for case and blanks; the first is kept.
        shard_size: prompts of a shard.

    Raises:
        DataError: if there are no rows, or they have a column that the corpus adds.
        RecipeError: on a template that does not fit them.
    """

    def __init__(
        self,
        name: str,
        teacher: TextTeacher,
        rows: Dataset | Sequence[Mapping[str, Any]],
        prompt: str | Callable[[Row], Prompt],
        sampling: Sampling,
        *,
        parse: Callable[[Row], Sequence[Row]] | None = None,
        filters: Mapping[str, Filter] | None = None,
        unique: Sequence[str] = (),
        shard_size: int = 64,
    ) -> None:
        self.name, self.teacher, self.sampling, self.shard_size = name, teacher, sampling, shard_size
        self.parse, self.filters, self.unique = parse, dict(filters or {}), tuple(unique)
        self.rows = _dataset(rows, name)
        self.prompt: Callable[[Row], Prompt] = prompt if callable(prompt) else lambda row: render(str(prompt), row)
        if taken := [column for column in self.rows.column_names if column in PROVENANCE]:
            raise DataError(f"stage {name!r}: the rows have a column {taken[0]!r}, which the corpus adds; rename it")
        self.prompt(self.rows[0])
        self.total_steps = -(-len(self.rows) // shard_size)  # a step is a shard

    def share(self, run: Run, workspace: Path) -> None:
        """Write this process's shards. Raises `Interrupted` after a signal, once the shard under way is written."""
        self.teacher.to(run.device)
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        with run.signals() as signals:
            for number in range(rank, self.total_steps, world):
                if _whole(run, _shard(workspace, number)):
                    continue
                if world == 1 and number < run.last_checkpoint(self.name) and not _shard(workspace, number).exists():
                    logger.warning("%s is gone; its prompts are asked again", _shard(workspace, number))
                self._write(run, _shard(workspace, number), number)
                if world == 1:
                    run.note_checkpoint(self.name, number + 1)
                run.notify("kd_step_finished", stage=self, step=number + 1, terms={})
                if signals:
                    raise Interrupted(f"interrupted in stage {self.name!r} at prompt {(number + 1) * self.shard_size} "
                                      f"of {len(self.rows)}; the same command goes on from here")  # fmt: skip

    def _write(self, run: Run, path: Path, number: int) -> None:
        from datasets import Dataset

        first = number * self.shard_size
        rows = [self.rows[i] for i in range(first, min(first + self.shard_size, len(self.rows)))]
        prompts = [self.prompt(row) for row in rows]
        seeds = [derive_seed(run.seed, self.name, first + i) for i in range(len(rows))]
        answers = self.teacher.generate(prompts, self.sampling, seeds)
        if [len(group) for group in answers] != [self.sampling.n] * len(rows):
            raise RunFailed(f"stage {self.name!r}: {self.teacher.name} did not give {self.sampling.n} answers to each "
                            f"of {len(rows)} prompts")  # fmt: skip
        records = [self._record(row, prompt, answer, seed)
                   for row, prompt, group, seed in zip(rows, prompts, answers, seeds, strict=True)
                   for answer in group]  # fmt: skip
        temporary = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        Dataset.from_list(records, features=_features(self.rows)).save_to_disk(str(temporary))
        run.commit(temporary, path)

    def _record(self, row: Row, prompt: Prompt, answer: Answer, seed: int) -> Row:
        return {**row, "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
                "answer": answer.text, "finish": answer.finish, "logprob": answer.logprob, "teacher": self.teacher.name,
                "sampling": self.sampling.model_dump_json(exclude_defaults=True), "seed": seed}  # fmt: skip

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Make the corpus of all shards. Raises `RunFailed` if nothing is left of it."""
        from datasets import Dataset, concatenate_datasets, load_from_disk

        seen: set[tuple[str, ...]] = set()
        report: dict[str, Any] = {"prompts": len(self.rows), "answers": 0, "kept": 0, "dropped": {}}
        parts = []
        for number in range(self.total_steps):
            rows = load_from_disk(str(_shard(workspace, number))).to_list()
            report["answers"] += len(rows)
            if kept := self._keep(rows, seen, report["dropped"]):
                parts.append(Dataset.from_list(kept))
        dropped = ", ".join(f"{name} {count}" for name, count in report["dropped"].items()) or "none"
        if not parts:
            raise RunFailed(f"stage {self.name!r}: nothing is left of {report['answers']} answers (dropped: {dropped})")
        corpus = concatenate_datasets(parts)
        report["kept"] = len(corpus)
        logger.info("stage %s: %d of %d answers kept; dropped: %s", self.name, len(corpus), report["answers"], dropped)
        corpus.save_to_disk(str(artifact / "data"))
        folder.write_text(artifact / "report.json", json.dumps(report, indent=1))

    def _keep(self, rows: list[Row], seen: set[tuple[str, ...]], dropped: dict[str, int]) -> list[Row]:
        """What is left of some answers; counts what each filter drops."""
        steps: dict[str, Filter] = {"empty": lambda rows: [bool(row["answer"].strip()) for row in rows]}
        rows = _filtered(rows, steps, dropped)
        if self.parse is not None:
            parsed = [list(self.parse(row)) for row in rows]
            _count(dropped, "unparsed", sum(not found for found in parsed))
            rows = [row for found in parsed for row in found]
        rows = _filtered(rows, self.filters, dropped)
        return _filtered(rows, {"duplicate": lambda rows: [self._new(row, seen) for row in rows]}, dropped)

    def _new(self, row: Row, seen: set[tuple[str, ...]]) -> bool:
        key = tuple(" ".join(str(row[column]).split()).casefold() for column in self.unique)
        if not key or key not in seen:
            seen.add(key)
            return True
        return False

    def load(self, run: Run, artifact: Path) -> Dataset:
        """The corpus."""
        from datasets import load_from_disk

        return load_from_disk(str(artifact / "data"))


def _filtered(rows: list[Row], filters: Mapping[str, Filter], dropped: dict[str, int]) -> list[Row]:
    for name, kept in filters.items():
        before = len(rows)
        rows = [row for row, good in zip(rows, kept(rows), strict=True) if good] if rows else rows
        _count(dropped, name, before - len(rows))
    return rows


def _count(dropped: dict[str, int], name: str, more: int) -> None:
    if more:
        dropped[name] = dropped.get(name, 0) + more


def _dataset(rows: Dataset | Sequence[Mapping[str, Any]], stage: str) -> Dataset:
    from datasets import Dataset

    found = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    if not len(found):
        raise DataError(f"stage {stage!r}: there is nothing to ask about: no rows")
    return found


def _features(rows: Dataset) -> Features:
    from datasets import Features, Value

    return Features({**rows.features, **{column: Value(kind) for column, kind in PROVENANCE.items()}})


def _shard(workspace: Path, number: int) -> Path:
    where = workspace / "shards"
    where.mkdir(exist_ok=True)
    return where / f"{number:06d}"


def _whole(run: Run, shard: Path) -> bool:
    if not shard.exists():
        return False
    try:
        run.verify(shard)
    except RunFolderError as error:
        logger.warning("%s; its prompts are asked again", error)
        return False
    return True
