import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import kd_demo.nets
import kdcore
from kd_demo import models, nets
from kd_demo.digits import digits
from kd_demo.options import (
    CNNOptions,
    DigitsOptions,
    SegmenterOptions,
    SentencesOptions,
    ShapesOptions,
    TopicsOptions,
    TransformerOptions,
    ViTOptions,
)
from kd_demo.shapes import shapes
from kd_demo.text import sentences, topics
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.stages import Method, Roles, Supervised

FEW = {"train": 8, "val": 4, "test": 4}
DATA = {
    "demo-cnn": lambda: digits(DigitsOptions()),
    "demo-segmenter": lambda: shapes(ShapesOptions(**FEW)),
    "demo-transformer": lambda: topics(TopicsOptions(**FEW)),
    "demo-vit": lambda: digits(DigitsOptions()),
    "language model": lambda: sentences(SentencesOptions(**FEW)),
}
BUILD = {
    "demo-cnn": lambda task, **o: models.cnn(CNNOptions(width=4, **o), task),
    "demo-segmenter": lambda task, **o: models.segmenter(SegmenterOptions(width=4, depth=2, **o), task),
    "demo-transformer": lambda task, **o: models.transformer(TransformerOptions(width=16, heads=2, **o), task),
    "demo-vit": lambda task, **o: models.vit(ViTOptions(width=16, **o), task),
    "language model": lambda task, **o: models.transformer(TransformerOptions(width=16, heads=2, **o), task),
}
SHAPES = {
    "demo-cnn": ((4, 10), (4, 16)),
    "demo-segmenter": ((4, 5, 8, 8), (4, 16, 8, 8)),
    "demo-transformer": ((4, 6), (4, 16)),
    "demo-vit": ((4, 10), (4, 16)),
    "language model": ((4, "T", 210), (4, "T", 16)),
}
README = Path(__file__).parents[1] / "README.md"


def made(name, **options):
    """A model whose batch-norm statistics are no longer the initial ones, in evaluation mode, and a batch."""
    torch.manual_seed(0)
    data = DATA[name]()
    model, batch = BUILD[name](data.task, **options), data.sample("train", 4)
    model(batch)
    return model.eval(), batch, data.task


@pytest.mark.parametrize("name", BUILD)
def test_models_give_logits_and_the_input_of_their_last_layer(name):
    model, batch, task = made(name)
    outputs = model(batch)
    logits, embedding = ([batch["input_ids"].shape[1] if n == "T" else n for n in shape] for shape in SHAPES[name])
    assert list(outputs.logits.shape) == logits
    assert list(outputs.embedding.shape) == embedding
    last = model.module.head if name == "demo-segmenter" else model.module.fc
    torch.testing.assert_close(last(outputs.embedding), outputs.logits)
    assert model.labels == task.labels


@pytest.mark.parametrize(
    ("name", "count"), [("demo-cnn", 3), ("demo-segmenter", 3), ("demo-transformer", 2), ("demo-vit", 4)]
)
def test_stages_are_read_by_taps(name, count):
    model, batch, _ = made(name)
    taps = model.tap("@all")
    features = model(batch).features
    assert list(features) == taps
    assert len(taps) == count
    if name == "demo-cnn":
        assert [tuple(f.shape[1:]) for f in features.values()] == [(4, 8, 8), (8, 4, 4), (16, 2, 2)]


def test_a_language_model_sees_no_later_token():
    model, batch, _ = made("language model")
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 7
    before, after = model(batch).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_a_text_classifier_does_not_see_padding_but_sees_the_order_of_words():
    model, batch, _ = made("demo-transformer")
    padded = {k: torch.nn.functional.pad(batch[k], (0, 3)) for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(batch).logits, model(padded).logits)
    turned = {**batch, "input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    assert not torch.allclose(model(batch).logits, model(turned).logits, atol=1e-4)


def test_dropout_acts_in_training_only():
    data = DATA["demo-transformer"]()
    model = models.transformer(TransformerOptions(width=16, heads=2, dropout=0.5), data.task)
    batch = data.sample("train", 4)
    assert not torch.equal(model(batch).logits, model(batch).logits)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)


@pytest.mark.parametrize("name", BUILD)
def test_a_saved_model_comes_back_through_its_checkpoint_whatever_the_other_options_say(name, tmp_path):
    model, batch, task = made(name)
    model.save(tmp_path)
    again = {
        "demo-cnn": lambda: models.cnn(CNNOptions(width=7, checkpoint=str(tmp_path)), task),
        "demo-segmenter": lambda: models.segmenter(SegmenterOptions(checkpoint=str(tmp_path)), task),
        "demo-vit": lambda: models.vit(ViTOptions(patch=3, checkpoint=str(tmp_path)), task),
    }.get(name, lambda: models.transformer(TransformerOptions(checkpoint=str(tmp_path)), task))()
    assert torch.equal(again.eval()(batch).logits, model(batch).logits)


