import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from dataset_distill_toy import Interrupt, recipe
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import kdcore
from kd_dataset_distill import coreset, dilm
from kd_dataset_distill.artifact import find_data
from kd_dataset_distill.functional import generation_loss
from kd_dataset_distill.generator import build
from kd_dataset_distill.options import DiLMOptions, GeneratorOptions
from kd_dataset_distill.texts import Seen, read_text
from kd_demo.grammar import THEMES, TOPICS
from kd_demo.options import TopicsOptions
from kd_demo.text import topics
from kdcore import DataModule, Task
from kdcore.errors import Interrupted
from kdcore.testing.conformance import assert_same_students, effect

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
DILM = {
    "use": "dilm",
    "ipc": 2,
    "lm_steps": 4,
    "iterations": 6,
    "inner": 3,
    "interval": 1,
    "batch_syn": 4,
    "batch_real": 4,
    "real_sets": 2,
    "learner_steps": 1,
    "learner_batch": 4,
    "max_length": 12,
    "over_generate": 4,
    "eval_networks": 1,
    "baselines": [],
}


def texts(**method: Any) -> dict[str, Any]:
    return {
        "method": {"eval_networks": 1, "baselines": [], **method},
        "student": {"use": "demo-transformer", "width": 16, "layers": 1, "heads": 2},
        "data": {"use": "topics", "train": 60, "val": 12, "test": 12},
        "train": {"steps": 2, "batch_size": 4, "save_every": 2},
        "eval": {"on": ["test"]},
    }


def with_generator(**method: Any) -> dict[str, Any]:
    return {**texts(**{**DILM, **method}), "teachers": {"generator": {"use": "dd-generator", "config": CONFIG}}}


def rows_of(path: Path) -> dict[str, Any]:
    return datasets.load_from_disk(str(find_data(path)))[:]


def make_generator(longest: int = 12) -> tuple[Any, Any]:
    data = topics(TopicsOptions(train=30, val=5, test=5))
    torch.manual_seed(0)
    return build(GeneratorOptions(config=CONFIG), data.task), data


def test_classes_begin_with_their_own_token_which_begins_as_any_text():
    model, data = make_generator()
    generator, tokenizer = model.module, data.task.tokenizer
    table = generator.lm.get_input_embeddings().weight
    assert len(table) == len(tokenizer) + 6 + 3
    for label in range(6):
        assert torch.equal(table[generator.size + label], table[tokenizer.start_id])
    ids = generator.ids(("the dentist drilled", None), 4, 12)
    assert ids[0] == generator.size + 4
    assert ids[-1] == generator.end
    assert generator.text(ids.tolist(), paired=False) == ("the dentist drilled", None)
    pair = generator.ids(("the dentist", "drilled"), 0, 12).tolist()
    assert generator.text(pair, paired=True) == ("the dentist", "drilled")
    assert generator.text(generator.ids(("the dentist", None), 0, 12).tolist(), paired=True) is None
    assert len(generator.ids(("the " * 40, None), 0, 12)) == 12


def test_written_texts_depend_on_the_seed_alone_and_hold_no_start_tokens():
    generator = make_generator()[0].module
    first, again, other = (generator.write(1, 300, longest=9, top_p=0.95, seed=s, paired=False) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (300, 9)
    assert (first[:, 0] == generator.size + 1).all()
    body = first[:, 1:]
    assert not ((body >= generator.size) & (body < generator.separator + 1)).any()


def test_labels_are_the_next_tokens_and_padding_does_not_count():
    generator = make_generator()[0].module
    batch = generator.batch([generator.ids(("the dentist drilled", None), 0, 12), generator.ids(("a", None), 1, 12)])
    assert torch.equal(batch["labels"][0, :-1], batch["input_ids"][0, 1:])
    assert batch["labels"][1].tolist()[2:] == [-100] * 3
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]


def stage_of(tmp_path: Path, **options: Any) -> Any:
    """A matching stage with its first texts written, and a batch of two classes."""
    resolved = kdcore.recipe.resolve(kdcore.recipe.load(with_generator(**options)), kdcore.PluginManager())
    run = kdcore.Run(resolved, kdcore.PluginManager(), tmp_path)
    made = DiLMOptions(**{k: v for k, v in {**DILM, **options}.items() if k != "use"})
    stage = dilm.TextMatching(run, dilm.RealTexts(run, "dilm"), made, None)
    stage.before_step([])
    stage.eval()
    return stage, {"label": torch.tensor([0, 3]), "rows": [stage.real.rows[0][:4], stage.real.rows[3][:4]]}


