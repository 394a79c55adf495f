"""Contribution analysis, and the cut that follows from it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.train import per_sample
from kd_hierarchical_prune.blocks import Block, Replacement, count, joined, without
from kd_hierarchical_prune.functional import Part, choose, parse_ranges, rank
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kdcore import Run, Stage
from kdcore.data import to_device
from kdcore.errors import RecipeError, did_you_mean
from kdcore.hookspecs import ENTRY_POINT_GROUP
from kdcore.models import Batch
from kdcore.search import SearchStage, Trial

Metric = Callable[[Run, Denoiser], float]
CUT, RANKING = "cut.json", "ranking.json"


class Contribution(SearchStage):
    """The metric of the teacher without each part, one after another; first of all the whole teacher.

    Args:
        teacher: the denoiser; it is whole again after every trial.
        blocks: its blocks.
        options: granularity, calibration samples, metric, and what takes a part's place.
    """

    def __init__(self, teacher: Denoiser, blocks: Sequence[Block], options: HierarchicalPruneOptions) -> None:
        super().__init__("contribution")
        self.teacher, self.blocks, self.options = teacher, blocks, options
        self.parts: list[Part] = list(parts_of(blocks, options.granularity))
        self.metric = load_metric(options.metric) if options.metric else None
        self._calibration: list[tuple[Batch, torch.Tensor]] = []

    def propose(self, archive: Sequence[Trial], rng: random.Random) -> dict[str, Any] | None:
        """The next part; the whole teacher before the first."""
        if not archive:
            return {"block": None, "component": None}
        if len(archive) > len(self.parts):
            return None
        block, component = self.parts[len(archive) - 1]
        return {"block": block, "component": component}

    @torch.no_grad()
    def score(self, run: Run, candidate: dict[str, Any]) -> dict[str, float]:
        """The metric without a part. Raises `RecipeError` where it is no number."""
        teacher = self.teacher.to(run.device).eval()
        if not self._calibration and self.metric is None:
            self._calibration = list(calibration(run, teacher, self.options.calibration_samples))
        if candidate["block"] is None:
            return {"metric": self._measure(run)}
        block = self.blocks[candidate["block"]]
        how = replacement(self.options)
        with without(teacher.module, block, candidate["component"], how):
            return {"metric": self._measure(run)}

    def _measure(self, run: Run) -> float:
        if self.metric is not None:
            found = self.metric(run, self.teacher)
            if not isinstance(found, float | int):
                raise RecipeError(
                    f"method.metric: {self.options.metric} returned a {type(found).__name__}, not a number"
                )
            return float(found)
        values = [per_sample(self.teacher(batch).extras["prediction"], wanted) for batch, wanted in self._calibration]
        return -float(torch.cat(values).double().mean())


def calibration(run: Run, teacher: Denoiser, limit: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Noised batches of the first training samples, and what the whole teacher says to them."""
    size = min(limit, run.recipe.train.eval_batch_size or run.recipe.train.batch_size)
    for batch in run.data.eval_loader("train", size):
        batch = {k: v[:limit] for k, v in batch.items()}
        noised = teacher.noised(to_device(batch, run.device), "calibration")
        yield noised, teacher(noised).extras["prediction"]
        limit -= len(batch["index"])
        if limit <= 0:
            return


def contributions(archive: Sequence[Trial]) -> dict[Part, float]:
    """dP(i, c) of every part: the metric of the whole model minus that without it."""
    whole = archive[0].scores["metric"]
    return {(t.candidate["block"], t.candidate["component"]): whole - t.scores["metric"] for t in archive[1:]}


def parts_of(blocks: Sequence[Block], granularity: str) -> Iterator[Part]:
    """What may be removed: every block, or every component of each (the block itself where it has none known)."""
    for block in blocks:
        names = list(block.components) if granularity == "component" else []
        yield from ((block.index, name) for name in names or [None])


def replacement(options: HierarchicalPruneOptions) -> Replacement:
    """What takes the place of removed components."""
    return Replacement(options.removed == "zero", options.removed_norm == "layer-norm")


def load_metric(name: str) -> Metric:
    """A function by `module:name`. The module must belong to an installed plugin: a recipe imports nothing else.

    Raises:
        RecipeError: if there is no such function, or it belongs to no plugin.
    """
    module, colon, attribute = name.partition(":")
    packages = {entry.module.partition(".")[0] for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if module.partition(".")[0] not in packages:
        raise RecipeError(f"method.metric: {name!r} belongs to no installed plugin; put the function into one "
                          "and name it module:name")  # fmt: skip
    try:
        found: Any = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"method.metric: {name!r} cannot be loaded: {error}") from None
    if not callable(found):
        raise RecipeError(f"method.metric: {name!r} is no function; write module:name")
    metric: Metric = found
    return metric


