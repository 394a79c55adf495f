"""Low-rank adapters, quantised weights, gradient checkpointing, and vocabularies with rows to spare."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file

from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Model, Outputs
from kdcore.options import Options

CLASSES = Task("classification", classes=("cat", "dog", "eel"))
TOKENS = Task("causal-lm", num_classes=40)
CASES = [
    ("gpt2", "causal-lm", TOKENS, None),
    ("gpt2", "causal-lm", TOKENS, ["c_fc", "c_attn"]),
    ("llama", "causal-lm", TOKENS, "all-linear"),
    ("t5", "seq2seq", Task("seq2seq", num_classes=40), ["q", "v", "wi"]),
    ("bert", "masked-lm", Task("masked-lm", num_classes=40), "all-linear"),
    ("bert", "encoder", Task("unlabelled"), None),
    ("bert", "sequence-classification", CLASSES, "all-linear"),
    ("bert", "token-classification", Task("token-classification", classes=("O", "B", "I")), ["query"]),
    ("distilbert", "sequence-classification", CLASSES, ["q_lin"]),
    ("vit", "image-classification", CLASSES, "all-linear"),
    ("segformer", "semantic-segmentation", Task("segmentation", classes=("a", "b", "c")), "all-linear"),
]
IDS = [f"{name}-{head}-{i}" for i, (name, head, *_) in enumerate(CASES)]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def make(task: Task, **options: Any) -> Model:
    torch.manual_seed(0)
    return build(TransformersOptions(**options), task)


def batch_for(name: str, texts: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, Any]:
    if name in ("vit", "segformer"):
        return dict(images)
    return {**texts, "labels": texts["input_ids"]} if name == "t5" else dict(texts)


def result(model: Model, batch: dict[str, Any]) -> torch.Tensor:
    """What a model gives in evaluation mode: logits, or the embedding where there are none."""
    with torch.no_grad():
        return given(model.eval()(batch)).clone()


def given(outputs: Outputs) -> torch.Tensor:
    try:
        return outputs.need("logits")
    except ModelError:
        return outputs.need("embedding")


def trained(model: Model, batch: dict[str, Any], steps: int = 3) -> Model:
    """The model after steps that move everything that has a gradient."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        value = given(model.train()(batch))
        (value * torch.linspace(-1, 1, value.shape[-1])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("name", "head", "task", "targets"), CASES, ids=IDS)
def test_a_student_with_adapters_is_saved_and_loaded_again(
    merge: bool, name: str, head: str, task: Task, targets: Any, folder: Callable[..., str], auto: dict[str, str],
    tmp_path: Path, texts: Any, images: Any,
) -> None:  # fmt: skip
    start = {"decoder_start_token_id": 0} if name == "t5" else {}
    where, batch = folder(name, head, num_labels=3, **start), batch_for(name, texts, images)
    plain = make(task, model=where, head=head)
    lora = {"r": 4, "alpha": 8, "target_modules": targets, "merge": merge}
    student = make(task, model=where, head=head, lora=lora)
    torch.testing.assert_close(result(student, batch), result(plain, batch))
    before = state(student)
    trained(student, batch)
    assert not torch.allclose(result(student, batch), result(plain, batch), atol=1e-3)
    changed = {key for key, value in student.module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora_" in key or ".modules_to_save." in key or "running" in key or "num_batches" in key
               for key in changed)  # fmt: skip

    live = state(student)
    student.save(tmp_path / "student")
    assert all(torch.equal(value, live[key]) for key, value in student.module.state_dict().items())
    assert (tmp_path / "student" / "model.safetensors").exists() is merge
    assert (tmp_path / "student" / "adapter_model.safetensors").exists() is not merge
    again = make(task, checkpoint=str(tmp_path / "student"), head=head)
    torch.testing.assert_close(result(again, batch), result(student, batch), rtol=1e-4, atol=1e-5)
    assert again.labels == student.labels
    assert not any("lora" in key for key in again.module.state_dict())
    alone, info = getattr(transformers, auto[head]).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not merge or not (info["missing_keys"] or info["unexpected_keys"])
    student.module = alone
    torch.testing.assert_close(result(student, batch), result(again, batch), rtol=1e-4, atol=1e-5)