def test_gradient_reaches_the_generator_through_the_weights_only(tmp_path, monkeypatch):
    stage, batch = stage_of(tmp_path)
    terms = stage(batch)
    assert set(terms) == {"match"}
    terms["match"].backward()
    assert sum(p.grad.abs().sum() for p in stage.generator.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in stage.learner.parameters())
    monkeypatch.setattr(dilm, "generation_weights", lambda losses, tau: torch.full_like(losses, 1 / len(losses)))
    found = torch.autograd.grad(stage(batch)["match"], list(stage.generator.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)


@pytest.mark.parametrize("everything", [False, True])
def test_the_gradient_matched_is_that_of_the_weighted_loss(tmp_path, everything):
    stage, batch = stage_of(tmp_path, classifier_only=not everything)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    leaves = stage.learner.leaves(stage.prefix)
    assert (len(leaves) == 2) != everything
    losses = stage._losses(leaves, stage._batch(stage.real.texts[:4], stage.real.labels[:4]))
    found = dilm.weighted_gradient(losses, weights, list(leaves.values()))
    parts = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(leaves.values()), retain_graph=True)])
        for x in losses
    ]
    torch.testing.assert_close(found, sum(w * g for w, g in zip(weights, parts, strict=True)))
    assert stage(batch)["match"].isfinite()


def test_language_modelling_has_its_share(tmp_path):
    stage, batch = stage_of(tmp_path, lm_lambda=0.25, lm_batch=12)
    found = stage(batch)
    assert set(found) == {"match", "lm"}
    alone, _ = stage_of(tmp_path, lm_lambda=1.0, lm_batch=12)
    assert set(alone(batch)) == {"lm"}
    torch.testing.assert_close(found["lm"] / 0.25, alone(batch)["lm"])
    torch.testing.assert_close(found["match"] / 0.75, stage_of(tmp_path)[0](batch)["match"])


def test_learner_takes_the_steps_of_adamw(tmp_path):
    stage, _ = stage_of(tmp_path)
    leaves = stage.learner.leaves()
    plain = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    adam = torch.optim.AdamW(plain.values(), lr=1e-2, weight_decay=dilm.DECAY)
    schedule = get_cosine_schedule_with_warmup(adam, 4, 8)
    for step in range(8):
        gradients = {name: torch.randn_like(value) for name, value in leaves.items()}
        for name, value in plain.items():
            value.grad = gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(plain.values(), dilm.GRADIENT_NORM)
        adam.step()
        schedule.step()
        rate = 1e-2 * dilm.warmed_cosine(step, 8)
        leaves = stage._adamw(leaves, torch.cat([g.flatten() for g in gradients.values()]), step, rate)
    for name, value in plain.items():
        torch.testing.assert_close(leaves[name], value.detach())


def test_diverse_steps_take_their_texts_from_all_clusters(tmp_path):
    stage, _ = stage_of(tmp_path, batch_syn=4)
    points = stage._embedding(stage.written[0], 0)
    first = points[:4]
    chance = torch.stack([torch.pdist(points[torch.randperm(len(points))[:4]]).mean() for _ in range(50)]).mean()
    assert torch.pdist(first).mean() > chance


def test_new_texts_are_put_in_clusters_by_the_last_learner_before_it_begins_afresh(tmp_path, monkeypatch):
    stage, _ = stage_of(tmp_path)
    trained = {name: value + 1 for name, value in stage.learner.leaves().items()}
    stage.learner.take(trained)
    seen = []
    monkeypatch.setattr(stage, "_write", lambda label: seen.append(stage.learner.leaves()) or stage.written[label])
    stage.before_step([])
    assert all(torch.equal(value, trained[name]) for leaves in seen for name, value in leaves.items())
    assert not any(torch.equal(value, trained[name]) for name, value in stage.learner.leaves().items())


@pytest.mark.parametrize(("stage", "step"), [("lm", 3), ("match", 2), ("match", 4)])
def test_dilm_stopped_in_the_middle_ends_bit_for_bit_the_same(tmp_path, stage, step):
    whole = kdcore.run(with_generator(), run_dir=tmp_path / "whole")
    manager = kdcore.PluginManager()
    manager.register(Interrupt(stage, step), name="interrupt")
    with pytest.raises(Interrupted):
        kdcore.run(with_generator(), run_dir=tmp_path / "stopped", plugins=manager)
    resumed = kdcore.run(with_generator(), run_dir=tmp_path / "stopped")
    assert_same_students(whole.path, resumed.path)
    assert rows_of(whole.path) == rows_of(resumed.path)
    generators = [
        load_file(next(r.path.glob("stages/*-match/artifact/generator/model.safetensors"))) for r in (whole, resumed)
    ]
    assert all(torch.equal(value, generators[1][name]) for name, value in generators[0].items())


