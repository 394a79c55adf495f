"""The stages around the teacher, the critic and the student that are not training."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_symbolic_kd.critic import Critic, Reader, score
from kd_symbolic_kd.data import LABELLED, Triple, TripleData
from kd_symbolic_kd.functional import (
    SPLITS,
    clean_events,
    clean_tail,
    distinct,
    match,
    mean_cut_off,
    precision_above,
    recall_above,
    split_by_key,
)
from kd_symbolic_kd.options import SymbolicKDOptions
from kd_symbolic_kd.prompts import event_prompter, tail_prompter
from kd_symbolic_kd.student import answers
from kdcore import Run, Stage
from kdcore.data import derive_seed
from kdcore.errors import DataError, Interrupted, ModelError, RunFailed
from kdcore.folder import write_text
from kdcore.generate import GenerateStage
from kdcore.models import Model
from kdcore.options import Sampling
from kdcore.text import TextTeacher

logger = logging.getLogger(__name__)


class Events(GenerateStage):
    """Events after few-shot prompts, cleaned; the artifact is those that are kept, the likeliest first.

    Args:
        options: of the method.
        teacher: who writes them.
        shown: seed events.
        seed: of the draws from them.
    """

    def __init__(self, options: SymbolicKDOptions, teacher: TextTeacher, shown: Sequence[str], seed: int) -> None:
        rows = [{"draw": i} for i in range(options.event_prompts)]
        super().__init__("events", teacher, rows, event_prompter(options, shown, seed),
                         _plain(options.event_sampling), parse=self._event, shard_size=options.shard_size)  # fmt: skip
        self.options = options

    def _event(self, row: Triple) -> list[Triple]:
        event = row["answer"].strip()
        whole = row["finish"] == "stop" and event.startswith(self.options.event_prefix)
        return [{**row, "event": event}] if whole else []

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Make the corpus, then clean it: duplicates, the unlikeliest, strange characters.

        Raises:
            ModelError: if the teacher gives no log-probabilities and they are needed.
            RunFailed: if no event is left.
        """
        super().execute(run, workspace, artifact)
        corpus, o = super().load(run, artifact), self.options
        logprobs = corpus["logprob"][:] if o.keep_fraction < 1 else None
        if logprobs is not None and None in logprobs:
            raise ModelError(f"the teacher {self.teacher.name} gives no log-probabilities, by which the likeliest "
                             "events are kept; set method.keep_fraction=1 to keep all")  # fmt: skip
        kept = clean_events(corpus["event"][:], logprobs, keep_fraction=o.keep_fraction, prefix=o.event_prefix,
                            characters=o.event_characters)  # fmt: skip
        if not kept:
            raise RunFailed(f"stage 'events': of {len(corpus)} events none is left after cleaning; see "
                            "method.event_characters and method.keep_fraction")  # fmt: skip
        logger.info("stage events: %d of %d answers are kept as events", len(kept), len(corpus))
        corpus.select(kept).save_to_disk(str(artifact / "kept"))
        write_text(artifact / "events.txt", "".join(f"{event}\n" for event in corpus.select(kept)["event"]))

    def load(self, run: Run, artifact: Path) -> list[str]:
        """The events."""
        from datasets import load_from_disk

        events: list[str] = load_from_disk(str(artifact / "kept"))["event"][:]
        return events


def inferences(
    options: SymbolicKDOptions, teacher: TextTeacher, data: TripleData, events: Sequence[str], seed: int
) -> GenerateStage:
    """Tails for every event and relation, cleaned, without duplicates, split by event."""
    groups = split_by_key(events, options.fractions, derive_seed(seed, "split"))
    rows = [{"head": event, "relation": relation, "split": groups[event]}
            for event in events for relation in options.relations]  # fmt: skip

    def tail(row: Triple) -> list[Triple]:
        return [{**row, "tail": clean_tail(row["answer"], *options.query_names)}]

    filters = {
        "short": lambda rows: [len(row["tail"].strip()) >= options.shortest_tail for row in rows],
        "special-token": lambda rows: [data.reserved(row) is None for row in rows],
    }
    prompt = tail_prompter(options, shown_examples(options, data["train"], seed), seed)
    return GenerateStage(
        "inferences", teacher, rows, prompt, _plain(options.inference_sampling), parse=tail, filters=filters,
        unique=("head", "relation", "tail"), shard_size=options.shard_size,
    )  # fmt: skip


def shown_examples(options: SymbolicKDOptions, rows: Sequence[Triple], seed: int) -> dict[str, list[Triple]]:
    """A few training triples of every relation. Raises `DataError` where there is none."""
    found: dict[str, list[Triple]] = {}
    for name in options.relations:
        those = [row for row in rows if row["relation"] == name]
        if not those:
            raise DataError(f"the training data has no triple of relation {name!r} to show to the teacher; add some, "
                            "or leave it out of method.relations")  # fmt: skip
        rng = random.Random(derive_seed(seed, "examples", name))
        found[name] = rng.sample(those, min(options.inference_shots, len(those)))
    return found