@pytest.mark.parametrize("training", [True, False])
def test_a_distilled_vit_gives_the_mean_of_its_heads_and_each_of_them(training):
    model, batch, _ = made("demo-vit", distilled=True)
    outputs = model.train(training)(batch)
    assert outputs.embedding.shape == (4, 16)
    heads = outputs.extras["cls_logits"], outputs.extras["dist_logits"]
    torch.testing.assert_close(outputs.logits, (heads[0] + heads[1]) / 2)
    torch.testing.assert_close(heads[0], model.module.fc(outputs.embedding))
    assert not torch.allclose(*heads)
    heads[1].sum().backward()
    assert model.module.fc_dist.weight.grad is not None
    assert model.module.fc.weight.grad is None


def test_a_saved_distilled_vit_comes_back_with_both_heads(tmp_path):
    model, batch, task = made("demo-vit", distilled=True)
    model.save(tmp_path)
    again = models.vit(ViTOptions(checkpoint=str(tmp_path)), task).module.eval()
    outputs = model(batch)
    for net in (nets.load(tmp_path), again):
        found = net(batch["image"])
        assert torch.equal(found["logits"], outputs.logits)
        assert torch.equal(found["embedding"], outputs.embedding)
        assert all(torch.equal(found["extras"][name], value) for name, value in outputs.extras.items())


def test_a_vit_sees_where_a_patch_stands():
    model, batch, _ = made("demo-vit")
    moved = batch["image"].roll(2, -1)
    assert not torch.allclose(model({"image": moved}).logits, model(batch).logits, atol=1e-4)


def test_a_vit_reads_images_that_are_not_square():
    model = models.vit(ViTOptions(), Task("classification", ("a", "b"), image=(3, 6, 10)))
    assert model({"image": torch.rand(2, 3, 6, 10)}).logits.shape == (2, 2)


def test_patches_that_do_not_tile_the_images_are_refused():
    task = Task("classification", ("a", "b"), image=(1, 8, 6))
    with pytest.raises(ModelError, match="8x6 pixels cannot be divided into patches of side 4"):
        models.vit(ViTOptions(patch=4), task)


def test_a_copied_model_saves_its_own_weights(tmp_path):
    model, batch, _ = made("demo-cnn")
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.module.fc.weight)
    twin.save(tmp_path)
    assert torch.equal(nets.load(tmp_path).fc.weight, twin.module.fc.weight)
    assert not torch.equal(twin(batch).logits, model(batch).logits)


def snippets():
    docstring = re.search(r"\n\n((?:    .+\n)+)", kd_demo.nets.__doc__)[1]
    readme = re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]
    return {"docstring": re.sub("^    ", "", docstring, flags=re.M), "README": readme}


