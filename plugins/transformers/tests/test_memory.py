"""What saves memory: quantised weights, and blocks that are computed again in the backward pass."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import kdcore
from kd_transformers import plugin
from kd_transformers.build import build, build_student
from kd_transformers.options import TransformersOptions
from kdcore.api import evaluate
from kdcore.components import Component
from kdcore.data import DataModule, Task
from kdcore.errors import Interrupted, ModelError, RecipeError
from kdcore.losses import Loss, Weighted
from kdcore.models import Batch, Model, Outputs
from kdcore.stages import Distill, Method, Stage, make_optimizer

CLASSES = Task("classification", classes=("cat", "dog", "eel"))
TOKENS = Task("causal-lm", num_classes=40)
WIDE = {"hidden_size": 64, "intermediate_size": 128}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def make(task: Task, **options: Any) -> Model:
    torch.manual_seed(0)
    return build(TransformersOptions(**options), task)


def result(model: Model, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch).need("logits").clone()


def batch_for(name: str, texts: dict[str, torch.Tensor], images: dict[str, torch.Tensor]) -> dict[str, Any]:
    if name == "vit":
        return dict(images)
    return {**texts, "labels": texts["input_ids"]} if name == "t5" else dict(texts)


def train(model: Model, batch: dict[str, Any]) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        model.train()(batch).need("logits").square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@needs_bitsandbytes
@pytest.mark.parametrize(("quantization", "kind"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")])
def test_a_quantised_teacher_is_close_to_the_whole_one_and_can_be_moved(
    quantization: str, kind: str, folder: Callable[..., str], texts: Any
) -> None:
    where = folder("llama", "causal-lm", **WIDE)
    whole, teacher = make(TOKENS, model=where), make(TOKENS, model=where, quantization=quantization)
    assert type(teacher.module.model.layers[0].mlp.up_proj).__name__ == kind
    assert not any(p.requires_grad for p in teacher.parameters())
    expected, got = result(whole, texts), result(teacher, texts)
    assert 0 < (got - expected).std() / expected.std() < (0.05 if quantization == "int8" else 0.3)
    nn.ModuleList([teacher]).to(torch.device("cpu"))
    teacher.freeze().to("cpu")
    assert torch.equal(result(teacher, texts), got)


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_student_trains_adapters_only(
    quantization: str, folder: Callable[..., str], tmp_path: Path, texts: Any
) -> None:
    where = folder("llama", "causal-lm", **WIDE)
    options = {"model": where, "quantization": quantization, "lora": {"r": 4, "merge": False, "dropout": 0}}
    student = build_student(TransformersOptions(**options), TOKENS)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {
        n for n, _ in student.named_parameters() if "lora_" in n
    }
    before = result(student, texts)
    train(student, texts)
    got = result(student, texts)
    assert not torch.allclose(got, before, atol=1e-3)
    student.save(tmp_path / "student")
    again = make(TOKENS, **{**options, "model": None, "checkpoint": str(tmp_path / "student")})
    torch.testing.assert_close(result(again, texts), got, rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in json.loads((tmp_path / "student" / "base" / "config.json").read_text())
    merged = make(TOKENS, checkpoint=str(tmp_path / "student"))
    assert (result(merged, texts) - got).std() / got.std() < 0.3

    kept = {key: value.clone() for key, value in student.state_dict().items()}
    fresh = build_student(TransformersOptions(**options), TOKENS)
    fresh.load_state_dict(kept)
    torch.testing.assert_close(result(fresh, texts), got, rtol=1e-3, atol=1e-3)


@needs_bitsandbytes
def test_gradients_through_four_bits_are_those_through_the_weights_they_stand_for(
    folder: Callable[..., str], texts: Any
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    lora = {"r": 4, "merge": False, "dropout": 0, "target_modules": "all-linear"}
    student = make(TOKENS, model=folder("llama", "causal-lm", **WIDE), quantization="int4", lora=lora)
    _stir(student)
    result(student, texts)  # as the engine does before the first step
    plain = copy.deepcopy(student)
    for name, layer in list(plain.module.named_modules()):
        if name.endswith(".base_layer"):
            made = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            made.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.module.set_submodule(name, made)
    for model in (student, plain):
        model.train()(texts).need("logits").square().mean().backward()
    found = {n: (p.grad, plain.get_parameter(n).grad) for n, p in student.named_parameters() if p.grad is not None}
    assert len(found) == 2 * 2 * 7
    for ours, expected in found.values():
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@needs_bitsandbytes
def test_a_quantised_student_without_adapters_or_with_merged_ones_is_refused(
    folder: Callable[..., str], tmp_path: Path
) -> None:
    options = TransformersOptions(model=folder("llama", "causal-lm"), quantization="int8")
    with pytest.raises(ModelError, match=r"quantised weights cannot be trained; add `lora"):
        build_student(options, TOKENS)
    build(options, TOKENS).save(tmp_path / "quantised")
    for lora, words in ((None, "cannot be trained"), ({}, "lora.merge: .*set `merge: false`")):
        with pytest.raises(ModelError, match=words):
            build_student(TransformersOptions(model=str(tmp_path / "quantised"), lora=lora), TOKENS)


@needs_bitsandbytes
def test_nothing_of_a_quantised_model_is_given_to_an_optimizer(folder: Callable[..., str]) -> None:
    from kdcore.recipe import OptimizerOptions

    teacher = make(TOKENS, model=folder("llama", "causal-lm"), quantization="int8")
    with pytest.raises(RecipeError, match="nothing to train"):
        make_optimizer(teacher.parameters(), OptimizerOptions())


class Counted:
    """Counts how often a block runs."""

    def __init__(self, block: nn.Module) -> None:
        self.calls = 0
        block.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("lora", [None, {"r": 2, "dropout": 0, "target_modules": "all-linear"}])
@pytest.mark.parametrize(("name", "head", "task", "block"), [
    ("gpt2", "causal-lm", TOKENS, "transformer.h.1.mlp"),
    ("llama", "causal-lm", TOKENS, "model.layers.1.mlp"),
    ("bert", "sequence-classification", CLASSES, "bert.encoder.layer.1.attention"),
    ("t5", "seq2seq", Task("seq2seq", num_classes=40), "decoder.block.1.layer.2"),
    ("vit", "image-classification", CLASSES, "vit.layers.1.mlp"),
])  # fmt: skip
def test_blocks_are_computed_again_with_the_same_gradients(
    name: str, head: str, task: Task, block: str, lora: Any, folder: Callable[..., str], texts: Any, images: Any
) -> None:
    start = {"decoder_start_token_id": 0} if name == "t5" else {}
    where, batch = folder(name, head, num_labels=3, **start), batch_for(name, texts, images)
    found = []
    for again in (False, True):
        student = make(task, model=where, head=head, lora=lora, gradient_checkpointing=again)
        if lora:
            _stir(student)
        for part in student.modules():
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
        student.tap("@0")
        counted = Counted(student.module.get_submodule(block))
        outputs = student.train()(batch)
        forward = counted.calls
        (outputs.need("logits").square().mean() + outputs.features[student.stages[0]].square().mean()).backward()
        assert (forward, counted.calls) == (1, 2 if again else 1)
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-6, atol=1e-6)


def _stir(student: Model) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_model_that_cannot_compute_again_is_named(
    config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.GPT2PreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="gradient_checkpointing: GPT2LMHeadModel does not support it"):
        make(TOKENS, config=config("gpt2"), gradient_checkpointing=True)


class Divergence(Loss):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        wanted, given = teacher.need("logits").softmax(-1), student.need("logits").log_softmax(-1)
        return -(wanted * given).sum(-1).mean()


class Imitate(Method):
    def stages(self, run: kdcore.Run) -> Generator[Stage, Any, None]:
        yield Distill(run.student, [Weighted(Divergence(), name="divergence")], run.teacher)


def random_tokens(options: Any = None) -> DataModule:
    ids = torch.randint(0, 40, (24, 9), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row[:-1], "attention_mask": torch.ones(8), "labels": row[1:]} for row in ids]
    return DataModule({"train": rows[:16], "val": rows[16:]}, TOKENS)


class Registered:
    """The test's method and data; interrupts the run at a step, if asked to."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at

    @kdcore.hookimpl
    def kd_register_methods(self) -> list[Component]:
        return [Component("method", "imitate", target=Imitate)]

    @kdcore.hookimpl
    def kd_register_data(self) -> list[Component]:
        return [Component("data", "random-tokens", target=random_tokens)]

    @kdcore.hookimpl
    def kd_step_finished(self, step: int) -> None:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