def test_generator_learns_classes(tmp_path):
    model, data = make_generator()
    generator = model.module
    real = [(data["train"][i]["text"], int(data["train"][i]["label"])) for i in range(30)]
    batch = generator.batch([generator.ids((text, None), label, 12) for text, label in real])
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(20):
        loss = generation_loss(model(batch).logits, batch["labels"]).mean()
        first = first or loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 0.7 * first


def on_topic(path: Path) -> float:
    """The share of nouns and verbs of the small data set that belong to its topics."""
    own = {
        topic: {w for pair in themes.values() for words in pair for w in words.split()}
        for topic, themes in THEMES.items()
    }
    hits = []
    for row in datasets.load_from_disk(str(find_data(path))):
        known = [w for w in row["text"].split() if any(w in words for words in own.values())]
        hits += [word in own[TOPICS[row["label"]]] for word in known]
    return sum(hits) / len(hits)


def test_dilm_beats_language_modelling_alone_and_its_texts_are_truer_to_their_class(tmp_path):
    assert effect("dilm", tmp_path, seeds=(0, 1)) > 0.02
    matched, alone = (sum(on_topic(tmp_path / f"{name}-{seed}") for seed in (0, 1)) for name in ("method", "ablation"))
    assert matched / 2 > alone / 2 + 0.04


def test_texts_of_other_splits_and_repetitions_are_not_new():
    data = topics(TopicsOptions(train=5, val=3, test=3))
    seen = Seen(data)
    known = data["test"][1]["text"]
    assert not seen.new((known.upper().replace(" ", "  "), None))
    assert seen.new(("quite new", None))
    assert not seen.new(("Quite  new", None))
    tokens = {key: value for key, value in data["train"][0].items() if key != "text"}
    assert read_text(tokens, data.task.tokenizer)[0] == data["train"][0]["text"]


def test_synthesis_keeps_what_the_critic_believes_and_what_stands_in_no_other_split(tmp_path):
    made = texts(use="synthesize", ipc=3, over_generate=12, confidence=0.5, examples=1,
                 prompt="{{ examples[0] }} -> on {{ label }}:")  # fmt: skip
    critic = {"use": "demo-transformer", "width": 32, "layers": 1, "heads": 2,
              "train": {"steps": 150, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 3e-3}}}  # fmt: skip
    made["teachers"] = {"teacher": {"use": "scripted-writer", "mistakes": 0.5}, "critic": critic}
    made["data"]["train"] = 600
    result = kdcore.run(made, run_dir=tmp_path / "run")
    rows = rows_of(result.path)
    assert rows["label"] == [label for label in range(6) for _ in range(3)]
    (report,) = result.path.glob("stages/*-write/artifact/report.json")
    dropped = json.loads(report.read_text())["dropped"]
    assert dropped["doubted"] > 40
    assert dropped["empty"] > 0
    run, _ = kdcore.load_student(result.path)
    others = {run.data[split][i]["text"] for split in ("val", "test") for i in range(12)}
    assert not others & set(rows["text"])
    assert len(set(rows["text"])) == 18
    data = {"use": "distilled", "path": str(result.path)}
    again = kdcore.run({**texts(), "method": "supervised", "data": data}, run_dir=tmp_path / "again")
    assert kdcore.load_student(again.path)[0].data.sample("train", 18)["label"].tolist() == rows["label"]


def test_synthesis_interrupted_asks_no_prompt_twice(tmp_path):
    made = {**texts(use="synthesize", ipc=8, over_generate=4), "teacher": {"use": "scripted-writer"}}
    whole = kdcore.run(made, run_dir=tmp_path / "whole")
    manager = kdcore.PluginManager()
    manager.register(Interrupt("write", 2), name="interrupt")
    with pytest.raises(Interrupted):
        kdcore.run(made, run_dir=tmp_path / "stopped", plugins=manager)
    assert len(list(tmp_path.glob("stopped/stages/*-write/shards/*"))) == 2
    assert rows_of(kdcore.run(made, run_dir=tmp_path / "stopped").path) == rows_of(whole.path)


def test_perplexity_is_of_the_tokens_that_count():
    logits, ids = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = coreset.next_tokens({"input_ids": ids, "attention_mask": mask})
    assert labels[1].tolist() == [int(ids[1, 1]), -100, -100, -100]
    found = coreset.perplexity(logits, labels)
    torch.testing.assert_close(found[1], F.cross_entropy(logits[1, :1], ids[1, 1:2]).exp())