def _plain(sampling: Sampling) -> Sampling:
    """The same sampling without our defaults, so that provenance tells what differs from the core's."""
    return Sampling(**sampling.model_dump())


class Sharded(Stage):
    """Something computed for many items, in pieces spread over the processes and kept on disk.

    Args:
        name: the stage's name.
        size: how many items there are.
    """

    shard_size = 128

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.total_steps = -(-size // self.shard_size)

    def compute(self, run: Run, items: range) -> list[Any]:
        """JSON values, one for each item."""
        raise TypeError(f"{type(self).__name__} does not implement compute(run, items)")

    def share(self, run: Run, workspace: Path) -> None:
        """Compute this process's pieces. Raises `Interrupted` after a signal, once the piece under way is written."""
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        with run.signals() as signals:
            for number in range(rank, self.total_steps, world):
                if (path := workspace / f"shard-{number:06d}.json").exists():
                    continue
                first = number * self.shard_size
                items = range(first, min(first + self.shard_size, self.size))
                write_text(path, json.dumps(self.compute(run, items)))
                run.notify("kd_step_finished", stage=self, step=number + 1, terms={})
                if signals:
                    raise Interrupted(f"interrupted in stage {self.name!r} at item {items.stop} of {self.size}; "
                                      "the same command goes on from here")  # fmt: skip

    def results(self, workspace: Path) -> list[Any]:
        """What was computed, in the order of the items."""
        paths = [workspace / f"shard-{number:06d}.json" for number in range(self.total_steps)]
        return [value for path in paths for value in json.loads(path.read_text(encoding="utf-8"))]


class Filter(Sharded):
    """Every triple of the corpus scored by the critic, and which of them are kept.

    The artifact holds `data`, the corpus with `p_valid` and `kept` beside where each row comes from, and `report.json`.

    Args:
        options: of the method.
        critic, reader: who scores.
        labelled: judged triples of `val` and `test`, by split.
        corpus: what the teacher wrote.
    """

    def __init__(self, options: SymbolicKDOptions, critic: Critic, reader: Reader,
                 labelled: Mapping[str, Sequence[Triple]], corpus: Any) -> None:  # fmt: skip
        self.options, self.critic, self.reader, self.corpus = options, critic, reader, corpus
        self.labelled = {split: list(rows) for split, rows in labelled.items()}
        self.judged = [row for rows in self.labelled.values() for row in rows]
        super().__init__("filter", len(self.judged) + len(corpus))

    def compute(self, run: Run, items: range) -> list[float]:
        """Scores: of the judged triples first, then of the corpus."""
        own = self.corpus.select_columns(["head", "relation", "tail"])
        judged = len(self.judged)
        rows = [self.judged[i] if i < judged else own[i - judged] for i in items]
        rows = [{key: row[key] for key in ("head", "relation", "tail")} for row in rows]
        return score(self.critic, self.reader, rows, run.device)

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Find the cut-off and write the scored corpus.

        Raises:
            DataError: if the target recall cannot be reached.
            RunFailed: if nothing is left to train on.
        """
        scores = self.results(workspace)
        found, start = {}, 0
        for split, rows in self.labelled.items():
            found[split] = ([row["valid"] for row in rows], scores[start : start + len(rows)])
            start += len(rows)
        values = np.array(scores[start:])
        report = self._report(found)
        kept = self._kept(values > report["cut_off"], run.seed)
        report |= {"rows": len(values), "kept": int(kept.sum()), "kept_by": self.options.filter}
        if not (np.array(self.corpus["split"][:])[kept] == "train").any():
            raise RunFailed(f"stage 'filter': of {len(values)} triples the critic leaves none to train on (cut-off "
                            f"{report['cut_off']:.3f}); raise method.target_recall")  # fmt: skip
        corpus = self.corpus.add_column("p_valid", values).add_column("kept", kept)
        corpus.save_to_disk(str(artifact / "data"))
        write_text(artifact / "report.json", json.dumps(report, indent=1))
        logger.info("stage filter: %d of %d triples kept, cut-off %.3f", kept.sum(), len(kept), report["cut_off"])

    def _report(self, found: Mapping[str, tuple[list[int], list[float]]]) -> dict[str, Any]:
        recall = self.options.target_recall
        try:
            threshold = mean_cut_off([found[name] for name in self.options.cutoff_splits.split("+")], recall)
        except ValueError as error:
            raise DataError(f"method.target_recall: {error}; the critic does not tell enough triples apart: train it "
                            "longer, label more triples, or ask for a higher recall") from None  # fmt: skip
        report: dict[str, Any] = {"target_recall": recall, "cut_off": threshold}
        for name, (labels, scores) in found.items():
            report[name] = {"labelled": len(labels), "valid": sum(labels) / len(labels),
                            "precision": precision_above(labels, scores, threshold),
                            "recall": recall_above(labels, scores, threshold)}  # fmt: skip
        return report

    def _kept(self, accepted: Any, seed: int) -> Any:
        """Which rows stay: those accepted, or as many of each split at random."""
        if self.options.filter == "critic":
            return accepted
        splits, kept = np.array(self.corpus["split"][:]), np.zeros(len(accepted), bool)
        rng = np.random.default_rng(derive_seed(seed, "random filter"))
        for name in SPLITS:
            rows = np.flatnonzero(splits == name)
            kept[rng.permutation(rows)[: int(accepted[rows].sum())]] = True
        return kept

    def load(self, run: Run, artifact: Path) -> tuple[Any, float]:
        """The rows that are kept, and the cut-off."""
        from datasets import load_from_disk

        report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
        corpus = load_from_disk(str(artifact / "data"))
        return corpus.select(np.flatnonzero(corpus["kept"][:])), report["cut_off"]


class Answers(Sharded):
    """What the student says about heads and relations that it was not trained on; the artifact is its metrics.

    They are `match`, the share of tails that stand among the data's own for this head and relation, `accepted`, the
    share that the critic accepts, and `distinct-2`, different pairs of words as a share of all.

    Args:
        options: of the method.
        student: the trained student.
        data: whose splits are asked about.
        splits: those splits.
        trained: (head, relation) pairs of the corpus, which are left out.
        judge: critic, reader and cut-off, where there are any.
    """

    def __init__(self, options: SymbolicKDOptions, student: Model, data: TripleData, splits: Sequence[str],
                 trained: set[tuple[str, str]], judge: tuple[Critic, Reader, float] | None) -> None:  # fmt: skip
        self.options, self.student, self.data, self.judge = options, student, data, judge
        self.known: dict[tuple[str, str, str], list[str]] = {}
        for split in splits:
            for row in data[split]:
                if row["relation"] in options.relations and (row["head"], row["relation"]) not in trained:
                    self.known.setdefault((split, row["head"], row["relation"]), []).append(row["tail"])
        self.asked = list(self.known)
        super().__init__("answers", len(self.asked))

    def compute(self, run: Run, items: range) -> list[dict[str, Any]]:
        """Each answer with what is known of it."""
        asked = [self.asked[i] for i in items]
        pairs = [(head, relation) for _, head, relation in asked]
        tails = answers(self.student, self.data, pairs, self.options.max_new_tokens, run.device)
        rows = [{"split": key[0], "head": key[1], "relation": key[2], "tail": tail,
                 "match": match(tail, self.known[key])} for key, tail in zip(asked, tails, strict=True)]  # fmt: skip
        if self.judge is not None:
            critic, reader, threshold = self.judge
            for row, value in zip(rows, score(critic, reader, rows, run.device), strict=True):
                row |= {"p_valid": value, "accepted": bool(row["tail"]) and value > threshold}
        return rows

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Write the answers and their metrics."""
        rows, metrics = self.results(workspace), {}
        for split in dict.fromkeys(row["split"] for row in rows):
            those = [row for row in rows if row["split"] == split]
            for name in ("match", "accepted"):
                if name in those[0]:
                    metrics[f"{split}/{name}"] = sum(row[name] for row in those) / len(those)
            metrics[f"{split}/distinct-2"] = distinct(row["tail"] for row in those)
        write_text(artifact / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(artifact / "metrics.json", json.dumps(metrics, indent=1))

    def load(self, run: Run, artifact: Path) -> dict[str, float]:
        """The metrics by `split/name`."""
        metrics: dict[str, float] = json.loads((artifact / "metrics.json").read_text(encoding="utf-8"))
        return metrics


def labelled_splits(data: TripleData) -> dict[str, list[Triple]]:
    """The judged triples, by split.

    Raises:
        DataError: if a split has none, or all of one kind.
    """
    found = {split: list(data[name]) if name in data else [] for split, name in LABELLED.items()}
    for split, rows in found.items():
        kinds = {row["valid"] for row in rows}
        if len(kinds) < 2:
            what = f"{len(rows)} labelled triples, all of them {'valid' if 1 in kinds else 'not'}" if rows else "none"
            raise DataError(f"the critic needs triples labelled valid and triples labelled not (`valid`: 1 or 0) in "
                            f"train, val and test; {split} has {what}. Give data.labelled, or set method.filter=none "
                            "to do without a critic")  # fmt: skip
    return found
