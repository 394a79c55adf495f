"""Tokenizers and vocabularies as they come: rows to spare, no token that pads or ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.data import Task, vocabulary_fingerprint
from kdcore.models import Model, check_pair


def make(task: Task, **options: Any) -> Model:
    torch.manual_seed(0)
    return build(TransformersOptions(**options), task)


def result(model: Model, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch).need("logits").clone()


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_vocabularies_padded_to_different_sizes_are_one(
    family: str, config: Callable[..., dict[str, Any]], tokenizer: Any, tmp_path: Path, texts: Any
) -> None:
    sizes = {"teacher": 128, "student": 100}
    small = (
        {**config("llama"), "num_key_value_heads": 2, "model_type": "qwen2"} if family == "qwen2" else config(family)
    )
    for role, size in sizes.items():
        settings = {**small, "vocab_size": size}
        made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / role)
        tokenizer().save_pretrained(tmp_path / role)
    task = Task("causal-lm", num_classes=40, tokenizer=tokenizer(), vocabulary=vocabulary_fingerprint(tokenizer()))
    models = {role: make(task, model=str(tmp_path / role)) for role in sizes}
    for role, model in models.items():
        assert model.labels.count == sizes[role]
        assert model.labels.vocabulary == task.vocabulary
    check_pair(models["teacher"].labels, models["student"].labels)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_tokenizer_without_pad_or_end_token_builds_trains_and_saves(
    lora: Any, folder: Callable[..., str], tokenizer: Any, tmp_path: Path, texts: Any
) -> None:
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, unk_token="[UNK]")
    assert plain.pad_token_id is None
    assert plain.eos_token_id is None
    where = folder("gpt2", "causal-lm", bos_token_id=None, eos_token_id=None)
    plain.save_pretrained(where)
    task = Task("causal-lm", num_classes=40, tokenizer=plain, vocabulary=vocabulary_fingerprint(plain))
    student = make(task, model=where, lora=lora)
    before = result(student, texts)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.03)
    for _ in range(2):
        student.train()(texts).need("logits").square().mean().backward()
        optimizer.step()
    student.save(tmp_path / "student")
    assert not torch.allclose(result(student, texts), before, atol=1e-3)
    again = make(task, checkpoint=str(tmp_path / "student"))
    torch.testing.assert_close(result(again, texts), result(student, texts), rtol=1e-4, atol=1e-5)
    assert again.labels == student.labels
