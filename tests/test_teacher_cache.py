"""Teacher caches of whole runs: texts of different lengths, maps, several processes, and the command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import kdcore
from kdcore.cache import read_facts
from kdcore.testing.conformance import assert_same_students

LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
         "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
TEXTS = {
    "method": {"use": "distill"},
    "teacher": {"use": "transformers", "config": {**LLAMA, "hidden_size": 32, "intermediate_size": 64}},
    "student": {"use": "transformers", "config": {**LLAMA, "hidden_size": 16, "intermediate_size": 32}},
    "losses": [{"use": "jsd"}], "data": {"use": "sentences", "prompt": 2, "train": 64, "val": 16, "test": 16},
    "train": {"epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
    "trackers": [], "eval": {"metrics": []},
}  # fmt: skip
MAPS = {
    "method": {"use": "distill"}, "teacher": {"use": "demo-segmenter"}, "student": {"use": "demo-segmenter"},
    "losses": [{"use": "kd"}, {"use": "cross-entropy"}], "data": {"use": "shapes", "size": 16, "train": 24},
    "train": {"epochs": 2, "batch_size": 8}, "trackers": [],
}  # fmt: skip


def run(recipe: dict, where: Path, cache: dict | None = None, **teacher) -> Path:
    changed = {**recipe["teacher"], **teacher, **({"cache": {"folder": "caches", **cache}} if cache else {})}
    return kdcore.run({**recipe, "teacher": changed}, run_dir=where).path


@pytest.mark.parametrize("cache", [{"dtype": "float32"}, {"logits": "hidden", "dtype": "float32"}])
def test_a_language_model_learns_from_the_cache_what_it_learns_from_the_teacher(here, cache):
    live = run(TEXTS, here / "live")
    assert_same_students(live, run(TEXTS, here / "cached", cache), tolerance=1e-4)


@pytest.mark.parametrize("cache", [{"dtype": "float32"}, {"dtype": "float16"}, {"logits": "top-k", "k": 4}])
def test_a_segmentation_learns_from_the_cache_what_it_learns_from_the_teacher(here, cache):
    live = run(MAPS, here / "live")
    tolerance = 1e-4 if cache.get("dtype") == "float32" else 0.05
    assert_same_students(live, run(MAPS, here / "cached", cache), tolerance=tolerance)


def test_only_tokens_are_held_and_no_padding(here):
    found = kdcore.fill_cache(TEXTS, options={"folder": "caches", "logits": "top-k", "k": 4})
    facts = read_facts(found["teacher"])
    data = kdcore.PluginManager().get("data", "sentences")
    module = data.load_target()(data.load_options()(prompt=2, train=64, val=16, test=16))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in module.eval_loader("train", 16))
    assert facts["bytes"] / facts["bytes_per_unit"] == pytest.approx(tokens)
    assert facts["bytes_per_unit"] == 4 * (2 + 2) + 2


def test_several_processes_fill_the_same_cache_and_read_it(kd_process, here):
    recipe = here / "texts.yaml"
    recipe.write_text(json.dumps(TEXTS))
    digests = []
    for name, more in (("one", []), ("two", ["--processes", "2"])):
        done = kd_process("cache", recipe.name, "--folder", name, "--logits", "sampled", "--k", "6", "--json", *more)
        assert done.returncode == 0, done.stderr
        path = Path(json.loads(done.stdout)["teacher"]["path"])
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.glob("train/*/*.arrow"))])
        cache = f"teacher.cache={{folder: {name}, logits: sampled, k: 6}}"
        done = kd_process("run", recipe.name, cache, "--run-dir", f"run-{name}", "--json", *more)
        assert done.returncode == 0, done.stderr
        assert "teacher-cache" not in done.stdout
    assert digests[0] == digests[1]
    assert len(digests[0]) == 1
    assert_same_students(here / "run-one", here / "run-two", tolerance=1e-5)


def test_the_command_tells_size_time_and_error(kd_process, here):
    done = kd_process("cache", "kd", "teacher.train=false", "--folder", "caches", "--dtype", "int8")
    assert done.returncode == 0, done.stderr
    told, _, result = done.stdout.partition("Error of what is held")
    assert "541 of 541 rows to be made, 7.6 kB, about" in told
    assert "cross_entropy" in result
    assert "14 bytes a sample or token" in result
    again = kd_process("cache", "kd", "teacher.train=false", "--folder", "caches", "--dtype", "int8")
    assert "to be made" not in again.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (["kd"], "teachers.teacher.train: the recipe trains this teacher first"),
    (["kd", "--teacher", "tom"], "name the teacher whose cache is to be filled, one of: teacher"),
    (["kd", "teacher.train=false", "--logits", "few"], "teachers.teacher.cache.logits: Input should be 'all'"),
    (["kd", "teacher.train=false", "--views", "2"], "views: the data is not augmented"),
])  # fmt: skip
def test_wrong_input_ends_with_what_is_wrong(kd_process, arguments, said):
    done = kd_process("cache", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_views_of_augmented_images_are_replayed_by_the_loader_and_its_workers(here):
    recipe = {"method": {"use": "distill"}, "teacher": {"use": "demo-cnn"}, "student": {"use": "demo-cnn", "width": 8},
              "losses": [{"use": "kd"}], "trackers": [],
              "data": {"use": "digits", "augment": True, "train_fraction": 0.1},
              "train": {"epochs": 3, "batch_size": 32}}  # fmt: skip
    cache = {"views": 2, "dtype": "float32"}
    one = run(recipe, here / "one", cache)
    two = run({**recipe, "train": {**recipe["train"], "workers": 2}}, here / "two", cache)
    assert_same_students(one, two, tolerance=0)
    torch.set_num_threads(1)