def test_adapters_saved_alone_are_trained_on(folder: Callable[..., str], tmp_path: Path, texts: Any) -> None:
    lora = {"r": 4, "merge": False}
    student = trained(make(TOKENS, model=folder("gpt2", "causal-lm", tokenizer=True), lora=lora), texts)
    student.save(tmp_path / "student")
    assert not (tmp_path / "student" / "model.safetensors").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "student")("word3")["input_ids"] == [3]
    again = make(TOKENS, checkpoint=str(tmp_path / "student"), lora=lora)
    assert again.labels == student.labels
    torch.testing.assert_close(result(again, texts), result(student, texts))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in student.named_parameters() if p.requires_grad
    }
    trained(again, texts).save(tmp_path / "more")
    more = make(TOKENS, checkpoint=str(tmp_path / "more"))
    torch.testing.assert_close(result(more, texts), result(again, texts))


@pytest.mark.parametrize(
    ("lora", "words"),
    [({"r": 8}, "have r=4, `lora` says 8"), ({"r": 4, "alpha": 1}, "lora_alpha=64"),
     ({"r": 4, "target_modules": ["c_fc"]}, "not those that are asked for.*options they were made with")],
)  # fmt: skip
def test_adapters_that_are_not_those_described_are_refused(
    lora: dict[str, Any], words: str, folder: Callable[..., str], tmp_path: Path
) -> None:
    student = make(TOKENS, model=folder("gpt2", "causal-lm"), lora={"r": 4, "merge": False})
    student.save(tmp_path / "student")
    with pytest.raises(ModelError, match=words):
        make(TOKENS, checkpoint=str(tmp_path / "student"), lora={**lora, "merge": False})


