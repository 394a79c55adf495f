import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from kd_symbolic_kd.functional import (
    clean_events,
    clean_tail,
    cut_off,
    distinct,
    match,
    mean_cut_off,
    precision_above,
    recall_above,
    split_by_key,
    with_names,
    without_names,
)
from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: no {FOLDER}")

judged = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=4, max_size=60)


def adapters():
    spec = importlib.util.spec_from_file_location("golden_symbolic_kd", Path(__file__).parent / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_vectors
def test_the_cut_off_agrees_with_the_official_one():
    cases = [case for case in golden.run(FOLDER, PLUGINS, only="symbolic-kd") if case.note != "no adapter"]
    assert cases
    assert [case for case in cases if not case.passed] == []


@needs_vectors
@pytest.mark.parametrize("path", sorted(FOLDER.glob("symbolic-kd-eventfilter-*.npz")), ids=lambda path: path.stem)
def test_events_and_tails_are_cleaned_as_officially(path):
    with np.load(path, allow_pickle=False) as arrays:
        inputs = {key.removeprefix("in_"): arrays[key] for key in arrays.files if key.startswith("in_")}
        found = adapters().eventfilter(inputs, {}, json.loads(str(arrays["meta"]))["options"])
        for name, value in found.items():
            assert value.tolist() == arrays[f"out_{name}"].tolist()


def test_the_likeliest_events_stay_and_of_equal_ones_the_last():
    events = ["PersonX eats", "PersonX runs", "PersonX eats", "PersonX #1", "PersonX naps", "Person"]
    logprobs = [-1.0, -2.0, -9.0, -3.0, -4.0, -1.5]
    assert clean_events(events, logprobs, keep_fraction=1) == [1, 4, 2]  # not the strange one, not the short one
    assert clean_events(events, logprobs, keep_fraction=0.6) == [1]  # the first three of five: two go for other reasons
    assert clean_events(events, None, keep_fraction=1) == [2, 1, 4]
    assert clean_events(events, logprobs, keep_fraction=1, characters=".*", prefix="P") == [5, 1, 3, 4, 2]


@given(st.lists(st.tuples(st.text("ab#", min_size=1, max_size=3), st.floats(-50, 0)), max_size=30), st.floats(0.1, 1))
def test_cleaned_events_are_different_ordered_and_few_enough(rows, fraction):
    events, logprobs = [f"PersonX {event}" for event, _ in rows], [value for _, value in rows]
    kept = clean_events(events, logprobs, keep_fraction=fraction)
    assert len({events[i] for i in kept}) == len(kept) <= fraction * len(set(events)) + 1e-6
    assert [logprobs[i] for i in kept] == sorted((logprobs[i] for i in kept), reverse=True)
    assert not any("#" in events[i] for i in kept)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" to help Alex.", "to help PersonX"),
        ("that Chris's dog barks..", "that PersonY's dog barks."),
        (" at Christmas with Alexandra", "at Christmas with Alexandra"),
        ("  polite ", " polite "),
    ],
)
def test_tails_lose_one_dot_one_blank_and_the_names(raw, clean):
    assert clean_tail(raw) == clean


@given(st.lists(st.sampled_from(["PersonX", "PersonY", "PersonX's", "helps", "people"])).map(" ".join))
def test_names_go_in_and_come_out_again(text):
    named = with_names(text, "Robin", "Sage")
    assert "PersonX" not in named
    assert without_names(named, "Robin", "Sage") == text


@given(st.sets(st.text("abc", min_size=1), min_size=10, max_size=60), st.integers(0, 5))
def test_every_key_is_in_one_split_and_the_shares_are_met(keys, seed):
    found = split_by_key([*keys, *keys], (0.8, 0.1, 0.1), seed)
    assert found.keys() == keys
    counts = [sum(split == name for split in found.values()) for name in ("train", "val", "test")]
    assert counts == pytest.approx([0.8 * len(keys), 0.1 * len(keys), 0.1 * len(keys)], abs=1)
    assert found == split_by_key(sorted(keys), (0.8, 0.1, 0.1), seed)


@given(judged, st.floats(0.05, 0.95))
def test_the_cut_off_is_the_lowest_threshold_whose_recall_is_not_above_the_target(rows, recall):
    labels, scores = np.array([label for label, _ in rows]).astype(int), np.array([score for _, score in rows])
    try:
        found = cut_off(labels, scores, recall)
    except ValueError:
        top = labels[scores == scores.max()].sum()
        assert labels.sum() == 0 or top / labels.sum() > recall
        return
    assert found.recall == labels[scores >= found.threshold].sum() / labels.sum() <= recall
    lower = [labels[scores >= t].sum() / labels.sum() for t in np.unique(scores) if t < found.threshold]
    assert all(value > recall for value in lower)
    assert found.precision == pytest.approx(labels[scores >= found.threshold].mean())


def test_the_cut_off_of_several_splits_is_the_mean_of_theirs():
    one = ([1, 1, 0, 1, 0], [0.9, 0.8, 0.7, 0.4, 0.1])
    two = ([1, 0, 1, 1], [0.6, 0.5, 0.3, 0.2])
    both = [cut_off(*split, 0.7).threshold for split in (one, two)]
    assert mean_cut_off([one, two], 0.7) == pytest.approx(np.mean(both))
    assert mean_cut_off([one], 0.7) == both[0]
    assert both[0] == precision_recall_curve(*one)[2][np.argmax(precision_recall_curve(*one)[1] <= 0.7)]


def test_a_recall_that_cannot_be_reached_is_said():
    with pytest.raises(ValueError, match=r"no threshold has a recall as low as 0\.5: at the highest it is 1"):
        cut_off([1, 0, 1], [0.3, 0.3, 0.3], 0.5)
    with pytest.raises(ValueError, match="no valid triples"):
        cut_off([0, 0], [0.1, 0.2], 0.5)


def test_precision_and_recall_above_a_threshold():
    labels, scores = [1, 0, 1, 1], [0.9, 0.8, 0.5, 0.2]
    assert precision_above(labels, scores, 0.5) == 0.5  # what stands on the threshold is not kept
    assert recall_above(labels, scores, 0.5) == pytest.approx(1 / 3)
    assert np.isnan(precision_above(labels, scores, 0.9))
    assert np.isnan(recall_above([0], [0.4], 0.1))


def test_matches_do_not_hang_on_case_blanks_or_a_dot():
    assert match(" To  eat. ", ["drink", "to eat"])
    assert not match("eat", ["to eat"])


def test_distinct_pairs_of_words():
    assert distinct(["to eat it", "to eat that"]) == 3 / 4
    assert distinct(["proud"]) == 0
    assert distinct(["a b", "a b"], n=1) == 0.5
