"""Models: calls, taps, freezing, labels."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdcore import Model, Outputs
from kdcore.errors import ModelError
from kdcore.models import FromColumns, Labels, as_outputs, check_pair


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def batch(size=5):
    return {"series": torch.randn(size, 4), "label": torch.zeros(size, dtype=torch.long)}


def test_taps_before_and_after_an_in_place_activation_differ():
    model = Model(network()).eval()
    assert model.tap("2:input", "2") == ["2:input", "2"]
    features = model(batch()).features
    assert features["2:input"].min() < 0
    torch.testing.assert_close(features["2"], features["2:input"].clamp(min=0))
    assert features["1" if "1" in features else "2"] is not None


class Residual(nn.Module):
    """A stage that ends in an activation, or in a sum after one."""

    def __init__(self, activated: bool):
        super().__init__()
        self.conv, self.act1, self.act2 = nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.activated = activated

    def forward(self, image):
        inner = self.conv(self.act1(image))
        return self.act2(image + inner) if self.activated else image + self.act2(inner)


@pytest.mark.parametrize("activated", [True, False])
def test_a_tap_before_the_activation_reads_what_goes_into_the_one_that_ends_the_module_if_any_does(activated):
    model = Model(nn.ModuleDict({"stage": Residual(activated)}), lambda m, b: m["stage"](b["image"]), stages=("stage",))
    assert model.tap("@0:pre", "@0") == ["stage:pre", "stage"]
    features = model({"image": torch.randn(3, 2, 4, 4)}).features
    wanted = features["stage:pre"].clamp(min=0) if activated else features["stage:pre"]
    torch.testing.assert_close(features["stage"], wanted)
    assert features["stage:pre"].min() < 0


def test_the_head_is_the_last_layer_with_as_many_outputs_as_classes():
    net = nn.ModuleDict({"body": nn.Linear(4, 8), "fc": nn.Linear(8, 3), "auxiliary": nn.Linear(8, 5)})
    model = Model(net, lambda m, b: m["fc"](m["body"](b["series"])), labels=Labels(3))
    assert model.tap("@head:input") == ["fc:input"]
    outputs = model(batch())
    torch.testing.assert_close(net["fc"](outputs.features["fc:input"]), outputs.logits)
    with pytest.raises(ModelError, match="no linear layer that makes 7 logits"):
        Model(net, labels=Labels(7)).tap("@head")


def test_patterns_match_by_name_and_stage_and_near_misses_are_listed():
    model = Model(nn.ModuleDict({"layer1": nn.Linear(4, 4), "layer2": nn.Linear(4, 4)}), lambda m, b: m["layer2"](
        m["layer1"](b["series"])), stages=("layer1", "layer2"))  # fmt: skip
    assert model.tap("layer*") == model.tap("@all") == ["layer1", "layer2"]
    assert model.tap("@-1") == ["layer2"]
    with pytest.raises(ModelError, match=r"'layr2' matches no module .* did you mean 'layer2'"):
        model.tap("layr2")
    with pytest.raises(ModelError, match="has 2 stages"):
        model.tap("@5")
    with pytest.raises(ModelError, match="not 'inptu'"):
        model.tap("layer1:inptu")
    with pytest.raises(ModelError, match="names no stages"):
        Model(network()).tap("@0")


def test_features_belong_to_one_call_and_to_one_copy():
    model = Model(network()).eval()
    model.tap("0")
    twin = copy.deepcopy(model)
    first, second = model(batch(5)).features["0"], model(batch(2)).features["0"]
    assert (len(first), len(second)) == (5, 2)
    assert len(twin(batch(3)).features["0"]) == 3


def test_a_frozen_model_stays_in_evaluation_mode_and_lets_gradients_through():
    model = Model(network()).freeze()
    model.train()
    assert not any(m.training for m in model.modules())
    x = torch.randn(2, 4, requires_grad=True)
    model({"series": x}).logits.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_common_return_values_become_outputs():
    logits = torch.zeros(2, 3)
    for value in (logits, {"logits": logits}, SimpleNamespace(logits=logits), (logits, None), Outputs(logits=logits)):
        assert as_outputs(value).logits is logits
    with pytest.raises(ModelError, match="returned int"):
        as_outputs(3)


def test_a_module_is_called_with_what_its_forward_names():
    class Net(nn.Module):
        def forward(self, attention_mask, input_ids):
            return (input_ids * attention_mask).float()

    found = Model(Net())({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])})
    assert found.logits.tolist() == [[1.0, 0.0]]


def test_saving_writes_what_torch_alone_loads(tmp_path):
    from safetensors.torch import load_file

    model = Model(network())
    model.save(tmp_path / "m")
    other = network()
    other.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    x = batch()
    torch.testing.assert_close(model.eval()(x).logits, other.eval()(x["series"]), rtol=0, atol=0)


def test_a_description_counts_parameters_and_leaves_the_mode_alone():
    model = Model(network()).train()
    found = model.describe(batch(), repeats=2)
    assert found["parameters"] == 4 * 8 + 8 + 2 * 8 + 8 * 3 + 3
    assert found["flops"] == 2 * (4 * 8 + 8 * 3)
    assert found["latency_ms"] > 0
    assert model.training


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (Labels(10), Labels(3), "10 classes, student has 3"),
        (
            Labels(2, ("cat", "dog")),
            Labels(2, ("Dog", "Cat")),
            "order their labels differently: 'cat' is class 0 and 1",
        ),
        (Labels(9, None, "aa"), Labels(9, None, "bb"), "different vocabularies"),
    ],
)
def test_models_that_do_not_mean_the_same_are_refused(teacher, student, message):
    with pytest.raises(ModelError, match=message):
        check_pair(teacher, student)


def test_other_spellings_warn_and_padded_vocabularies_pass(caplog):
    check_pair(Labels(2, ("NEGATIVE", "POSITIVE")), Labels(2, ("neg", "pos")))
    assert "taken to mean the same" in caplog.text
    check_pair(Labels(151_936, None, "aa"), Labels(151_669, None, "aa"))


def test_columns_can_be_a_teacher_but_have_no_features():
    teacher = FromColumns({"logits": "teacher_logits"})
    logits = torch.zeros(2, 3)
    assert teacher({"teacher_logits": logits}).logits is logits
    with pytest.raises(ModelError, match="no column 'teacher_logits'"):
        teacher({"image": logits})
    with pytest.raises(ModelError, match=r"features \(layer3\) need a live teacher"):
        teacher.tap("layer3")
