"""Stage 2: the tuned language model's state at the end of every prompt, as a data set."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor

from kd_lingugkd.lm import LanguageModel
from kd_lingugkd.options import LinguGKDOptions
from kd_lingugkd.prompts import Prompts, Request
from kdcore import Run, Stage, folder
from kdcore.errors import DataError, Interrupted, RecipeError, RunFolderError

logger = logging.getLogger(__name__)
FACTS = "facts.json"
NO_CLASS, NOT_ASKED = -1, -2


@dataclass(frozen=True)
class Corpus:
    """What the teacher said, a row per prompt.

    Args:
        rows: columns `node`, `hop`, `variant`, `state` (float32), and `answer` (the number of a class, `NO_CLASS`,
            or `NOT_ASKED`).
        nodes: how many nodes the graph has.
        hops: of the prompts.
    """

    rows: Dataset
    nodes: int
    hops: int


class Features(Stage):
    """For each node and hop: the last layer's state at the last token of the prompt, and the teacher's answer where it
    is needed.

    Prompts are worked off in shards, spread over the processes. A shard is on disk whole or not at all, and a finished
    one is never computed again. What a shard holds does not depend on the processes.

    Args:
        teacher: tuned.
        prompts: of the graph.
        nodes: which nodes.
        answers: whether the teacher also answers.
        options: batch and shard sizes.
    """

    name = "features"

    def __init__(
        self, teacher: LanguageModel, prompts: Prompts, nodes: Sequence[int], answers: bool, options: LinguGKDOptions
    ) -> None:
        self.teacher, self.prompts, self.answers, self.options = teacher, prompts, answers, options
        self.requests = [request for node in nodes for request in prompts.requests(node)]
        self.total_steps = -(-len(self.requests) // options.shard_size)  # a step is a shard

    def share(self, run: Run, workspace: Path) -> None:
        """Write this process's shards. Raises `Interrupted` after a signal, once the shard under way is written."""
        self.teacher.model.to(run.device).eval()
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        with run.signals() as signals:
            for number in range(rank, self.total_steps, world):
                if _whole(path := _shard(workspace, number)):
                    continue
                self._write(path, number)
                run.notify("kd_step_finished", stage=self, step=number + 1, terms={})
                if signals:
                    raise Interrupted(f"interrupted in stage {self.name!r} at shard {number + 1} of "
                                      f"{self.total_steps}; the same command goes on from here")  # fmt: skip

    def _write(self, path: Path, number: int) -> None:
        size = self.options.shard_size
        rows = [row for batch in _batches(self.requests[number * size : (number + 1) * size],
                                          self.options.feature_batch) for row in self._answered(batch)]  # fmt: skip
        temporary = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        table = {key: [row[key] for row in rows] for key in rows[0]}
        Dataset.from_dict(table).save_to_disk(str(temporary))
        folder.commit(temporary, path)

    @torch.no_grad()
    def _answered(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The rows of some prompts, computed together."""
        teacher, module = self.teacher, cast(Any, self.teacher.model.module)
        device = next(module.parameters()).device
        room = max(len(teacher.answer_ids(name)) for name in self.prompts.classes)
        asked = [teacher.encode(self.prompts, request, room) for request in requests]
        ids, mask = teacher.padded(asked, left=True)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        found = module.generate(
            **inputs, max_new_tokens=room if self.answers else 1, do_sample=False,
            pad_token_id=teacher.pad, eos_token_id=teacher.tokenizer.eos_token_id, return_dict_in_generate=True,
            output_hidden_states=True,
        )  # fmt: skip
        states = found.hidden_states[0][-1][:, -1]  # of the first step, so at the prompt's last token
        answers = [NOT_ASKED] * len(requests)
        if self.answers:
            texts = teacher.tokenizer.batch_decode(found.sequences[:, ids.shape[1] :], skip_special_tokens=True)
            answers = [read_answer(text, self.prompts.classes) for text in texts]
        return [{"node": r.node, "hop": r.hop, "variant": r.variant, "state": state, "answer": answer}
                for r, state, answer in zip(requests, states.float().cpu().numpy(), answers, strict=True)]  # fmt: skip

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Put the shards together."""
        parts = [load_from_disk(str(_shard(workspace, number))) for number in range(self.total_steps)]
        concatenate_datasets(parts).save_to_disk(str(artifact / "data"))
        facts = {"nodes": len(self.prompts.texts), "hops": self.options.hops}
        folder.write_text(artifact / FACTS, json.dumps(facts))

    def load(self, run: Run, artifact: Path) -> Corpus:
        """The rows."""
        return read_corpus(artifact)


def read_corpus(artifact: Path) -> Corpus:
    """The rows that a finished stage left. Raises `OSError` or `ValueError` if they are not there."""
    facts = json.loads((artifact / FACTS).read_text(encoding="utf-8"))
    return Corpus(load_from_disk(str(artifact / "data")), facts["nodes"], facts["hops"])


def find_corpus(where: str, nodes: int, hops: int, answers: bool = False) -> Corpus:
    """The rows of an earlier run's features.

    Raises:
        RecipeError: if there are none, they are of another graph, have fewer hops, or no answers though `answers` are
            wanted.
    """
    path = Path(where).expanduser()
    found = [path, *sorted(path.glob("stages/*-features/artifact"))]
    try:
        corpus = read_corpus(next(folder for folder in found if (folder / FACTS).is_file()))
    except (StopIteration, OSError, ValueError, KeyError):
        raise RecipeError(f"method.features: {where!r} is no run folder with a finished stage 'features'") from None
    if corpus.nodes != nodes or corpus.hops < hops:
        raise RecipeError(f"method.features: {where!r} is of a graph of {corpus.nodes} nodes and {corpus.hops} hops; "
                          f"here are {nodes} nodes, and method.hops is {hops}")  # fmt: skip
    if answers and set(corpus.rows["answer"]) <= {NOT_ASKED}:
        raise RecipeError(f"method.features: in {where!r} the teacher was not asked for answers, which measure_teacher "
                          "and feature_mode=correct read: write features anew, without method.features")  # fmt: skip
    return corpus


def assemble(
    corpus: Corpus, nodes: Sequence[int], labels: Tensor, hops: int, mode: str = "full"
) -> tuple[list[int], Tensor]:
    """The teacher's state of each node and hop: the mean over the prompts of that hop.

    A hop without a state takes that of the hop before; hop 0 takes the first there is. A node without any is left out.

    Args:
        corpus: the rows.
        nodes: which nodes, in order.
        labels: of all nodes, `[N]`.
        hops: the last hop.
        mode: `full` for all prompts, `correct` for those that the teacher answers rightly.

    Returns:
        Positions in `nodes` of those that have a state, and the states `[n, hops + 1, D]`.

    Raises:
        DataError: if no node has any.
    """
    table = corpus.rows.with_format("numpy")
    row_node, row_hop, answer = (np.asarray(table[key]) for key in ("node", "hop", "answer"))
    states = np.asarray(table["state"], dtype=np.float32)
    place = np.full(len(labels), -1)
    place[list(nodes)] = np.arange(len(nodes))
    used = (place[row_node] >= 0) & (row_hop <= hops)
    if mode == "correct":
        used &= answer == labels.numpy()[row_node]
    sums = np.zeros((len(nodes), hops + 1, states.shape[1]), np.float64)
    counts = np.zeros((len(nodes), hops + 1), np.int64)
    at = (place[row_node[used]], row_hop[used])
    np.add.at(sums, at, states[used])
    np.add.at(counts, at, 1)
    kept = np.flatnonzero(counts.any(1))
    if not len(kept):
        raise DataError("no training node has a state of the teacher: with feature_mode=correct it must answer some "
                        "prompts rightly; tune it longer, or set feature_mode=full")  # fmt: skip
    means = sums[kept] / np.maximum(counts[kept], 1)[..., None]
    filled = _source(counts[kept] > 0)
    return kept.tolist(), torch.from_numpy(np.take_along_axis(means, filled[..., None], 1).astype(np.float32))


def _source(there: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each node and hop, `[n, L]`, the hop whose state it takes."""
    source = np.where(there, np.arange(there.shape[1]), -1)
    source[:, 0] = there.argmax(1)
    return np.maximum.accumulate(source, 1)


def votes(corpus: Corpus, classes: int, hop: int | None = None) -> tuple[Tensor, Tensor]:
    """What the teacher answers for each node, and whether it was asked: of one hop, or of all, each of which has one
    vote that its prompts share.

    Returns:
        Votes for each class `[N, C]`, and `[N]`, true where there is at least one prompt.
    """
    table = corpus.rows.with_format("numpy")
    node, row_hop, answer = (torch.from_numpy(np.asarray(table[key])) for key in ("node", "hop", "answer"))
    used = (answer != NOT_ASKED) if hop is None else (answer != NOT_ASKED) & (row_hop == hop)
    asked = torch.zeros(corpus.nodes, dtype=torch.bool)
    asked[node[used]] = True
    prompts, found = torch.zeros(corpus.nodes, corpus.hops + 1), torch.zeros(corpus.nodes, classes)
    prompts.index_put_((node[used], row_hop[used]), torch.ones(()), accumulate=True)
    named = used & (answer >= 0)
    shares = 1 / prompts[node[named], row_hop[named]]
    found.index_put_((node[named], answer[named]), shares, accumulate=True)
    return found, asked


def read_answer(text: str, classes: Sequence[str]) -> int:
    """The number of the class that an answer's first line names, blanks and case apart; `NO_CLASS` if it names none."""
    said = _plain(text.strip().partition("\n")[0])
    names = [_plain(name) for name in classes]
    return names.index(said) if said in names else NO_CLASS


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


def _batches(items: Sequence[Request], size: int) -> list[Sequence[Request]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _shard(workspace: Path, number: int) -> Path:
    where = workspace / "shards"
    where.mkdir(exist_ok=True)
    return where / f"{number:06d}"


def _whole(shard: Path) -> bool:
    if not shard.exists():
        return False
    try:
        folder.verify(shard)
    except RunFolderError as error:
        logger.warning("%s; it is computed again", error)
        return False
    return True
