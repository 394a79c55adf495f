from typing import Any

import pytest
import torch
from dataset_distill_toy import manager, prototypes, recipe

import kdcore
from kd_dataset_distill.options import (
    CHANGES,
    AugmentOptions,
    CoresetOptions,
    DMOptions,
    GeneratorOptions,
    MTTOptions,
)
from kdcore import Component, DataModule, Task, hookimpl
from kdcore.errors import DataError, ModelError, RecipeError, RunFailed

TOPICS: dict[str, Any] = {
    "student": {"use": "demo-transformer", "width": 16, "layers": 1, "heads": 2},
    "data": {"use": "topics", "train": 60, "val": 12, "test": 12},
    "train": {"steps": 2, "batch_size": 4},
    "eval": {"on": ["test"]},
}


def fails(made: dict[str, Any], where: Any, *overrides: str) -> str:
    with pytest.raises((DataError, ModelError, RecipeError, RunFailed)) as caught:
        kdcore.run(made, overrides, run_dir=where, plugins=manager(Odd()))
    return str(caught.value)


class Odd:
    """Data that the methods cannot use."""

    @hookimpl
    def kd_register_data(self) -> list[Component]:
        missing = prototypes(10)
        missing.splits["train"] = [s for s in missing["train"] if s["label"] != 2]
        values = [{"image": torch.rand(2, 8, 8), "label": torch.rand(())} for _ in range(8)]
        bare = [{"image": torch.rand(2, 8, 8)} for _ in range(8)]
        made = {
            "missing-class": missing,
            "few": prototypes(3),
            "values": DataModule({"train": values, "test": values}, Task("regression", num_classes=1, image=(2, 8, 8))),
            "bare": DataModule({"train": bare}, Task("unlabelled", image=(2, 8, 8))),
        }
        return [Component("data", name, target=lambda options, data=data: data) for name, data in made.items()]


@pytest.mark.parametrize("method", ["dc", "dm", "dsa", "mtt"])
def test_data_that_is_no_classification_with_all_classes(tmp_path, method):
    made = recipe(use=method, iterations=1)
    for data, message in {
        "values": "needs a classification; this is a task of kind 'regression'",
        "bare": "a task of kind 'unlabelled'",
        "missing-class": "the class 'c' has no training samples",
    }.items():
        made["eval"] = {}
        assert message in fails({**made, "data": data}, tmp_path / data)


def test_more_images_than_the_class_has(tmp_path):
    made = {**recipe(use="dm", iterations=1, ipc=4), "data": "few"}
    assert "has 3 training samples, and method.ipc asks for 4 of them" in fails(made, tmp_path / "real")
    made["method"]["init"] = "noise"
    made["train"]["steps"] = 1
    assert kdcore.run(made, run_dir=tmp_path / "noise", plugins=manager(Odd())).metrics


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("method.ipc=0", "method.ipc"),
        ("method.batch_real=0", "method.batch_real"),
        ("method.lr_img=0", "method.lr_img"),
        ("method.eval_networks=0", "method.eval_networks"),
        ("method.augment.strategy=color_zoom", "there is no change 'zoom'"),
        ("method.augment.scale=0.5", "method.augment.scale"),
        ("method.metric=l1", "method.metric"),
        ("method.baselines=[best]", "method.baselines"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, key, message):
    assert message in fails(recipe(use="dc"), tmp_path / "run", key)


def test_segments_beyond_the_experts_are_refused():
    with pytest.raises(ValueError, match="ends beyond the experts' 5 epochs"):
        MTTOptions(train_epochs=5, max_start_epoch=4, expert_epochs=3)
    with pytest.raises(ValueError, match="either `model`"):
        GeneratorOptions()
    assert AugmentOptions(strategy="none").names == []
    assert DMOptions(augment={"cutout": 0.2}).augment.names == list(CHANGES)
    assert CoresetOptions(select="less").fraction == 0.05


def test_batch_norms_cannot_be_unrolled(tmp_path):
    made = recipe(use="mtt", iterations=1)
    made["student"]["norm"] = "batch"
    assert "batch norms keep statistics" in fails(made, tmp_path / "run")