class ChooseCut(Stage):
    """What is removed: the manual list, or the first of the ranking until the target is met. Keeps `ranking.json`, the
    metric after each removal, best first, and `cut.json`.

    Args:
        teacher, blocks, options: as for `Contribution`.
        archive: its trials; none for a manual list.
    """

    name = "cut"

    def __init__(self, teacher: Denoiser, blocks: Sequence[Block], options: HierarchicalPruneOptions,
                 archive: Sequence[Trial]) -> None:  # fmt: skip
        self.teacher, self.blocks, self.options, self.archive = teacher, blocks, options, archive

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Choose, and write both files. Raises `RecipeError` where the target cannot be met."""
        o, blocks = self.options, self.blocks
        if o.cut_blocks is not None:
            parts = joined(parse_cut(o.cut_blocks, blocks), blocks)
        else:
            parts = joined(self._chosen(), blocks)
        if self.archive:
            best = sorted(self.archive[1:], key=lambda t: -t.scores["metric"])
            ranking = {label((t.candidate["block"], t.candidate["component"])): t.scores["metric"] for t in best}
            (artifact / RANKING).write_text(json.dumps(ranking, indent=1) + "\n", encoding="utf-8")
        total = count(self.teacher.module)
        gone = sum(count(self.teacher.module, blocks[i].paths(component)) for i, component in parts)
        if not 0 <= gone < total or len({i for i, c in parts if c is None}) == len(blocks):
            raise RecipeError("method: every block would be removed; name fewer, or raise target_ratio")
        facts = {"cut": parts, "parameters": total, "removed": gone, "ratio": 1 - gone / total}
        (artifact / CUT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def load(self, run: Run, artifact: Path) -> dict[str, Any]:
        """`cut`, the parts; `parameters` of the teacher and how many are `removed`; `ratio` of those left."""
        facts: dict[str, Any] = json.loads((artifact / CUT).read_text())
        return {**facts, "cut": [(block, component) for block, component in facts["cut"]]}

    def _chosen(self) -> list[Part]:
        o, module = self.options, self.teacher.module
        found = contributions(self.archive)
        eligible = eligible_blocks(o.eligible_blocks, self.blocks)
        ranked = [part for part in rank(found, len(self.blocks), position_weight=o.position_weight)
                  if part[0] in eligible]  # fmt: skip
        sizes = {part: count(module, self.blocks[part[0]].paths(part[1])) for part in ranked}
        ranked = [part for part in ranked if sizes[part]]
        try:
            return choose(ranked, sizes, count(module), o.target_ratio)
        except ValueError as error:
            raise RecipeError(f"method.target_ratio: {error}; raise it, or let more blocks be pruned "
                              "(method.eligible_blocks)") from None  # fmt: skip


def eligible_blocks(text: str, blocks: Sequence[Block]) -> set[int]:
    """The numbers of the blocks that may be pruned. Raises `RecipeError` for a name or block that there is not."""
    if text == "all":
        return {block.index for block in blocks}
    if text == "second-half":
        return {block.index for block in blocks[len(blocks) // 2 :]}
    return set(block_numbers(text, blocks, "eligible_blocks", ("all", "second-half")))


def block_numbers(text: str, blocks: Sequence[Block], key: str, words: Sequence[str] = ()) -> list[int]:
    """Numbers of existing blocks from half-open ranges.

    Raises:
        RecipeError: naming the option, for what is no range or no block.
    """
    try:
        found = parse_ranges(text)
    except ValueError as error:
        hint = f"; {did_you_mean(text, words, 'or one of')}" if words and text[:1].isalpha() else ""
        raise RecipeError(f"method.{key}: {error}{hint}") from None
    for number in found:
        if number >= len(blocks):
            raise RecipeError(f"method.{key}: there is no block {number}; the model has {len(blocks)}, "
                              f"0 to {len(blocks) - 1}")  # fmt: skip
    return found


def parse_cut(text: str, blocks: Sequence[Block]) -> list[Part]:
    """The parts of a manual list: half-open ranges, numbers or module names of blocks, each with a component or not.

    `25-29,31:attention,transformer_blocks.33` is the whole blocks 25 to 28 and 33, and the attention of block 31.

    Raises:
        RecipeError: for a block or component that there is not, with near names.
    """
    found: list[Part] = []
    paths = {block.path: block.index for block in blocks}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        where, colon, component = (piece.strip() for piece in entry.partition(":"))
        if where[:1].isdigit():
            numbers = block_numbers(where, blocks, "cut_blocks")
        elif where in paths:
            numbers = [paths[where]]
        else:
            raise RecipeError(f"method.cut_blocks: there is no block {where!r}; {did_you_mean(where, paths, 'blocks')}")
        for number in numbers:
            known = blocks[number].components
            if colon and component not in known:
                raise RecipeError(f"method.cut_blocks: block {number} ({blocks[number].path}) has no component "
                                  f"{component!r}; {did_you_mean(component, known, 'components')}")  # fmt: skip
            found.append((number, component if colon else None))
    return found


def label(part: Part) -> str:
    """A part as it stands in `ranking.json`: the block, a tab, the component."""
    return f"{part[0]}\t{part[1] or 'block'}"
