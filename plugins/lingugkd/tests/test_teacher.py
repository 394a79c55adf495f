from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from kd_lingugkd.features import Corpus, Features, assemble, read_answer, votes
from kd_lingugkd.lm import build_teacher, shift_labels
from kd_lingugkd.options import LinguGKDOptions
from kd_lingugkd.prompts import Prompts, Request
from kd_lingugkd.tuning import PromptBatches, Tune
from kd_pyg.graph import GraphData
from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.plugins import PluginManager
from kdcore.recipe import load, resolve
from kdcore.runner import Run

TEXTS = [f"paper {word}" for word in ("zero", "one", "two", "three", "four", "alone")]
EDGES = [[0, 1, 2, 3], [1, 2, 3, 4]]
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 160}  # fmt: skip


def path_graph(texts: Any = TEXTS, classes: Any = ("cats", "dogs"), train: tuple[int, ...] = (0, 1, 5)) -> GraphData:
    """0 - 1 - 2 - 3 - 4, and 5 alone."""
    return GraphData(torch.randn(6, 3), torch.tensor(EDGES), torch.tensor([0, 1, 0, 1, 0, IGNORE]),
                     {"train": list(train), "val": [2], "test": [3, 4]}, classes, texts=texts)  # fmt: skip


def prompts(data: GraphData | None = None, seed: int = 0, **options: Any) -> Prompts:
    return Prompts(data or path_graph(), LinguGKDOptions(**options), seed)


def make_run(where: Path, teacher: Any = None, data: Any = None, **method: Any) -> Run:
    recipe = {"method": {"use": "lingugkd", "max_length": 128, **method},
              "teacher": teacher or {"use": "transformers", "config": LLAMA}, "student": {"use": "gcn", "hidden": 8},
              "data": data or {"use": "stochastic-block", "nodes": 60, "train_per_class": 5, "val": 10},
              "train": {"batch_size": 4}}  # fmt: skip
    manager = PluginManager()
    return Run(resolve(load(recipe), manager), manager, where)


def teacher_of(run: Run, **changes: Any) -> tuple[Any, Prompts, LinguGKDOptions]:
    options = run.resolved.options["method"].model_copy(update=changes)
    found = Prompts(run.data, options, run.seed)
    return build_teacher(run, options, found), found, options


# -- prompts


def test_paths_are_the_shortest_and_stop_where_there_are_no_more_nodes():
    made = prompts()
    assert made.paths(0, 2) == [{1: [0, 1]}, {2: [0, 1, 2]}]
    assert made.paths(4, 9) == [{3: [4, 3]}, {2: [4, 3, 2]}, {1: [4, 3, 2, 1]}, {0: [4, 3, 2, 1, 0]}]
    assert made.paths(5, 3) == []


def test_a_prompt_tells_of_the_hops_asked_for_and_of_labels_of_training_nodes_only():
    made = prompts()
    assert "1-hop" not in made.text(Request(0, 0, 0))
    text = made.text(Request(2, 2, 0))
    assert "1-hop neighbour: paper one (dogs)" in text
    assert "2-hop neighbour: paper zero (cats)" in text
    assert "1-hop neighbour: paper three\n" in text
    assert text.startswith("### Instruction: Classify the node into one of: cats, dogs.")
    assert text.endswith("### Response:")
    assert "cats)" not in prompts(neighbour_labels=False).text(Request(2, 2, 0))


def test_a_node_never_sees_its_own_label():
    for node in range(6):
        assert f"{TEXTS[node]} (" not in prompts(hops=3).text(Request(node, 3, 0))


def test_variants_draw_other_neighbours_and_are_reproducible():
    star = GraphData(torch.randn(9, 2), torch.tensor([[0] * 8, list(range(1, 9))]), torch.zeros(9).long(),
                     {"train": [0]}, ["a", "b"], texts=[f"n{i}" for i in range(9)])  # fmt: skip
    made = prompts(star, neighbours=3, prompts=4)
    texts = [made.text(Request(0, 1, variant)) for variant in range(4)]
    assert len(set(texts)) > 1
    assert all(text.count("1-hop neighbour") == 3 for text in texts)
    assert texts == [prompts(star, neighbours=3, prompts=4).text(Request(0, 1, v)) for v in range(4)]
    assert texts != [prompts(star, seed=1, neighbours=3, prompts=4).text(Request(0, 1, v)) for v in range(4)]


def test_requests_leave_out_hops_without_nodes():
    made = prompts(prompts=2)
    assert [(r.hop, r.variant) for r in made.requests(0)] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(r.hop, r.variant) for r in made.requests(5)] == [(0, 0)]


