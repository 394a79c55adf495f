"""Cleaning, splitting and the cut-off: what happens to the teacher's texts and the critic's scores.

Source: West et al. 2022, "Symbolic Knowledge Distillation: from General Language Models to Commonsense Models" (arXiv
2110.07178), sections 3 and 4.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_curve

SPLITS = ("train", "val", "test")


def with_names(text: str, x: str, y: str) -> str:
    """PersonX and PersonY as names."""
    return re.sub(r"\bPersonY\b", y, re.sub(r"\bPersonX\b", x, text))


def without_names(text: str, x: str, y: str) -> str:
    """The names as PersonX and PersonY again; only whole words, so that Chris is not found in Christmas."""
    persons = {x: "PersonX", y: "PersonY"}
    return re.sub(rf"\b({re.escape(x)}|{re.escape(y)})\b", lambda found: persons[found[0]], text)


def clean_tail(text: str, x: str = "Alex", y: str = "Chris") -> str:
    """A tail as the corpus holds it: without one final dot and one leading space, and without names."""
    return without_names(text.removesuffix(".").removeprefix(" "), x, y)


def clean_events(
    events: Sequence[str],
    logprobs: Sequence[float] | None,
    *,
    keep_fraction: float = 0.8,
    prefix: str = "PersonX",
    characters: str = r"[A-Za-z0-9'\",.\-’$ ]*",
) -> list[int]:
    """Which events are kept, the likeliest first.

    Of equal texts the last stays. They are ordered by the sum of their tokens' log-probabilities, which is not divided
    by their length, so short events win; the first `keep_fraction` of them stay, and of these the ones whose
    characters are all allowed and that are not shorter than the prefix.

    Args:
        events: texts.
        logprobs: of each; `None` keeps the order.
        keep_fraction: in (0, 1].
        prefix: what events begin with.
        characters: regular expression that the whole text has to match.

    Returns:
        Positions in `events`.
    """
    last = {event: i for i, event in enumerate(events)}
    order = list(last.values()) if logprobs is None else sorted(last.values(), key=lambda i: -logprobs[i])
    kept = order[: int(keep_fraction * len(order) + 1e-9)]
    allowed = re.compile(characters)
    return [i for i in kept if allowed.fullmatch(events[i]) and len(events[i]) >= len(prefix)]


def split_by_key(keys: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """A split for each different key, at random, with these shares of them; all rows of a key then share its split."""
    different = sorted(set(keys))
    random.Random(seed).shuffle(different)
    bounds = [round(len(different) * share) for share in np.cumsum(fractions)]
    return {key: SPLITS[sum(i >= bound for bound in bounds[:-1])] for i, key in enumerate(different)}


class CutOff(NamedTuple):
    """A point of the precision-recall curve: what `score >= threshold` would keep of the labelled triples."""

    threshold: float
    precision: float
    recall: float


def cut_off(labels: ArrayLike, scores: ArrayLike, recall: float) -> CutOff:
    """The first threshold, ascending, whose recall is not above the one asked for.

    Args:
        labels: 1 for valid, 0 for others, `[N]`.
        scores: larger is more valid, `[N]`.
        recall: share of the valid ones to keep.

    Raises:
        ValueError: if there are no valid ones, or the largest score is shared by so many of them that no threshold
            keeps so few.
    """
    truth = np.asarray(labels)
    if not truth.any():
        raise ValueError("there are no valid triples to measure a recall on")
    precisions, recalls, thresholds = precision_recall_curve(truth, np.asarray(scores))
    below = np.flatnonzero(recalls[:-1] <= recall)  # the last point keeps nothing and has no threshold
    if not below.size:
        raise ValueError(f"no threshold has a recall as low as {recall}: at the highest it is {recalls[-2]:.3f}")
    return CutOff(*(float(curve[below[0]]) for curve in (thresholds, precisions, recalls)))


def mean_cut_off(splits: Sequence[tuple[ArrayLike, ArrayLike]], recall: float) -> float:
    """The mean of the splits' thresholds, each a pair of labels and scores; what scores above it is kept."""
    return float(np.mean([cut_off(labels, scores, recall).threshold for labels, scores in splits]))


def precision_above(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Share of valid ones among those whose score is above the threshold; NaN where there are none."""
    kept = np.asarray(labels)[np.asarray(scores) > threshold]
    return float(kept.mean()) if kept.size else float("nan")


def recall_above(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Share of the valid ones whose score is above the threshold; NaN where there are none."""
    kept = np.asarray(scores)[np.asarray(labels) == 1] > threshold
    return float(kept.mean()) if kept.size else float("nan")


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """Different n-grams of words as a share of all; 0 where there are none."""
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def match(tail: str, references: Iterable[str]) -> bool:
    """Whether a tail stands among the references, but for case, blanks and a final dot."""
    return _plain(tail) in {_plain(text) for text in references}


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()
