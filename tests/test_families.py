"""The feature losses on real architectures: CNN and transformer of timm, encoder of transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

from kd_timm.models import stages, timm_model
from kd_timm.options import TimmOptions
from kd_transformers.build import stages_of
from kdcore import DataModule, Distill, Model, PluginManager, Task
from kdcore.errors import ModelError
from kdcore.losses import Weighted
from kdcore.models import Labels

IMAGES = Task("classification", ("a", "b", "c"), image=(3, 64, 64))
LOSSES = ["fitnets", "at", "nst", "vid", "ab", "reviewkd", "simkd", "sp", "rkd", "pkt", "crd"]


def picture_model(name):
    torch.manual_seed(0)
    return timm_model(TimmOptions(model=name, image_size=64 if "vit" not in name else 160), IMAGES)


def text_model(layers):
    torch.manual_seed(layers)
    config = BertConfig(vocab_size=50, hidden_size=16 * layers, num_hidden_layers=layers, num_attention_heads=2,
                        intermediate_size=32, num_labels=3)  # fmt: skip
    net = BertForSequenceClassification(config)
    return Model(net, lambda m, b: m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]),
                 labels=Labels(3), stages=stages_of(net))  # fmt: skip


def rows(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "text":
        ids = torch.randint(50, (6, 12), generator=generator)
        mask = (torch.arange(12) < torch.tensor([12, 5, 8, 12, 3, 9])[:, None]).long()
        return [{"input_ids": i, "attention_mask": m, "label": torch.tensor(n % 3)}
                for n, (i, m) in enumerate(zip(ids, mask, strict=True))]  # fmt: skip
    images = torch.rand(6, 3, 64, 64, generator=generator)
    return [{"image": image, "label": torch.tensor(n % 3)} for n, image in enumerate(images)]


def train_once(name, student, teacher, kind="image", **options):
    """The gradients of the student after one step."""
    loss = PluginManager().get("loss", name)
    stage = Distill(student, [Weighted(loss.load_target()(loss.load_options()(**options)), name="it")], teacher)
    data = DataModule({"train": rows(kind)}, IMAGES)
    stage.setup(data)
    batch = data.sample("train", 6)
    stage.eval()
    with torch.no_grad():
        stage.prepare(batch)
    (value,) = stage.train()(batch).values()
    value.backward()
    return [p.grad for p in student.parameters() if p.grad is not None]


def options_of(name):
    return {"negatives": 3} if name == "crd" else {}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("test_resnet", "test_resnet"), ("test_resnet", "test_vit"), ("test_vit", "test_convnext")],
)
def test_pictures(name, student, teacher):
    gradients = train_once(name, picture_model(student), picture_model(teacher), **options_of(name))
    assert any(g.abs().sum() > 0 for g in gradients)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_texts(name):
    gradients = train_once(name, text_model(2), text_model(4), "text", **options_of(name))
    assert any(g.abs().sum() > 0 for g in gradients)


def test_the_overhaul_takes_its_margins_from_a_cnn_and_refuses_a_transformer():
    assert train_once("ofd", picture_model("test_vit"), picture_model("test_resnet"))
    with pytest.raises(ModelError, match="batch norm"):
        train_once("ofd", picture_model("test_resnet"), picture_model("test_vit"))


def test_maps_with_channels_last_are_turned():
    net = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3, embed_dim=12,
                            depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))  # fmt: skip
    model = Model(net, stages=stages(net), channels_last=net.output_fmt == "NHWC")
    names = model.tap("@all")
    features = model({"image": torch.rand(2, 3, 64, 64)}).features
    assert [tuple(features[name].shape[1:]) for name in names] == [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]


def test_padding_does_not_count_for_losses_by_position():
    student, teacher = text_model(2), text_model(4)
    loss = PluginManager().get("loss", "vid").load_target()()
    stage = Distill(student, [Weighted(loss, name="vid")], teacher)
    batch = DataModule({"train": rows("text")}, IMAGES).sample("train", 6)
    stage.eval()
    with torch.no_grad():
        stage.prepare(batch)
        before = stage(batch)["vid"]
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
        torch.testing.assert_close(stage(batch)["vid"], before)
    assert stage.counts(batch)["vid"] == batch["attention_mask"].sum()