@pytest.mark.parametrize("where", ["docstring", "README"])
def test_a_student_loads_without_kdcore_as_documented(where, tmp_path):
    model, batch, _ = made("demo-cnn")
    model.save(tmp_path / "runs" / "quickstart" / "student")
    save_file({"image": batch["image"]}, tmp_path / "batch.safetensors")
    program = f"""
import sys
sys.modules["kdcore"] = None  # importing it now fails
{snippets()[where]}
assert logits.shape == (1, 10), logits.shape
from safetensors.torch import load_file, save_file
with torch.no_grad():
    save_file({{"logits": net(load_file("batch.safetensors")["image"])["logits"]}}, "out.safetensors")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], model(batch).logits)


def test_a_checkpoint_of_another_class_count_is_refused_with_both_counts(tmp_path):
    made("demo-cnn")[0].save(tmp_path)
    two = digits(DigitsOptions(parity=True)).task
    with pytest.raises(ModelError, match=r"has 10 classes, the data has 2"):
        models.cnn(CNNOptions(checkpoint=str(tmp_path)), two)


def test_a_checkpoint_with_the_same_classes_in_another_order_is_refused(tmp_path):
    model, _, task = made("demo-cnn")
    model.save(tmp_path)
    turned = Task("classification", task.classes[::-1], image=task.image)
    with pytest.raises(ModelError, match="'0' is class 0 and 9"):
        models.cnn(CNNOptions(checkpoint=str(tmp_path)), turned)


def test_a_checkpoint_of_other_image_channels_is_refused(tmp_path):
    model, _, task = made("demo-cnn")
    model.save(tmp_path)
    with pytest.raises(ModelError, match="in_channels=1, the data asks for 3"):
        models.cnn(CNNOptions(checkpoint=str(tmp_path)), Task("classification", task.classes, image=(3, 8, 8)))


def test_a_vit_checkpoint_of_another_image_size_is_refused(tmp_path):
    model, _, task = made("demo-vit")
    model.save(tmp_path)
    with pytest.raises(ModelError, match=r"image_size=\[8, 8\], the data asks for \[16, 8\]"):
        models.vit(ViTOptions(checkpoint=str(tmp_path)), Task("classification", task.classes, image=(1, 16, 8)))


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    model, _, task = made("language model")
    model.save(tmp_path)
    other = Task("causal-lm", num_classes=210, tokenizer=task.tokenizer, vocabulary="another")
    with pytest.raises(ModelError, match="different vocabularies"):
        models.transformer(TransformerOptions(checkpoint=str(tmp_path)), other)


def test_a_checkpoint_of_another_architecture_names_the_right_component(tmp_path):
    made("demo-segmenter")[0].save(tmp_path)
    with pytest.raises(ModelError, match="`use: demo-segmenter`"):
        models.cnn(CNNOptions(checkpoint=str(tmp_path)), DATA["demo-cnn"]().task)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "no readable config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"junk"), "model.safetensors cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_folder_and_the_file(damage, message, tmp_path):
    model, _, task = made("demo-cnn")
    model.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as error:
        models.cnn(CNNOptions(checkpoint=str(tmp_path)), task)
    assert str(tmp_path) in str(error.value)


def test_models_refuse_tasks_they_are_not_made_for():
    with pytest.raises(ModelError, match="kind 'segmentation'"):
        models.cnn(CNNOptions(), DATA["demo-segmenter"]().task)
    with pytest.raises(ModelError, match="names no image shape"):
        models.cnn(CNNOptions(), Task("classification", ("a", "b")))
    with pytest.raises(ModelError, match="names no image shape"):
        models.vit(ViTOptions(), Task("classification", ("a", "b")))
    with pytest.raises(ModelError, match="tokenizer"):
        models.transformer(TransformerOptions(), Task("classification", ("a", "b")))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValidationError, match="width 64 cannot be divided into 5 heads"):
        TransformerOptions(heads=5)
    with pytest.raises(ValidationError, match="width 48 cannot be divided into 5 heads"):
        ViTOptions(heads=5)


class Alone:
    """A plugin with one method: the student alone, on the task's own loss."""

    @kdcore.hookimpl
    def kd_register_methods(self):
        return [kdcore.Component("method", "alone", target=AloneMethod)]


class AloneMethod(Method):
    roles = Roles(teachers=(), students=("student",))

    def stages(self, run):
        yield Supervised(run.student, run.data.task, name="alone")


def run_alone(folder, data, student, **train):
    manager = kdcore.PluginManager(only=["demo"])
    manager.register(Alone)
    recipe = {"method": "alone", "data": data, "student": student, "trackers": [], "eval": {"on": ["val", "test"]}}
    return kdcore.run({**recipe, "train": train}, run_dir=folder, plugins=manager), manager


def test_the_cnn_learns_the_digits_in_a_few_epochs_and_is_the_same_when_loaded_again(tmp_path):
    optimizer = {"name": "adamw", "lr": 3e-3}
    result, manager = run_alone(tmp_path / "run", "digits", "demo-cnn", epochs=4, optimizer=optimizer)
    assert result.metrics["val/accuracy"] > 0.93
    assert result.metrics["test/accuracy"] > 0.93
    assert kdcore.evaluate(tmp_path / "run", plugins=manager) == result.metrics
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert config["classes"] == list("0123456789")


@pytest.mark.parametrize(
    ("data", "student", "metric", "bound"),
    [
        ("digits", "demo-vit", "val/accuracy", 0.7),
        ({"use": "topics", "train": 600}, {"use": "demo-transformer", "width": 32}, "val/accuracy", 0.5),
        ({"use": "shapes", "train": 200, "val": 50}, {"use": "demo-segmenter", "width": 8}, "val/miou", 0.18),
    ],
)
def test_the_other_models_learn_their_data(data, student, metric, bound, tmp_path):
    result, _ = run_alone(tmp_path, data, student, epochs=5, batch_size=32, optimizer={"name": "adamw", "lr": 5e-3})
    assert result.metrics[metric] > bound


def test_the_language_model_beats_a_uniform_guess_by_far(tmp_path):
    data = {"use": "sentences", "train": 400}
    optimizer = {"name": "adamw", "lr": 5e-3}
    result, _ = run_alone(tmp_path, data, "demo-transformer", epochs=3, batch_size=32, optimizer=optimizer)
    assert result.metrics["val/perplexity"] < 60  # of a vocabulary of 210


def test_hooks_and_options_import_no_torch():
    program = (
        "import sys, kd_demo.plugin, kd_demo.options; kd_demo.plugin.kd_register_data(); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