def test_link_prompts_are_answered_by_the_edges():
    made, rng = prompts(), random.Random(0)
    asked = [made.link(2, rng) for _ in range(200)]
    linked = {f"Other node: {TEXTS[i]}\n" for i in (1, 3)}
    assert all((answer == "yes") == any(name in text for name in linked) for text, answer in asked)
    assert 0.4 < sum(answer == "yes" for _, answer in asked) / 200 < 0.8
    assert {made.link(5, rng)[1] for _ in range(20)} == {"no"}
    share = sum(prompts(link_prompts=0.3).draw(0, seed) is None for seed in range(500)) / 500
    assert abs(share - 0.3) < 0.06


def test_a_template_with_an_unknown_field_of_a_neighbour_is_refused():
    with pytest.raises(RecipeError, match="no attribute 'title'"):
        prompts(template="{{ text }}{% for near in neighbours %}{{ near.title }}{% endfor %}")


@pytest.mark.parametrize("key", ["template", "link_template"])
def test_a_template_with_an_unknown_field_is_refused(key):
    with pytest.raises(RecipeError, match="has no field 'txt'; did you mean 'text'"):
        prompts(**{key: "{{ txt }}"})


def test_data_that_prompts_cannot_be_made_of():
    with pytest.raises(DataError, match="1 of 6 nodes have none, node 3 first"):
        prompts(path_graph(texts=[*TEXTS[:3], "", *TEXTS[4:]]))
    with pytest.raises(DataError, match="this graph has none"):
        prompts(path_graph(texts=None))
    with pytest.raises(DataError, match="classes have none"):
        prompts(path_graph(classes=2))


# -- tokens


def test_long_prompts_lose_neighbours_then_words(tmp_path):
    run = make_run(tmp_path)
    teacher, made, _ = teacher_of(run)
    node = int(run.data.graph.degree.argmax())
    whole = teacher.encode(made, Request(node, 2, 0))
    bare = teacher.encode(made, Request(node, 0, 0))
    for limit in (len(whole) - 1, len(bare) + 1, len(bare) - 2):
        made.options = made.options.model_copy(update={"max_length": limit})
        ids = teacher.encode(made, Request(node, 2, 0))
        assert len(ids) <= limit
        assert ids[-2:] == whole[-2:]
        assert (len(ids) >= len(bare)) == (limit > len(bare))
    made.options = made.options.model_copy(update={"max_length": 1000})
    teacher.model.module.config.max_position_embeddings = len(whole) - 1  # what the model reads is a limit, too
    assert len(teacher.encode(made, Request(node, 2, 0))) < len(whole)
    made.options = made.options.model_copy(update={"max_length": 9})
    with pytest.raises(DataError, match=r"raise method.max_length above 9"):
        teacher.encode(made, Request(node, 2, 0))


def test_only_the_answer_is_learned(tmp_path):
    teacher, made, _ = teacher_of(make_run(tmp_path))
    batch = PromptBatches(made, teacher)([{"node": torch.tensor(n), "prompt_draw": n} for n in range(6)])
    for ids, mask, labels, node in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels", "node")), strict=True
    ):
        length = int(mask.sum())
        at = (labels != IGNORE).nonzero().flatten()
        answer = teacher.tokenizer.decode(ids[at + 1])
        assert answer in {f"{made.answer(int(node))} [EOS]", "yes [EOS]", "no [EOS]"}
        assert at[-1] == length - 2
        assert torch.equal(labels[at], ids[at + 1])


def test_shifted_labels():
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 7, 8, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert shift_labels(ids, [2, 1], mask).tolist() == [[IGNORE, 7, 8, IGNORE], [IGNORE, 8, IGNORE, IGNORE]]


