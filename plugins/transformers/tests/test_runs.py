"""Students and teachers in runs: trained, interrupted, resumed, exported, measured again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kdcore
from kd_transformers import plugin
from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.api import evaluate
from kdcore.components import Component
from kdcore.data import DataModule, Task
from kdcore.errors import Interrupted
from kdcore.losses import Loss, Weighted
from kdcore.models import Batch, Model, Outputs
from kdcore.stages import Distill, Method, Stage

TOKENS = Task("causal-lm", num_classes=40)


class Divergence(Loss):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        wanted, given = teacher.need("logits").softmax(-1), student.need("logits").log_softmax(-1)
        return -(wanted * given).sum(-1)[batch["labels"] >= 0].mean()


class Imitate(Method):
    def stages(self, run: kdcore.Run) -> Generator[Stage, Any, None]:
        yield Distill(run.student, [Weighted(Divergence(), name="divergence")], run.teacher)


def random_tokens(options: Any = None) -> DataModule:
    ids = torch.randint(0, 40, (24, 9), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row[:-1], "attention_mask": torch.ones(8), "labels": row[1:]} for row in ids]
    return DataModule({"train": rows[:16], "val": rows[16:]}, TOKENS)


class Registered:
    """The test's method and data; interrupts the run at a step, if asked to."""

    def __init__(self, stop_at: int | None = None) -> None:
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


def make(config: dict[str, Any], seed: int) -> Model:
    torch.manual_seed(seed)
    return build(TransformersOptions(config=config), TOKENS)


@pytest.fixture
def distill(config: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """`distill(name, stop_at=None)`: distil a GPT-2 with tied weights into a smaller one; the run folder."""

    def run(name: str, stop_at: int | None = None) -> Path:
        train = {"steps": 6, "batch_size": 8, "optimizer": {"lr": 0.01}, "save_every": 2}
        kdcore.distill(
            make(config("gpt2", tie_word_embeddings=True), 0), make(config("gpt2", n_layer=1), 1), random_tokens(),
            "imitate", train=train, run_dir=tmp_path / name, plugins=manager(stop_at),
        )  # fmt: skip
        return tmp_path / name

    return run


def test_a_tied_language_model_trains_resumes_and_exports(distill: Callable[..., Path], config: Any) -> None:
    whole = distill("whole")
    with pytest.raises(Interrupted):
        distill("parts", stop_at=3)
    parts = distill("parts")
    first, second = (load_file(path / "student" / "model.safetensors") for path in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    student = transformers.AutoModelForCausalLM.from_pretrained(parts / "student")
    assert student.lm_head.weight.data_ptr() == student.transformer.wte.weight.data_ptr()
    start = make(config("gpt2", n_layer=1), 1).module
    assert not torch.equal(student.lm_head.weight, start.lm_head.weight)


@pytest.mark.parametrize(("name", "head"), [("gpt2", "auto"), ("bert", "auto"), ("t5", "seq2seq")])
def test_a_recipe_trains_its_teacher_and_its_student_is_measured_again(
    name: str, head: str, config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    small = config(name, **{{"gpt2": "n_layer", "bert": "num_hidden_layers", "t5": "num_layers"}[name]: 1})
    recipe = {
        "method": "imitate",
        "teacher": {"use": "transformers", "head": head, "config": config(name), "train": {"steps": 2}},
        "student": {"use": "transformers", "head": head, "config": small},
        "data": "random-tokens",
        "train": {"steps": 2, "batch_size": 8},
        "eval": {"on": ["val"]},
    }
    result = kdcore.run(recipe, run_dir=tmp_path / "run", plugins=manager())
    assert evaluate(tmp_path / "run", plugins=manager()) == pytest.approx(result.metrics)
    assert (tmp_path / "run" / "student" / "config.json").is_file()