def test_no_student_and_no_teacher(tmp_path):
    made = recipe(use="dm", iterations=1)
    student = made.pop("student")
    assert "the recipe names no student" in fails(made, tmp_path / "a")
    made["student"] = student
    made["method"]["soft_labels"] = True
    assert "soft_labels: the recipe names no teacher" in fails(made, tmp_path / "b")


def test_images_too_small_for_the_network(tmp_path):
    made = recipe(use="dm", iterations=1)
    made["student"]["depth"] = 4
    assert "too small for 4 blocks; set `depth`" in fails(made, tmp_path / "run")


def test_image_methods_refuse_texts(tmp_path):
    made = {**TOPICS, "method": {"use": "dm", "iterations": 1, "ipc": 1}}
    assert "dm learns images of one shape" in fails(made, tmp_path / "run")


def test_parameters_that_cannot_be_drawn_afresh(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(4))
            self.head = torch.nn.Linear(128, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.scale * self.head(image.flatten(1))

    with pytest.raises(ModelError, match="parameter 'scale' cannot be drawn afresh"):
        kdcore.distill(None, Odd(), prototypes(), "dc", iterations=1, ipc=1, run_dir=tmp_path / "run")


def test_distilled_data_that_is_not_there(tmp_path):
    made = {"method": "supervised", "student": {"use": "demo-cnn"}, "data": {"use": "distilled", "path": str(tmp_path)}}
    assert "holds no small data set" in fails(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ({"use": "coreset", "select": "perplexity"}, {}, "name the language model that reads the samples"),
        (
            {"use": "coreset", "select": "perplexity", "ipc": 1},
            {"teacher": {"use": "demo-transformer", "width": 16, "layers": 1, "heads": 2}},
            "a teacher that predicts tokens",
        ),
        ({"use": "coreset", "select": "random", "fraction": 0.001}, {}, "is none at all"),
        ({"use": "coreset", "select": "less", "fraction": 0.1, "target": "dev"}, {}, "no split 'dev'"),
        (
            {"use": "coreset", "select": "less", "fraction": 0.1, "subtask": "kind", "proj_dim": 8},
            {},
            "the batch has no 'kind'",
        ),
        (
            {"use": "dilm", "iterations": 0, "lm_steps": 1},
            {"teachers": {"generator": {"use": "demo-transformer", "width": 16, "layers": 1, "heads": 2}}},
            "dd-generator",
        ),
        ({"use": "synthesize"}, {"teacher": {"use": "demo-transformer"}}, "asks its teacher for text"),
        (
            {"use": "synthesize", "confidence": 0.5},
            {"teacher": {"use": "scripted-writer"}},
            "name the classifier that judges",
        ),
        (
            {"use": "synthesize", "ipc": 1, "over_generate": 2},
            {"teacher": {"use": "scripted-writer", "silence": 1}},
            "nothing is left of 12 answers",
        ),
        (
            {"use": "synthesize", "ipc": 3, "over_generate": 1},
            {"teacher": {"use": "scripted-writer", "silence": 0.5}},
            "method.ipc asks for 3",
        ),
        (
            {"use": "synthesize", "prompt": "Write on {{ topic }}"},
            {"teacher": {"use": "scripted-writer"}},
            "no field 'topic'",
        ),
        ({"use": "synthesize", "sampling": {"max_tokens": 0}}, {"teacher": {"use": "scripted-writer"}}, "max_tokens"),
    ],
)
def test_what_the_text_methods_refuse(tmp_path, method, more, message):
    assert message in fails({**TOPICS, **more, "method": method}, tmp_path / "run")


def test_text_methods_refuse_images(tmp_path):
    made = recipe(use="dilm", iterations=1)
    made["method"].pop("ipc")
    made["teachers"] = {
        "generator": {"use": "dd-generator", "config": {"model_type": "gpt2", "n_embd": 16, "n_head": 2}}
    }
    assert "there are no texts in the data" in fails(made, tmp_path / "dilm")
    made = {**recipe(use="synthesize"), "teacher": {"use": "scripted-writer"}}
    assert "there are no texts in the data" in fails(made, tmp_path / "synthesize")
