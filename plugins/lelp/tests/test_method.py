import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kdcore
from kd_demo import nets
from kd_lelp.functional import class_logits, lelp
from kd_lelp.losses import LELP
from kd_lelp.options import LELPLossOptions, LossOptions
from kd_lelp.projector import SubclassProjector
from kdcore import Outputs, PluginManager, api, hookimpl
from kdcore.data import IGNORE, Task
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError
from kdcore.testing.conformance import assert_same_students, effect

BLOBS, DIM = 8, 20
SHORT = {"steps": 12, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}}
CLASSES = Task("classification", num_classes=2)


class Teacher(nn.Module):
    """A classifier that gives its embedding."""

    def __init__(self, width: int = 32, outputs: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Outputs:
        embedding = self.body(x)
        return Outputs(logits=self.head(embedding), embedding=embedding)


def blobs(count: int = 200) -> list[tuple[Tensor, Tensor]]:
    """Samples and labels; the label is the parity of the blob."""
    torch.manual_seed(0)
    centres, blob = 1.5 * torch.randn(BLOBS, DIM), torch.arange(count) % BLOBS
    return list(zip(centres[blob] + 0.7 * torch.randn(count, DIM), blob % 2, strict=True))


def student(outputs: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, outputs))


def distill(where: Path, teacher: nn.Module | None = None, data: Any = None, outputs: int = 8, **options: Any) -> Path:
    """The run folder of twelve steps on blobs."""
    torch.manual_seed(2)
    train = {**SHORT, **options.pop("train", {})}
    splits = data if isinstance(data, dict) else {"train": data or blobs()}
    kdcore.distill(teacher or Teacher(), student(outputs), splits, "lelp", task=options.pop("task", CLASSES),
                   keys=("x", "label"), train=train, run_dir=where, eval={"on": ["train"]}, **options)  # fmt: skip
    return where


def projector_of(run: Path) -> dict[str, Tensor]:
    (artifact,) = run.glob("stages/*-projector/artifact/tensors.safetensors")
    return load_file(artifact)


def digits(**changes: Any) -> dict[str, Any]:
    """A recipe of a few steps on the digits."""
    recipe: dict[str, Any] = {
        "method": {"use": "lelp", "subclasses": 3},
        "teacher": {"use": "demo-cnn", "width": 4, "train": {"steps": 20}},
        "student": {"use": "demo-cnn", "width": 2},
        "data": {"use": "digits", "parity": True},
        "train": SHORT,
        "eval": {"on": ["test"]},
    }
    return recipe | changes


class Interrupt:
    """Asks the process to stop in the middle of the stage `distill`."""

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if (stage.name, step) == ("distill", 5):
            os.kill(os.getpid(), signal.SIGINT)


def test_projector_is_loaded_and_not_fitted_again_on_resume(tmp_path, monkeypatch):
    whole = api.run(digits(), run_dir=tmp_path / "whole")
    manager = PluginManager()
    manager.register(Interrupt(), name="interrupt")
    with pytest.raises(Interrupted):
        api.run(digits(), run_dir=tmp_path / "stopped", plugins=manager)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(SubclassProjector, "fit", refuse)
    resumed = api.run(digits(), run_dir=tmp_path / "stopped")
    assert resumed.metrics == whole.metrics
    assert_same_students(whole.path, resumed.path)


def test_run_folder_holds_projector_terms_and_a_widened_student(tmp_path):
    run = api.run(digits(method={"use": "lelp", "subclasses": 3, "alpha": 0.2}), run_dir=tmp_path / "run")
    assert {name: list(value.shape) for name, value in projector_of(run.path).items()} == {
        "mean": [2, 16], "directions": [2, 3, 16], "scale": [2, 3]}  # fmt: skip
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    terms = [row["terms"] for row in rows if row["stage"] == "distill" and "terms" in row]
    assert terms
    assert all(set(row) == {"lelp/ce", "lelp/distill"} for row in terms)
    assert nets.load(run.path / "student").fc.out_features == 6
    assert "arXiv:2409.20449" in (run.path / "README.md").read_text()


def test_predictions_are_grouped_in_the_run_and_in_kdcore_evaluate(tmp_path):
    run = api.run(digits(), run_dir=tmp_path / "run")
    net, test = nets.load(run.path / "student"), api.load_student(run.path)[0].data.sample("test", 1000)
    with torch.no_grad():
        logits = net(test["image"])["logits"]
    grouped = (class_logits(logits, 2).argmax(1) == test["label"]).float().mean().item()
    assert run.metrics == pytest.approx({"test/accuracy": grouped})
    assert kdcore.evaluate(run.path) == run.metrics


