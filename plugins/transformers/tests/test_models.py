"""What models give for a batch, and that a saved one loads without this project."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.data import Task
from kdcore.models import Model

CLASSES = Task("classification", classes=("cat", "dog", "eel"))
TOKENS = Task("token-classification", classes=("O", "B", "I"))
PIXELS = Task("segmentation", classes=("sky", "sea", "sand"))
CASES = [
    ("bert", "sequence-classification", CLASSES),
    ("bert", "token-classification", TOKENS),
    ("bert", "masked-lm", Task("masked-lm", num_classes=40)),
    ("bert", "encoder", Task("unlabelled")),
    ("distilbert", "sequence-classification", CLASSES),
    ("gpt2", "causal-lm", Task("causal-lm", num_classes=40)),
    ("llama", "causal-lm", Task("causal-lm", num_classes=40)),
    ("t5", "seq2seq", Task("seq2seq", num_classes=40)),
    ("vit", "image-classification", CLASSES),
    ("segformer", "semantic-segmentation", PIXELS),
]
IDS = [f"{name}-{head}" for name, head, _ in CASES]


def make(task: Task, **options: Any) -> Model:
    return build(TransformersOptions(**options), task).eval()


def batch_for(name: str, texts: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, Any]:
    if name in ("vit", "segformer"):
        return dict(images)
    return {**texts, "labels": texts["input_ids"]} if name == "t5" else dict(texts)


@pytest.mark.parametrize(("name", "head", "task"), CASES, ids=IDS)
def test_a_local_folder_gives_what_transformers_gives(
    name: str, head: str, task: Task, folder: Callable[..., str], auto: dict[str, str], texts: Any, images: Any
) -> None:
    start = {"decoder_start_token_id": 0} if name == "t5" else {}
    where = folder(name, head, num_labels=3, **start)
    model = make(task, model=where, head=head)
    batch = batch_for(name, texts, images)
    with torch.no_grad():
        outputs = model(batch)
        plain = getattr(transformers, auto[head]).from_pretrained(where).eval()
        given = {"pixel_values": _normalised(batch["image"], name)} if "image" in batch else dict(batch)
        if "labels" in given:
            given["decoder_input_ids"] = plain.prepare_decoder_input_ids_from_labels(labels=given.pop("labels"))
        expected = plain(**given)
    if head == "encoder":
        hidden = expected.last_hidden_state
        pooled = torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)])
        torch.testing.assert_close(outputs.need("embedding"), pooled)
        assert outputs.logits is None
    else:
        torch.testing.assert_close(outputs.need("logits"), expected.logits)


def _normalised(image: torch.Tensor, name: str) -> torch.Tensor:
    mean, std = ([0.5] * 3, [0.5] * 3) if name == "vit" else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(("name", "head", "task"), CASES, ids=IDS)
def test_auto_finds_the_head_of_the_task_and_stages_can_be_tapped(
    name: str, head: str, task: Task, config: Callable[..., dict[str, Any]], texts: Any, images: Any
) -> None:
    model = make(task, config=config(name))
    names = model.tap("@all")
    outputs = model(batch_for(name, texts, images))
    assert list(outputs.features) == list(model.stages) == names
    assert len(names) == (4 if name in ("t5", "segformer") else 2)
    assert all(isinstance(value, torch.Tensor) and value.ndim >= 3 for value in outputs.features.values())
    assert all(value.shape[0] == 2 for value in outputs.features.values())
    assert (outputs.logits is None) == (head == "encoder")


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit"])
def test_the_embedding_goes_through_the_classifier_to_the_logits(
    name: str, config: Callable[..., dict[str, Any]], texts: Any, images: Any
) -> None:
    changes = {"pad_token_id": 0} if name == "gpt2" else {}
    model = make(CLASSES, config=config(name, **changes))
    with torch.no_grad():
        outputs = model(batch_for(name, texts, images))
        classifier = model.module.score if name == "gpt2" else model.module.classifier
        torch.testing.assert_close(classifier(outputs.need("embedding")), outputs.need("logits"))
    assert outputs.need("embedding").shape == (2, 16)


def test_a_copied_model_catches_its_own_embedding(config: Callable[..., dict[str, Any]], texts: Any) -> None:
    model = make(CLASSES, config=config("bert"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.module.classifier.weight.zero_()
        twin.module.bert.pooler.dense.weight.zero_()
        expected = twin.module.bert.pooler.dense.bias.tanh().expand(2, -1)
        torch.testing.assert_close(twin(texts).need("embedding"), expected)
        assert not torch.allclose(model(texts).need("embedding"), expected)


def test_class_token_pooling_takes_the_first_token(config: Callable[..., dict[str, Any]], texts: Any) -> None:
    model = make(Task("unlabelled"), config=config("bert"), pooling="cls")
    with torch.no_grad():
        hidden = model.module(**texts).last_hidden_state
        torch.testing.assert_close(model(texts).need("embedding"), hidden[:, 0])
    assert not any(p.requires_grad for p in model.module.pooler.parameters())


def test_the_encoder_of_an_encoder_decoder_reads_texts_alone(config: Callable[..., dict[str, Any]], texts: Any) -> None:
    model = make(Task("unlabelled"), config=config("t5"), head="encoder")
    assert model(texts).need("embedding").shape == (2, 16)
    assert model.stages == ("encoder.block.0", "encoder.block.1")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
def test_padding_on_either_side_changes_nothing(
    name: str, head: str, config: Callable[..., dict[str, Any]], texts: Any
) -> None:
    task = CLASSES if head == "sequence-classification" else Task("causal-lm", num_classes=40)
    model = make(task, config=config(name, pad_token_id=0))
    left = {"input_ids": texts["input_ids"].clone(), "attention_mask": texts["attention_mask"].clone()}
    for key, value in texts.items():
        left[key][1] = value[1].roll(3)
    alone = {key: value[1:, :4] for key, value in texts.items()}
    with torch.no_grad():
        results = [model(batch) for batch in (texts, left, alone)]
    if head == "causal-lm":
        right, leftward, single = results[0].logits[1, :4], results[1].logits[1, 3:], results[2].logits[0]
    else:
        right, leftward, single = (r.embedding[-1] for r in results)
    torch.testing.assert_close(right, single)
    torch.testing.assert_close(leftward, single)


def test_a_causal_model_made_from_bert_does_not_see_the_future(
    config: Callable[..., dict[str, Any]], texts: Any
) -> None:
    model = make(Task("causal-lm", num_classes=40), config=config("bert"))
    changed = {**texts, "input_ids": texts["input_ids"].clone()}
    changed["input_ids"][0, 5] = (changed["input_ids"][0, 5] + 1) % 40
    with torch.no_grad():
        before, after = model(texts).need("logits")[0], model(changed).need("logits")[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_labels_never_reach_the_model(config: Callable[..., dict[str, Any]], texts: Any) -> None:
    model = make(TOKENS, config=config("bert"))
    with torch.no_grad():
        plain = model(texts).need("logits")
        torch.testing.assert_close(model({**texts, "labels": torch.full((2, 7), 10**6)}).need("logits"), plain)


def test_images_are_normalised_as_the_checkpoint_says(folder: Callable[..., str], images: Any) -> None:
    where = folder("vit", "image-classification", num_labels=3)
    settings = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]}
    Path(where, "preprocessor_config.json").write_text(json.dumps(settings))
    model = make(CLASSES, model=where)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.module(pixel_values=(images["image"] - mean) / std).logits
        torch.testing.assert_close(model(images).need("logits"), expected)


@pytest.mark.parametrize("nested", [True, False])
def test_images_stay_as_they_are_where_the_checkpoint_says_so(
    nested: bool, folder: Callable[..., str], images: Any
) -> None:
    where = folder("vit", "image-classification", num_labels=3)
    settings: dict[str, Any] = {"do_normalize": False, "do_flip_channel_order": True}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    Path(where, name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    model = make(CLASSES, model=where)
    with torch.no_grad():
        expected = model.module(pixel_values=images["image"].flip(1)).logits
        torch.testing.assert_close(model(images).need("logits"), expected)


def test_a_fresh_image_model_takes_the_shape_of_the_images(config: Callable[..., dict[str, Any]]) -> None:
    task = Task("classification", num_classes=10, image=(1, 16, 16))
    changes = {key: value for key, value in config("vit").items() if key != "image_size"}
    model = make(task, config=changes)
    with torch.no_grad():
        assert model({"image": torch.full((2, 1, 16, 16), 0.5)}).need("logits").shape == (2, 10)
    assert model.module.config.num_channels == 1


def test_half_precision_teachers_take_ordinary_images(folder: Callable[..., str], images: Any) -> None:
    model = make(CLASSES, model=folder("vit", "image-classification", num_labels=3), dtype="bf16")
    with torch.no_grad():
        assert model(images).need("logits").dtype == torch.bfloat16


RELOAD = """
import json, sys
from importlib.abc import MetaPathFinder
class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kdcore", "kd_transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import transformers
from safetensors.torch import load_file, save_file
for where, auto in json.loads(sys.argv[1]):
    model, info = getattr(transformers, auto).from_pretrained(where, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    out = model.eval()(**load_file(where + "/batch.safetensors"))
    out = out.logits if "logits" in out else out.last_hidden_state
    save_file({"out": out.contiguous()}, where + "/out.safetensors")
for where in json.loads(sys.argv[2]):
    assert transformers.AutoTokenizer.from_pretrained(where)("word3 word4")["input_ids"] == [3, 4]
assert not any(name.partition(".")[0] in ("kdcore", "kd_transformers") for name in sys.modules)
"""


def test_every_saved_model_loads_with_transformers_alone(
    tmp_path: Path, auto: dict[str, str], config: Callable[..., dict[str, Any]], texts: Any, images: Any, tokenizer: Any
) -> None:
    jobs, expected, with_tokenizer = [], [], []
    for (name, head, task), case in zip(CASES, IDS, strict=True):
        text = name not in ("vit", "segformer")
        model = make(replace(task, tokenizer=tokenizer()) if text else task, config=config(name), head=head)
        where = tmp_path / case
        model.save(where)
        batch = batch_for(name, texts, images)
        inputs = {"pixel_values": _normalised(batch["image"], name)} if "image" in batch else dict(texts)
        if name == "t5":
            batch["decoder_input_ids"] = inputs["decoder_input_ids"] = texts["input_ids"].flip(1).contiguous()
        save_file(inputs, where / "batch.safetensors")
        with torch.no_grad():
            raw = model.module(**inputs) if head == "encoder" else model(batch)
        expected.append((raw.last_hidden_state if head == "encoder" else raw.logits).detach())
        jobs.append((str(where), auto[head]))
        with_tokenizer += [str(where)] if text else []
    command = [sys.executable, "-c", RELOAD, json.dumps(jobs), json.dumps(with_tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for (where, _), value in zip(jobs, expected, strict=True):
        torch.testing.assert_close(load_file(f"{where}/out.safetensors")["out"], value)
    settings = json.loads((tmp_path / "segformer-semantic-segmentation" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406]
    names = json.loads((tmp_path / "bert-sequence-classification" / "config.json").read_text())["id2label"]
    assert names == {"0": "cat", "1": "dog", "2": "eel"}


def test_a_saved_student_is_the_same_as_a_checkpoint(tmp_path: Path, config: Any, texts: Any) -> None:
    student = make(CLASSES, config=config("bert"))
    student.save(tmp_path / "student")
    again = make(CLASSES, config=config("bert"), checkpoint=str(tmp_path / "student"))
    with torch.no_grad():
        torch.testing.assert_close(again(texts).need("logits"), student(texts).need("logits"))
    assert again.labels == student.labels