def test_another_prompt_comes_in_each_epoch(tmp_path):
    run = make_run(tmp_path, link_prompts=0.0)
    teacher, made, options = teacher_of(run)
    stage = Tune(run, teacher, made, options.model_copy(update={"tuning": "full"}))
    loader = stage.data.train_loader("train", 20, seed=0, start=0, stop=6)
    seen: dict[int, set[int]] = {}
    for batch in loader:
        for node, length in zip(batch["node"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True):
            seen.setdefault(node, set()).add(length)
    assert sum(len(lengths) > 1 for lengths in seen.values()) > 10


# -- tuning


def tuned(run: Run, **changes: Any) -> tuple[Any, Tune]:
    teacher, made, options = teacher_of(run, **changes)
    torch.manual_seed(0)
    return teacher, Tune(run, teacher, made, options)


def test_adapters_alone_are_registered_and_trained(tmp_path):
    run = make_run(tmp_path, lora={"rank": 2, "targets": ["q_proj"], "saved": ["lm_head"]})
    teacher, stage = tuned(run)
    names = set(dict(stage.named_parameters()))
    assert len(names) == 3
    assert all("lora" in name or "lm_head" in name for name in names)
    assert stage.train().lm[0].training
    assert not stage.eval().lm[0].training
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    stage.train()(stage.data.sample("train", 4))["completion"].backward()
    torch.optim.SGD(stage.parameters(), 0.1).step()
    moved = {name for name, p in teacher.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name or "lm_head" in name for name in moved)


def test_noise_comes_in_training_alone_and_is_keyed_by_the_sample(tmp_path):
    _, stage = tuned(make_run(tmp_path, tuning="full", neftune=5.0))
    batch = stage.data.sample("train", 4)
    with torch.no_grad():
        plain, noisy = stage.eval()(batch)["completion"], stage.train()(batch)["completion"]
        assert torch.equal(stage.eval()(batch)["completion"], plain)
        assert not torch.equal(plain, noisy)
        embeddings = torch.zeros(*batch["input_ids"].shape, 16)
        noise = stage._noise(embeddings, batch)
        part = stage._noise(embeddings[2:], {key: value[2:] for key, value in batch.items()})
    torch.testing.assert_close(part, noise[2:], rtol=0, atol=0)
    for row, length in zip(noise, batch["attention_mask"].sum(1).tolist(), strict=True):
        bound = 5.0 / (length * 16) ** 0.5
        assert 0.9 * bound < row[:length].abs().max() <= bound
        assert not row[length:].any()


def test_the_tuned_teacher_is_saved_whole_where_its_weights_are_nowhere_else(tmp_path):
    run = make_run(tmp_path / "run", lora={"rank": 2, "targets": "all-linear"})
    teacher, stage = tuned(run)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter)
    stage.exports["teacher"].save(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(3, 20, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stage.eval().lm[0](ids).logits)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(teacher.tokenizer)
    again = make_run(tmp_path / "again", {"use": "transformers", "checkpoint": str(tmp_path / "saved")}, tuning="none")
    found, _, _ = teacher_of(again)
    assert found.source
    assert found.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    with torch.no_grad():
        torch.testing.assert_close(found.model.module(ids).logits, loaded(ids).logits)


def test_adapters_are_saved_alone_where_the_weights_lie_on_a_disk(tmp_path):
    whole = make_run(tmp_path / "one", tuning="full")
    tuned(whole)[1].exports["teacher"].save(tmp_path / "base")
    base = {"use": "transformers", "model": str(tmp_path / "base")}
    _, stage = tuned(make_run(tmp_path / "two", base, lora={"rank": 2}))
    stage.exports["teacher"].save(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapters").config.hidden_size == 16


@pytest.mark.parametrize(
    ("teacher", "method", "message"),
    [
        ({"use": "gcn"}, {}, "gcn classifies the nodes of a graph"),
        ({"use": "demo-transformer"}, {}, "must be a causal language model of transformers.*Transformer is none"),
        ({"use": "transformers", "head": "encoder", "config": LLAMA}, {}, "LlamaModel is none"),
        ({"use": "transformers", "head": "masked-lm", "config": {"model_type": "bert", "hidden_size": 12}}, {},
         "BertForMaskedLM is none"),
        ({"use": "transformers", "config": {"model_type": "vit"}}, {}, "no model of type 'vit' with the head"),
        (None, {"tokenizer": "./nowhere"}, "method.tokenizer: './nowhere' cannot be loaded"),
        (None, {"lora": {"targets": ["no_such_layer"]}}, "method.lora does not fit a LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_tuned_are_refused(tmp_path, teacher, method, message):
    with pytest.raises(ModelError, match=message):
        tuned(make_run(tmp_path, teacher, **method))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    teacher, _, _ = teacher_of(make_run(tmp_path / "run"))
    teacher.tokenizer.eos_token = None
    teacher.tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match="the tokenizer has no end token"):
        teacher_of(make_run(tmp_path / "again", tokenizer=str(tmp_path / "endless")))


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_four_bits_leave_adapters_to_be_trained(tmp_path):
    import bitsandbytes

    wide = {"use": "transformers", "config": {**LLAMA, "hidden_size": 64, "intermediate_size": 128}}
    teacher, stage = tuned(make_run(tmp_path, wide, quantize="nf4", lora={"rank": 2, "targets": ["q_proj", "v_proj"]}))
    layers = [m for m in teacher.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7
    assert not isinstance(teacher.model.module.get_output_embeddings(), bitsandbytes.nn.Linear4bit)
    loss = stage.train()(stage.data.sample("train", 2))["completion"]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad.abs().sum() > 0 for p in stage.parameters())


# -- features


def test_a_state_is_the_last_layers_at_the_last_token_whatever_is_in_the_batch(tmp_path):
    run = make_run(tmp_path)
    teacher, made, options = teacher_of(run)
    nodes = run.data.nodes("train").tolist()[:4]
    stage = Features(teacher, made, nodes, True, options)
    together = stage._answered(stage.requests)
    room = max(len(teacher.answer_ids(name)) for name in made.classes)
    for row, request in zip(together, stage.requests, strict=True):
        ids = torch.tensor([teacher.encode(made, request, room)])
        with torch.no_grad():
            found = teacher.model.module.eval()(ids, output_hidden_states=True)
        torch.testing.assert_close(torch.tensor(row["state"]), found.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5)
        assert (row["node"], row["hop"], row["variant"]) == (request.node, request.hop, request.variant)
        assert -1 <= row["answer"] < 4


def corpus(rows: list[tuple[int, int, float, int]], nodes: int = 4, hops: int = 2) -> Corpus:
    """Rows of node, hop, state and answer."""
    table = {"node": [r[0] for r in rows], "hop": [r[1] for r in rows], "variant": [0] * len(rows),
             "state": [[r[2], -r[2]] for r in rows], "answer": [r[3] for r in rows]}  # fmt: skip
    return Corpus(Dataset.from_dict(table), nodes, hops)


LABELS = torch.tensor([0, 1, 0, 1])


def test_states_are_averaged_and_missing_hops_filled():
    rows = [(0, 0, 1.0, 0), (0, 1, 2.0, 0), (0, 1, 4.0, 1), (1, 0, 5.0, 1), (2, 1, 7.0, 0), (3, 0, 9.0, 1)]
    kept, states = assemble(corpus(rows), [2, 0, 1], LABELS, hops=2)
    assert kept == [0, 1, 2]
    assert states[..., 0].tolist() == [[7, 7, 7], [1, 3, 3], [5, 5, 5]]
    torch.testing.assert_close(states[..., 1], -states[..., 0])


def test_correct_mode_drops_wrong_answers_and_nodes_without_right_ones():
    rows = [(0, 0, 1.0, 1), (0, 1, 2.0, 0), (0, 1, 4.0, 1), (1, 0, 5.0, -1), (1, 1, 6.0, 0)]
    kept, states = assemble(corpus(rows), [0, 1], LABELS, hops=2, mode="correct")
    assert kept == [0]
    assert states[0, :, 0].tolist() == [2, 2, 2]
    with pytest.raises(DataError, match="feature_mode=correct"):
        assemble(corpus(rows[3:]), [0, 1], LABELS, hops=2, mode="correct")


def test_a_farther_hop_than_asked_for_is_not_read():
    _, states = assemble(corpus([(0, 0, 1.0, 0), (0, 1, 2.0, 0), (0, 2, 3.0, 0)]), [0], LABELS, hops=1)
    assert states[0, :, 0].tolist() == [1, 2]


def test_votes_by_hop_and_over_all():
    found = corpus([(0, 0, 1.0, 1), (0, 1, 1.0, 1), (0, 2, 1.0, 0), (1, 0, 1.0, -1), (2, 0, 1.0, -2)])
    total, asked = votes(found, 2)
    assert total.tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]
    assert asked.tolist() == [True, True, False, False]
    assert votes(found, 2, hop=2)[1].tolist() == [True, False, False, False]


def test_every_hop_has_one_vote_however_many_prompts_it_has():
    found = corpus([(0, 0, 1.0, 1), (0, 1, 1.0, 1), *[(0, 2, 1.0, 0)] * 4, (1, 1, 1.0, 0), (1, 1, 1.0, -1)])
    total, _ = votes(found, 2)
    assert total[:2].tolist() == [[1, 2], [0.5, 0]]


@pytest.mark.parametrize(
    ("text", "number"),
    [("Neural_Networks", 1), (" neural_networks\nmore", 1), ("Case - Based", 0), ("Neural", -1), ("", -1)],
)
def test_answers_are_read(text, number):
    assert read_answer(text, ["Case-Based", "Neural_Networks"]) == number