@pytest.mark.parametrize("keep", ["low", "middle", "high"])
def test_perplexity_selects_by_a_language_model(tmp_path, keep):
    made = texts(use="coreset", select="perplexity", keep=keep, fraction=0.2, baselines=["random"])
    made["data"] = {"use": "sentences", "train": 40, "val": 8, "test": 8}
    made["teacher"] = {"use": "demo-transformer", "width": 16, "layers": 1, "heads": 2, "train": {"steps": 5}}
    result = kdcore.run(made, run_dir=tmp_path / "run")
    state = load_file(next(result.path.glob("stages/*-select/artifact/tensors.safetensors")))
    run, _ = kdcore.load_student(result.path)
    run.models["teacher"] = None
    chosen, rest = state["scores"][state["index"]], state["scores"][~torch.isin(torch.arange(40), state["index"])]
    assert len(chosen) == 8
    assert chosen.min() >= rest.max()
    assert result.rows[1]["samples"] == 8
    positive = {"low": -1, "high": 1}.get(keep)
    assert positive is None or (positive * state["scores"] > 1).all()


@pytest.mark.parametrize("select", ["random", "herding", "k-centers"])
def test_selection_takes_so_many_of_each_class(tmp_path, select):
    result = kdcore.run(texts(use="coreset", select=select, ipc=2), run_dir=tmp_path / "run")
    rows = rows_of(result.path)
    assert rows["label"] == [label for label in range(6) for _ in range(2)]
    run, _ = kdcore.load_student(result.path)
    assert [run.data["train"][i]["text"] for i in rows["index"]] == rows["text"]


def less(**options: Any) -> dict[str, Any]:
    made = texts(use="coreset", select="less", fraction=0.2, warmup_fraction=0.5, warmup_epochs=2, warmup_lr=1e-3,
                 proj_dim=64, **options)  # fmt: skip
    made["train"].update(save_every=3)
    return made


def test_less_stopped_in_its_warm_up_ends_the_same_and_keeps_a_state_per_epoch(tmp_path):
    whole = kdcore.run(less(), run_dir=tmp_path / "whole")
    manager = kdcore.PluginManager()
    manager.register(Interrupt("warm-up", 10), name="interrupt")
    with pytest.raises(Interrupted):
        kdcore.run(less(), run_dir=tmp_path / "stopped", plugins=manager)
    assert rows_of(kdcore.run(less(), run_dir=tmp_path / "stopped").path) == rows_of(whole.path)
    state = load_file(next(whole.path.glob("stages/*-warm-up/artifact/stage.safetensors")))
    assert not torch.equal(state["moments.values"][0], state["moments.values"][1])
    assert (state["moments.exp_avg_sq"] >= 0).all()
    assert 0 < state["moments.rates"][1] < state["moments.rates"][0] <= 1e-3
    scores = load_file(next(whole.path.glob("stages/*-influence/artifact/scores.safetensors")))["scores"]
    assert scores.shape == (60,)
    assert scores.abs().max() <= 1 + 1e-5
    index = rows_of(whole.path)["index"]
    assert sorted(index) == sorted(scores.topk(12).indices.tolist())


def test_less_takes_gradients_of_adapters_only(tmp_path):
    pytest.importorskip("peft")
    made = less(lora={"r": 2, "alpha": 4, "dropout": 0.0, "targets": ["query", "value"]}, subtask="label")
    made["student"] = {
        "use": "transformers",
        "config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    }
    result = kdcore.run(made, run_dir=tmp_path / "run")
    state = load_file(next(result.path.glob("stages/*-warm-up/artifact/stage.safetensors")))
    adapters = sum(value.numel() for name, value in state.items() if "lora_" in name and name.startswith("student."))
    assert state["moments.values"].shape == (2, adapters)
    assert adapters == 2 * 2 * (16 + 16)
    made["method"]["lora"]["targets"] = ["no_such_layer"]
    with pytest.raises(kdcore.UserError, match=r"lora.targets"):
        kdcore.run(made, run_dir=tmp_path / "wrong")


def test_selection_works_without_classes_and_for_images(tmp_path, run):
    made = texts(use="coreset", select="random", fraction=0.1)
    made["data"] = {"use": "sentences", "train": 40, "val": 8, "test": 8}
    assert rows_of(kdcore.run(made, run_dir=tmp_path / "text").path).keys() == {"index"}
    result = run(recipe(use="coreset", select="herding", ipc=3))
    assert len(rows_of(result.path)["index"]) == 12


@pytest.mark.parametrize("method", ["coreset", "synthesize"])
def test_quickstart_beats_its_ablation(tmp_path, method):
    assert effect(method, tmp_path, seeds=(0, 1)) > {"coreset": 0.06, "synthesize": 0.15}[method]


def test_data_without_tokenizer_gives_raw_texts():
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
    from kd_dataset_distill.artifact import as_data

    data = DataModule({"train": [{"text": "x", "label": torch.tensor(0)}]}, Task("classification", ("a", "b")))
    assert as_data(rows, data).sample("train")["text"] == ["one", "two"]