def manager(stop_at: int | None = None) -> kdcore.PluginManager:
    made = kdcore.PluginManager(discover=False)
    made.register(plugin)
    made.register(Registered(stop_at))
    return made


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("student", "saved"),
    [
        ({"lora": {"r": 2}, "gradient_checkpointing": True}, "model.safetensors"),
        ({"lora": {"r": 2, "merge": False}}, "adapter_model.safetensors"),
        ({"lora": {"r": 2, "merge": False}, "quantization": "int8"}, "adapter_model.safetensors"),
        ({"lora": {"r": 2, "merge": False}, "quantization": "int4"}, "adapter_model.safetensors"),
    ],
)
def test_a_run_with_adapters_goes_on_where_it_was_interrupted_and_is_measured_again(
    student: dict[str, Any], saved: str, folder: Callable[..., str], tmp_path: Path
) -> None:
    where = folder("llama", "causal-lm", **WIDE)
    recipe = {
        "method": "imitate",
        "teacher": {"use": "transformers", "model": where, "quantization": student.get("quantization")},
        "student": {"use": "transformers", "model": where, **student},
        "data": "random-tokens",
        "train": {"steps": 4, "batch_size": 8, "save_every": 2, "optimizer": {"lr": 0.01}},
        "eval": {"on": ["val"]},
    }
    whole = kdcore.run(recipe, run_dir=tmp_path / "whole", plugins=manager())
    with pytest.raises(Interrupted):
        kdcore.run(recipe, run_dir=tmp_path / "parts", plugins=manager(stop_at=3))
    kdcore.run(recipe, run_dir=tmp_path / "parts", plugins=manager())
    first, second = (load_file(tmp_path / name / "student" / saved) for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert evaluate(tmp_path / "whole", plugins=manager()) == pytest.approx(whole.metrics, rel=1e-4)

    teacher = make(TOKENS, checkpoint=str(tmp_path / "whole"))
    start = make(TOKENS, model=where)
    batch = {"input_ids": torch.arange(8)[None]}
    assert not torch.allclose(result(teacher, batch), result(start, batch), atol=1e-4)