def test_one_subclass_is_the_method_kd(tmp_path):
    kd = {"use": "kd", "temperature": 2, "ce_weight": 0, "weight": 1}
    one = api.run(digits(method={"use": "lelp", "subclasses": 1, "tau": 2}), run_dir=tmp_path / "one")
    plain = api.run(digits(method=kd), run_dir=tmp_path / "kd")
    assert_same_students(one.path, plain.path, tolerance=1e-6)
    many = api.run(digits(method={"use": "lelp", "subclasses": 3, "tau": 2}), run_dir=tmp_path / "many")
    first, second = (load_file(run.path / "student" / "model.safetensors") for run in (one, many))
    assert not torch.allclose(first["stem.0.weight"], second["stem.0.weight"], atol=1e-3)


def test_null_space_of_the_teachers_head(tmp_path):
    teacher = Teacher()
    with_projection = projector_of(distill(tmp_path / "on", teacher))
    assert (with_projection["directions"] @ teacher.head.weight.T).abs().max() < 1e-4
    without = projector_of(distill(tmp_path / "off", teacher, null_space=False))
    assert (without["directions"] @ teacher.head.weight.T).abs().max() > 0.01


def test_class_with_too_few_samples_keeps_its_subclasses(tmp_path, caplog):
    data = [(x, torch.tensor(int(i < 3))) for i, (x, _) in enumerate(blobs())]
    with caplog.at_level(logging.WARNING):
        found = projector_of(distill(tmp_path / "run", data=data))["directions"][1]
    assert "class 1: 3 samples give only 2 of 4 directions" in caplog.text
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-5, rtol=0)


def test_small_null_space_keeps_the_subclasses_and_shares_alike(tmp_path, caplog):
    teacher = Teacher(width=4)
    with caplog.at_level(logging.WARNING):
        run = distill(tmp_path / "run", teacher)
    assert "subclasses 3 to 4 of every class get a constant share; method.subclasses=2 leaves them out" in caplog.text
    (file,) = run.glob("stages/*-projector/artifact/tensors.safetensors")
    projector = LELP(LELPLossOptions(projector=str(file))).projector
    outputs = teacher(torch.stack([x for x, _ in blobs()]))
    parts = projector.subclass_logits(outputs.embedding.detach())
    assert parts.shape == (200, 2, 4)
    assert not parts[..., 2:].any()
    assert parts[..., :2].std() > 0.1


def test_unlabelled_samples_count_as_the_teacher_says(tmp_path):
    unlabelled = [(x, torch.tensor(IGNORE)) for x, _ in blobs()]
    teacher = Teacher()
    found = projector_of(distill(tmp_path / "unlabelled", teacher, unlabelled))
    expected = projector_of(distill(tmp_path / "teacher", teacher, class_source="teacher"))
    labelled = projector_of(distill(tmp_path / "label", teacher))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.allclose(labelled["mean"], expected["mean"], atol=1e-3)


def test_fit_reads_no_more_samples_than_asked_for(tmp_path, monkeypatch):
    seen, fit = [], SubclassProjector.fit
    monkeypatch.setattr(
        SubclassProjector, "fit", lambda e, *args, **options: seen.append(e) or fit(e, *args, **options)
    )
    teacher = Teacher()
    for number, limit in enumerate((50, 50, 500)):
        distill(tmp_path / str(number), teacher, max_fit_samples=limit)
    assert [len(rows) for rows in seen] == [50, 50, 200]
    assert torch.equal(seen[0], seen[1])
    whole = {tuple(row) for row in seen[2].tolist()}
    assert {tuple(row) for row in seen[0].tolist()} < whole
    assert not torch.equal(seen[0], seen[2][:50])


def test_seed_follows_the_run_unless_given(tmp_path):
    found = [projector_of(distill(tmp_path / str(seed), Teacher(), seed=seed))["directions"] for seed in (0, 1)]
    assert not torch.allclose(*found, atol=1e-2)


def test_half_labelled_micro_batches_give_the_same_student(tmp_path):
    data = [(x, y if i % 3 else torch.tensor(IGNORE)) for i, (x, y) in enumerate(blobs())]
    runs = [
        distill(tmp_path / str(parts), data=data, alpha=0.5, train={"grad_accumulation": parts}) for parts in (1, 4)
    ]
    assert_same_students(*runs, tolerance=1e-5)


def test_terms_add_up_to_the_loss_of_the_paper(tmp_path):
    teacher = Teacher()
    run = distill(tmp_path / "run", teacher)
    (file,) = run.glob("stages/*-projector/artifact/tensors.safetensors")
    loss = LELP(LELPLossOptions(projector=str(file), alpha=0.3, tau=2.0, beta=0.4))
    x, label = map(torch.stack, zip(*blobs(), strict=True))
    label[::4] = IGNORE
    batch, outputs = {"label": label, "index": torch.arange(len(label))}, teacher(x)
    logits = student(8)(x)
    terms = loss(Outputs(logits=logits), outputs, batch)
    targets = loss.projector(outputs.embedding, outputs.logits, tau=2.0, beta=0.4)
    expected = lelp(logits, targets, num_classes=2, tau=2.0, alpha=0.3, labels=label)
    torch.testing.assert_close(terms["ce"] + terms["distill"], expected)
    assert loss.count(batch) == len(label)
    assert not list(loss.parameters())


