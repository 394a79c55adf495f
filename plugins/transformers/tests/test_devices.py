"""Teachers that stand on several devices: they say what they say on one, stay there, and teach and are cached alike."""

from __future__ import annotations

import json

import pytest
import torch

import kdcore
from kd_transformers.build import build, build_student
from kd_transformers.options import TextOptions, TransformersOptions
from kd_transformers.text import TransformersText
from kdcore.data import Task
from kdcore.errors import ModelError, RecipeError
from kdcore.options import Sampling

TOKENS = Task("causal-lm", num_classes=40)
MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
       "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture
def divided(folder, tmp_path):
    """Options of a model of which parts lie on the disk: all that one machine without accelerators has to divide."""
    return {"model": folder("llama", "causal-lm"), "device_map": MAP, "offload_folder": str(tmp_path / "offloaded")}


def test_it_says_what_it_says_on_one_device_and_stays_where_it_is(divided):
    whole = build(TransformersOptions(model=divided["model"]), TOKENS).freeze()
    model = build(TransformersOptions(**divided), TOKENS).freeze()
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert set(places.values()) == {"cpu", "meta"}
    model.to(torch.float64).to("meta")
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == places
    for each in (model, whole):
        each.tap("@all")
    with torch.no_grad():
        ours, theirs = model({"input_ids": IDS}), whole({"input_ids": IDS})
    assert torch.equal(ours.logits, theirs.logits)
    for name, feature in theirs.features.items():
        assert torch.equal(ours.features[name], feature)


def test_a_run_learns_from_it_and_from_its_cache_what_it_learns_from_the_whole(divided, tmp_path):
    small = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    recipe = {
        "method": "distill", "losses": [{"use": "fkl"}], "trackers": [], "eval": {"metrics": ["perplexity"]},
        "data": {"use": "sentences", "prompt": 2, "train": 16, "val": 4},
        "student": {"use": "transformers", "config": small}, "train": {"steps": 3, "batch_size": 4, "log_every": 1},
    }  # fmt: skip
    size = kdcore.plan({**recipe, "teacher": {"use": "transformers", "config": small}}).resolved
    task = kdcore.Run(size, kdcore.PluginManager(), tmp_path / "unused").data.task
    teacher = build(TransformersOptions(config={**small, "num_hidden_layers": 2, "hidden_size": 16}), task)
    teacher.save(tmp_path / "teacher")
    one = {"use": "transformers", "checkpoint": str(tmp_path / "teacher")}
    several = {**one, "device_map": MAP, "offload_folder": divided["offload_folder"]}
    cache = {"logits": "all", "dtype": "float32", "folder": str(tmp_path / "caches"), "splits": ["train"]}
    terms = []
    for name, spec in {"one": one, "several": several, "cached": {**several, "cache": cache}}.items():
        result = kdcore.run({**recipe, "teacher": spec}, run_dir=tmp_path / name)
        rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
        terms.append([row["terms"]["fkl"] for row in rows if "terms" in row])
    assert len(terms[0]) == 3
    assert terms[1] == pytest.approx(terms[0], rel=1e-6)
    assert terms[2] == pytest.approx(terms[0], rel=1e-5)


def test_a_text_teacher_writes_from_several_devices(folder, tmp_path):
    model = folder("llama", "causal-lm", tokenizer=True)
    asked = (["word3 word4"], Sampling(max_tokens=5), [1])
    whole = TransformersText(TextOptions(model=model)).to("cpu").generate(*asked)
    more = {"device_map": MAP, "offload_folder": str(tmp_path / "off")}
    assert TransformersText(TextOptions(model=model, **more)).to("cpu").generate(*asked) == whole


def test_what_cannot_be_divided_is_told(divided):
    with pytest.raises(ModelError, match=r"device_map: a student .*`train\.shard`"):
        build_student(TransformersOptions(**divided), TOKENS)
    with pytest.raises(ValueError, match="offload_folder"):
        TransformersOptions(model=divided["model"], device_map=MAP)
    with pytest.raises(ValueError, match="for weights that are loaded"):
        TransformersOptions(config={"model_type": "llama"}, device_map="auto")
    with pytest.raises(RecipeError, match="device_map"):
        kdcore.plan("kd", ["teacher={use: transformers, model: x, device_map: 3}"])