def test_a_new_head_and_a_fresh_pooler_are_trained_whole_and_saved_with_the_adapters(
    folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    where = folder("bert", "masked-lm", tokenizer=True)
    student = trained(make(CLASSES, model=where, lora={"r": 2, "merge": False}), texts)
    whole = {n for n, p in student.module.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.partition(".modules_to_save")[0] for n in whole} == {"classifier", "bert.pooler.dense"}
    student.save(tmp_path / "student")
    again = make(CLASSES, checkpoint=str(tmp_path / "student"))
    assert again.labels.names == CLASSES.classes
    torch.testing.assert_close(result(again, texts), result(student, texts))
    with torch.no_grad():
        outputs = again(texts)
    torch.testing.assert_close(again.module.classifier(outputs.need("embedding")), outputs.need("logits"))


def test_a_head_of_another_size_is_taken_from_the_adapters(
    folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    where = folder("bert", "sequence-classification", num_labels=2)
    student = trained(make(CLASSES, model=where, new_head=True, lora={"r": 2, "merge": False}), texts)
    student.save(tmp_path / "student")
    again = make(CLASSES, checkpoint=str(tmp_path / "student"))
    torch.testing.assert_close(result(again, texts), result(student, texts))


@pytest.mark.parametrize(("head", "embedding"), [("bert", 16), ("vit", 16)])
def test_the_embedding_of_an_adapted_classifier_goes_into_its_trained_head(
    head: str, embedding: int, folder: Callable[..., str], texts: Any, images: Any
) -> None:
    kind = "sequence-classification" if head == "bert" else "image-classification"
    lora = {"r": 3, "target_modules": "all-linear"}  # as many rows as classes: an adapter is not taken for the head
    student = make(CLASSES, model=folder(head, kind, num_labels=3), lora=lora)
    batch = batch_for(head, texts, images)
    trained(student, batch).eval()
    with torch.no_grad():
        outputs = student(batch)
        torch.testing.assert_close(student.module.classifier(outputs.need("embedding")), outputs.need("logits"))
    assert outputs.need("embedding").shape == (2, embedding)
    assert ".modules_to_save." in student.head[0]


def test_a_copied_student_trains_and_saves_its_own_adapters(
    folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    student = make(TOKENS, model=folder("llama", "causal-lm"), lora={"r": 2})
    twin = trained(copy.deepcopy(student), texts)
    twin.save(tmp_path / "twin")
    torch.testing.assert_close(result(make(TOKENS, checkpoint=str(tmp_path / "twin")), texts), result(twin, texts))
    assert not torch.allclose(result(twin, texts), result(student, texts), atol=1e-3)


def test_blocks_of_an_adapted_model_are_tapped_by_the_same_names(folder: Callable[..., str], texts: Any) -> None:
    where = folder("gpt2", "causal-lm")
    plain, student = make(TOKENS, model=where), make(TOKENS, model=where, lora={})
    assert student.stages == plain.stages
    assert student.tap("@all", "transformer.h.0.attn.c_attn") == plain.tap("@all", "transformer.h.0.attn.c_attn")
    for key, value in student.eval()(texts).features.items():
        torch.testing.assert_close(value, plain.eval()(texts).features[key])


def test_tied_weights_stay_tied_in_the_merged_model(folder: Callable[..., str], tmp_path: Path, texts: Any) -> None:
    student = make(TOKENS, model=folder("gpt2", "causal-lm", tie_word_embeddings=True), lora={"r": 2})
    trained(student, texts).save(tmp_path / "student")
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_every_kind_of_adapter_merges_exactly(
    bias: str, rslora: bool, folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    lora = {"r": 4, "alpha": 8, "bias": bias, "rslora": rslora, "modules_to_save": ["ln_f"], "dropout": 0}
    student = make(TOKENS, model=folder("gpt2", "causal-lm", tie_word_embeddings=False),
                   lora={**lora, "target_modules": ["wte", "c_attn", "lm_head"]})  # fmt: skip
    kinds = {n for n, p in student.module.named_parameters() if p.requires_grad and "lora" not in n}
    assert any(n.endswith("mlp.c_fc.bias") for n in kinds) == (bias == "all")
    assert any(n.endswith("c_attn.base_layer.bias") for n in kinds) == (bias != "none")
    trained(student, texts).save(tmp_path / "student")
    assert (student.module.transformer.h[0].attn.c_attn.scaling["default"] == 4) is rslora
    again = make(TOKENS, checkpoint=str(tmp_path / "student"))
    torch.testing.assert_close(result(again, texts), result(student, texts), rtol=1e-4, atol=1e-5)


def test_a_half_precision_base_has_adapters_in_full_precision(
    folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    student = make(TOKENS, model=folder("llama", "causal-lm"), dtype="bf16", lora={"r": 2})
    kinds = {("lora_" in n, p.dtype) for n, p in student.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    trained(student, texts).save(tmp_path / "student")
    again = make(TOKENS, checkpoint=str(tmp_path / "student"), dtype="bf16")
    torch.testing.assert_close(result(again, texts), result(student, texts), rtol=0.05, atol=0.02)


def test_fresh_weights_take_adapters_too(config: Callable[..., dict[str, Any]], tmp_path: Path, texts: Any) -> None:
    student = trained(make(TOKENS, config=config("gpt2"), lora={"r": 2}), texts)
    student.save(tmp_path / "student")
    torch.testing.assert_close(result(make(TOKENS, model=str(tmp_path / "student")), texts), result(student, texts))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["c_atn"]}, r"lora.target_modules: .*no module 'c_atn'; did you mean 'c_attn'"),
        ({"target_modules": ["c_attn", "wq"]}, "no module 'wq'"),
        ({"target_modules": ["ln_1"]}, r"lora.target_modules: peft refuses.*Name linear layers, such as .*c_attn"),
        ({"modules_to_save": ["ln_ff"]}, r"lora.modules_to_save: .*no module 'ln_ff'"),
        ({"target_modules": ["wte"]}, "'transformer.wte' shares its weight"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' shares its weight"),
    ],
)
def test_names_that_cannot_take_an_adapter_are_refused(
    lora: dict[str, Any], words: str, config: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=words):
        make(TOKENS, config=config("gpt2", tie_word_embeddings=True), lora=lora)


def test_a_type_of_model_without_a_default_of_peft_asks_for_names(config: Callable[..., dict[str, Any]]) -> None:
    pixels = Task("segmentation", classes=("sky", "sea"))
    with pytest.raises(ModelError, match=r"lora.target_modules: peft refuses its default.*set all-linear"):
        make(pixels, config=config("segformer"), lora={})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "a/b", "lora": {"r": 0}}, "greater than 0"),
        ({"model": "a/b", "lora": {"r": -4}}, "greater than 0"),
        ({"model": "a/b", "lora": {"alpha": 0}}, "greater than 0"),
        ({"model": "a/b", "lora": {"dropout": 1}}, "less than 1"),
        ({"model": "a/b", "lora": {"rank": 4}}, "Extra inputs"),
        ({"model": "a/b", "lora": {"target_modules": "q_proj"}}, "all-linear"),
        ({"model": "a/b", "quantization": "int3"}, "int8"),
        ({"model": "a/b", "quantization": "int4", "lora": {}}, "lora.merge: false"),
        ({"model": "a/b", "pretrained": False, "lora": {"merge": False}}, "lora.merge: true"),
        ({"config": {"model_type": "bert"}, "lora": {"merge": False}}, "lora.merge: true"),
        ({"config": {"model_type": "bert"}, "quantization": "int8"}, "weights that are loaded"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TransformersOptions(**given)


def test_every_option_of_the_adapters_is_described() -> None:
    kind = TransformersOptions.model_fields["lora"].annotation.__args__[0]  # type: ignore[union-attr]
    assert issubclass(kind, Options)
    assert all(field.description and not field.is_required() for field in kind.model_fields.values())


def test_without_peft_or_bitsandbytes_it_is_said_what_to_install(
    folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = folder("gpt2", "causal-lm")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'kd-transformers\[peft\]'"):
        make(TOKENS, model=where, lora={})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"pip install 'kd-transformers\[quantization\]'"):
        make(TOKENS, model=where, quantization="int4")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"peft_type": "PROMPT_TUNING"}, "only LORA"), ({"base_model_name_or_path": None}, "only LORA with a base model"),
     ({"base_model_name_or_path": "/nowhere/at/all"}, "base model '/nowhere/at/all'.*cannot be loaded")],
)  # fmt: skip
def test_adapters_of_another_kind_or_without_their_base_are_refused(
    change: dict[str, Any], words: str, folder: Callable[..., str], tmp_path: Path
) -> None:
    make(TOKENS, model=folder("gpt2", "causal-lm"), lora={"merge": False}).save(tmp_path / "student")
    path = tmp_path / "student" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=words):
        make(TOKENS, checkpoint=str(tmp_path / "student"))


def test_pickled_adapters_are_not_read(folder: Callable[..., str], tmp_path: Path) -> None:
    make(TOKENS, model=folder("gpt2", "causal-lm"), lora={"merge": False}).save(tmp_path / "student")
    weights = tmp_path / "student" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "student" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="only safetensors"):
        make(TOKENS, checkpoint=str(tmp_path / "student"))


def test_adapters_that_peft_saved_by_itself_are_loaded(folder: Callable[..., str], tmp_path: Path, texts: Any) -> None:
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(folder("llama", "causal-lm", tokenizer=True))
    torch.manual_seed(3)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    teacher = make(TOKENS, checkpoint=str(tmp_path / "adapter"))
    assert teacher.labels.vocabulary is not None  # of the tokenizer that lies with the base
    with torch.no_grad():
        expected = tuned.eval()(**texts).logits
    torch.testing.assert_close(result(teacher, texts), expected)