def test_beats_its_ablation(tmp_path):
    """Measured over ten seeds: 3 points of accuracy more than plain distillation."""
    assert effect("lelp", tmp_path, seeds=(0, 1)) > 0.01


def tiny_albert(folder: Path, width: int) -> str:
    """A masked language model with fresh weights and its tokenizer, as they lie on the Hub."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "[CLS]", "[SEP]", "a", "good", "bad", "film", "plot", "dull"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    config = transformers.AlbertConfig(vocab_size=len(words), embedding_size=8, hidden_size=width, num_hidden_layers=2,
                                       num_attention_heads=2, intermediate_size=16)  # fmt: skip
    transformers.AlbertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_paper_recipe_runs_on_tiny_models(tmp_path):
    pytest.importorskip("kd_transformers")
    pytest.importorskip("kd_datasets")
    teacher, pupil = tiny_albert(tmp_path / "xxl", 16), tiny_albert(tmp_path / "base", 8)
    rows = [{"text": f"a {word} film" + " plot" * (i % 3), "label": i % 2}
            for i, word in enumerate(["good", "bad", "good", "dull"] * 10)]  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = [f"data.path={tmp_path / 'texts.jsonl'}", "data.splits={train: train, test: train}",
               "data.classes=[neg, pos]", f"data.tokenizer={pupil}",
               f"teachers.teacher.model={teacher}", f"students.student.model={pupil}",
               "teachers.teacher.train={steps: 2}", "train.steps=3", "train.precision=fp32"]  # fmt: skip
    run = api.run("lelp/paper", changes, run_dir=tmp_path / "run")
    assert set(run.metrics) == {"val/accuracy", "test/accuracy"}
    assert projector_of(run.path)["directions"].shape == (2, 4, 16)
    assert kdcore.evaluate(run.path) == run.metrics
    loaded = pytest.importorskip("transformers").AutoModelForSequenceClassification.from_pretrained(
        run.path / "student"
    )
    assert loaded.config.num_labels == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.subclasses=0", "method.subclasses: .*greater than or equal to 1"),
        ("method.beta=0", "method.beta: .*greater than 0"),
        ("method.tau=-1", "method.tau: .*greater than 0"),
        ("method.alpha=1.5", "method.alpha: .*less than or equal to 1"),
        ("method.directions=ica", "method.directions: .*'pca', 'random' or 'kmeans'"),
        ("method.scale=unit", "method.scale: .*'class_std'"),
        ("method.subclass=5", "method.subclass: unknown key.*subclasses"),
        ("stages.projectr.train.epochs=1", "no such stage.*projector"),
    ],
)
def test_wrong_options_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("lelp", [change])


def test_loss_alone_needs_a_projector(tmp_path):
    with pytest.raises(RecipeError, match="needs a fitted projector"):
        LELP(LossOptions())
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    for name in ("missing.safetensors", "other.safetensors"):
        with pytest.raises(RecipeError, match=f"{name} cannot be loaded"):
            LELP(LELPLossOptions(projector=str(tmp_path / name)))


class Bare(Teacher):
    """A classifier without an embedding."""

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(logits=super().forward(x).logits)


class Cosine(Teacher):
    """A classifier whose head is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Bilinear(32, 32, 2)

    def forward(self, x: Tensor) -> Outputs:
        embedding = self.body(x)
        return Outputs(logits=self.head(embedding, embedding), embedding=embedding)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"teacher": Bare()}, ModelError, "gives no embedding|does not give"),
        ({"teacher": Cosine()}, ModelError, "no nn.Linear from its embedding .32. to its logits .2..*null_space=false"),
        ({"outputs": 2}, ModelError, "2 classes x 4 subclasses = 8 outputs, .*has shape|logits have shape"),
        ({"data": [(x,) for x, _ in blobs()], "alpha": 0.5}, ModelError, "alpha > 0 weighs the labels in"),
        ({"data": [(x, y + 5) for x, y in blobs()]}, DataError, "label 5, but the 2 classes are 0 to 1"),
        ({"task": Task("regression", num_classes=1)}, DataError, "this is a 'regression' task"),
    ],
    ids=["no embedding", "no linear head", "narrow student", "no labels", "wrong labels", "regression"],
)
def test_what_does_not_fit_gets_a_clear_sentence(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        distill(tmp_path / "run", **arguments)


def test_teacher_without_a_linear_head_works_without_the_null_space(tmp_path):
    assert projector_of(distill(tmp_path / "run", Cosine(), null_space=False))["directions"].isfinite().all()


def test_binary_teacher_with_one_output(tmp_path):
    teacher = Teacher(outputs=1)
    found = projector_of(distill(tmp_path / "run", teacher))["directions"]
    assert found.shape == (2, 4, 32)
    assert (found @ teacher.head.weight.T).abs().max() < 1e-4
