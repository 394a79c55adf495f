import json
from pathlib import Path

import pytest

from kd_symbolic_kd.data import read, triples
from kd_symbolic_kd.options import TriplesOptions
from kd_symbolic_kd.world import word_tokenizer
from kdcore.errors import DataError, RecipeError
from kdcore.testing.conformance import cut_recipe

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "atomic2020-sample" / "test.tsv"


def options(path: Path, **more) -> TriplesOptions:
    return TriplesOptions(path=str(path), tokenizer=more.pop("tokenizer", "-"), **more)


def lines(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, **more):
    return read(str(path), options(path, **more), lambda row: True)


def triple(head="PersonX eats", relation="xWant", tail="to rest", **more):
    return {"head": head, "relation": relation, "tail": tail, **more}


def test_json_lines_with_labels_and_splits(tmp_path):
    path = lines(tmp_path / "a.jsonl", triple(valid=2, split="val"), "", triple(valid=-1, extra=3), triple(valid=-9),
                 triple(valid=True), triple(valid=None))  # fmt: skip
    found = load(path)
    assert [row.get("valid") for row in found] == [1, 0, 0, 1, None]
    assert [row.get("split") for row in found] == ["val", None, None, None, None]
    assert [row.get("valid") for row in load(path, drop_unjudged=True)] == [1, 0, 1, None]


def test_tables_and_the_grouped_format(tmp_path):
    path = lines(tmp_path / "a.tsv", "PersonX eats\txWant\tto rest", "PersonX eats\txNeed\tto cook\t0",
                 "PersonX runs @@ xReact\t tired| none|happy")  # fmt: skip
    assert load(path) == [
        triple(),
        triple(relation="xNeed", tail="to cook", valid=0),
        triple("PersonX runs", "xReact", "tired"),
        triple("PersonX runs", "xReact", "happy"),
    ]
    assert {row["relation"] for row in load(path, relations=("xNeed", "xReact"))} == {"xNeed", "xReact"}
    assert [row["tail"] for row in load(path, drop_tails=("happy",))] == ["to rest", "to cook", "tired", "none"]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", {"head": "a", "relation": "b"}, "line 2 is not a triple: there is no 'tail'"),
        ("a.jsonl", {"head": 1, "relation": "b", "tail": "c"}, "line 2 is not a triple"),
        ("a.jsonl", "{", "line 2 is not a triple"),
        ("a.jsonl", triple(valid="yes"), "line 2 is not a triple"),
        ("a.jsonl", triple(split="dev"), "the split is 'dev'; splits: train, val, test"),
        ("a.tsv", "just one", "line 2 is not a triple: it has 1 columns"),
        ("a.csv", "a", "read from .jsonl and .tsv"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, line, message):
    first = triple() if name.endswith("jsonl") else "a\tb\tc"
    with pytest.raises(DataError, match=message):
        load(lines(tmp_path / name, first, line))


def test_files_that_are_not_there_or_lack_a_relation(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load(tmp_path / "a.jsonl")
    path = lines(tmp_path / "b.jsonl", triple())
    with pytest.raises(DataError, match="has no relation 'xWnat'; did you mean 'xWant'"):
        load(path, relations=("xWnat",))
    with pytest.raises(DataError, match="holds no valid triples"):
        triples(options(lines(tmp_path / "c.jsonl", triple(valid=0))))
    with pytest.raises(DataError, match="'-' is no folder of a tokenizer"):
        triples(options(path))


def test_the_component_splits_by_head_and_keeps_what_is_not_valid_for_the_critic(tmp_path):
    heads = [f"PersonX eats {i}" for i in range(20)]
    rows = [triple(head, tail=tail, valid=valid) for head in heads for tail, valid in (("to rest", 1), ("to fly", 0))]
    word_tokenizer(iter(["PersonX", "eats", "to", "rest", "fly", "xWant"])).save_pretrained(tmp_path / "words")
    data = triples(options(lines(tmp_path / "a.jsonl", *rows), tokenizer=str(tmp_path / "words")))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 16, "val": 2, "test": 2, "labelled-train": 32, "labelled-val": 4, "labelled-test": 4}  # fmt: skip
    for name in ("train", "val", "test"):
        assert {row["head"] for row in data[name]} == {row["head"] for row in data[f"labelled-{name}"]}
        assert {row["tail"] for row in data[name]} == {"to rest"}
    other = lines(tmp_path / "b.jsonl", triple("PersonX naps", valid=1, split="train"))
    data = triples(options(tmp_path / "a.jsonl", labelled=str(other), tokenizer=str(tmp_path / "words")))
    assert [row["head"] for row in data["labelled-train"]] == ["PersonX naps"]


@pytest.mark.parametrize("shares", [[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]])
def test_shares_that_make_no_split(tmp_path, shares):
    from kdcore import api

    recipe = cut_recipe("symbolic-kd")
    recipe["method"]["fractions"] = shares
    with pytest.raises(RecipeError, match=r"method\.fractions: give three positive shares that sum to one"):
        api.plan(recipe)


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"the sample of ATOMIC-2020 is not here: no {SAMPLE}")
def test_the_sample_of_atomic_is_read():
    found = load(SAMPLE, relations=("xNeed", "xReact"))
    assert len(found) > 1000
    assert {row["relation"] for row in found} == {"xNeed", "xReact"}
    assert not [row for row in found if row["tail"].casefold() == "none" or "|" in row["tail"]]
