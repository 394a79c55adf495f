from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kdcore
from kd_mst_distill.data import paired_arrays
from kd_mst_distill.models import av_mnist_net
from kd_mst_distill.options import AVMNISTNetOptions, PairedArraysOptions
from kdcore import api
from kdcore.data import Task
from kdcore.errors import DataError, ModelError


def av_mnist(folder: Path, count: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("test", count // 4)):
        for name, pixels in (("image", 784), ("audio", 112 * 112)):
            (folder / name).mkdir(exist_ok=True)
            np.save(folder / name / f"{split}_data.npy", rng.normal(size=(size, pixels)).astype(np.float32))
        np.save(folder / f"{split}_labels.npy", np.arange(size) % 10)
    return folder


def test_paper_recipe_runs_on_few_samples(tmp_path):
    few = "{train: {steps: 1}}"
    changes = [f"data.path={av_mnist(tmp_path)}", "train.steps=2", "train.batch_size=8", "trackers=[]",
               "method.hidden_dim_factor=16", f"stages={{co_train: {few}, adapt_masks: {few}}}"]  # fmt: skip
    run = api.run("mst-distill/paper", changes, run_dir=tmp_path / "run")
    assert set(run.metrics) == {f"{split}/{metric}" for split in ("val", "test") for metric in ("accuracy", "f1")}
    assert kdcore.evaluate(run.path) == pytest.approx(run.metrics)
    masks = load_file(next(run.path.glob("stages/*-adapt_masks/artifact/stage.safetensors")))
    assert [masks[f"masks.{i}.embed.weight"].shape[1] for i in range(4)] == [596, 298, 120, 84]


def test_paired_arrays_are_split_and_scaled(tmp_path):
    made = {"path": str(av_mnist(tmp_path)), "arrays": {"image": ["image/train_data.npy", "image/test_data.npy"]},
            "label": ["train_labels.npy", "test_labels.npy"], "shapes": {"image": [1, 28, 28]}}  # fmt: skip
    data = paired_arrays(PairedArraysOptions(**made))
    assert [data.size(split) for split in ("train", "val", "test")] == [30, 10, 10]
    images = torch.stack([data[split][i]["image"] for split in data.splits for i in range(data.size(split))])
    assert images.shape == (50, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(data.labels("val"), torch.stack([data["val"][i]["label"] for i in range(10)]))
    other = paired_arrays(PairedArraysOptions(**made, split_seed=1))
    assert not torch.equal(data["train"].rows, other["train"].rows)
    for change, message in (
        ({"label": ["train_labels.npy"]}, "data.arrays.image: 50 samples, but data.label has 40"),
        ({"label": ["labels.npy"]}, "data.label: .*labels.npy cannot be read as a .npy file"),
        ({"shapes": {"image": [3, 28, 28]}}, "data.shapes.image: samples of shape .784. do not take"),
        ({"arrays": {"image": ["image/train_data.npy", "train_labels.npy"]}}, "data.arrays.image: .* do not join"),
    ):
        with pytest.raises(DataError, match=message):
            paired_arrays(PairedArraysOptions(**{**made, **change}))


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    task = Task("classification", num_classes=10)
    av_mnist_net(AVMNISTNetOptions(inputs=["image"]), task).save(tmp_path)
    again = av_mnist_net(AVMNISTNetOptions(inputs=["image"], checkpoint=str(tmp_path)), task)
    assert torch.equal(again.module.fc1.weight, load_file(tmp_path / "model.safetensors")["fc1.weight"])
    with pytest.raises(ModelError, match=r"model.safetensors is no FusionNet for 10 classes"):
        av_mnist_net(AVMNISTNetOptions(checkpoint=str(tmp_path)), task)
    with pytest.raises(ModelError, match="made for classification; the data poses a task of kind 'segmentation'"):
        av_mnist_net(AVMNISTNetOptions(), Task("segmentation", num_classes=10))
