import copy

import pytest
import torch
from torch import nn

from kd_gsc_kd.networks import NextStage, check_crossing, cross_stage_feature, find_places, frozen_call
from kd_gsc_kd.options import GSCKDOptions
from kdcore import Model
from kdcore.data import Task
from kdcore.errors import ModelError

TASK = Task("segmentation", num_classes=3, image=(3, 64, 64))


class Net(nn.Module):
    """A CNN of four stages; between the second and the third stands a module of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, 4, 1)
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Dropout(dropout))
        self.pool = nn.MaxPool2d(2)
        self.three = nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.three(self.pool(self.two(self.one(image)))))


def network(name: str, **options) -> Model:
    """A model as a recipe would make it."""
    from kdcore import PluginManager

    component = PluginManager().get("student", name)
    return component.load_target()(component.load_options()(**options), TASK)


def places_of(model: Model, role: str = "cnn", **options):
    """The places, checked on an image."""
    found = find_places(model, role, GSCKDOptions(**options))
    with torch.no_grad():
        check_crossing(found, role, model.eval()({"image": torch.rand(2, 3, 64, 64)}))
    return found


SEGFORMER = {"config": {"model_type": "segformer", "hidden_sizes": [8] * 4, "depths": [1] * 4,
                        "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [
        ("demo-segmenter", {"width": 4}, "stage1", "stage3"),
        ("transformers", SEGFORMER, "segformer.stages.0", "segformer.stages.3"),
        ("smp", {"arch": "deeplabv3plus", "encoder": "resnet18"}, "encoder.layer1", "encoder.layer4"),
        ("smp", {"arch": "fpn", "encoder": "tu-resnet18"}, "encoder.model.layer1", "encoder.model.layer4"),
        ("smp", {"arch": "pspnet", "encoder": "tu-mobilenetv2_100", "settings": {"encoder_depth": 5}},
         "encoder.model.blocks.1", "encoder.model.blocks.6"),
        ("smp", {"arch": "fpn", "encoder": "tu-pvt_v2_b0"}, "encoder.model.stages_0", "encoder.model.stages_3"),
    ],
)  # fmt: skip
def test_stages_and_what_leads_from_one_to_the_next_are_found(name, options, low, high):
    for package in {"transformers": ["kd_transformers"], "smp": ["kd_smp"]}.get(name, ["kd_demo"]):
        pytest.importorskip(package)
    places = places_of(network(name, **options))
    assert (places.low, places.high) == (low, high)


def test_modules_between_two_stages_belong_to_the_way():
    model = Model(Net(), stages=("one", "two", "three"))
    places = places_of(model, hfd_layer=2)
    assert [type(part).__name__ for part in places.crossing.parts] == ["MaxPool2d", "Conv2d"]


def test_stages_and_ways_are_named_by_options():
    model = Model(Net())
    with pytest.raises(ModelError, match=r"no stages are known of the vit \(Net\).*method.vit.stages"):
        places_of(model, "vit")
    named = {"stages": ["one", "two"], "next_stage": ["two.0", "two.1", "two.2"]}
    places = places_of(model, "vit", vit=named)
    assert (places.low, places.next, places.high) == ("one", "two", "two")
    assert len(places.crossing.parts) == 3


def test_networks_of_many_blocks_must_say_which_are_stages():
    blocks = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6)))
    with pytest.raises(ModelError, match=r"6 stages are known.*method.cnn.stages"):
        places_of(Model(blocks, stages=tuple("012345")))
    assert places_of(Model(blocks), cnn={"stages": ["2", "4", "5"]}).low == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cnn": {"stages": ["one", "two.1"]}}, r"not known what leads from one to two.1.*method.cnn.next_stage"),
        ({"cnn": {"stages": ["one", "three"], "next_stage": ["two", "three"]}}, "they make something else"),
        ({"cnn": {"stages": ["one", "two"], "next_stage": ["three"]}}, r"\(Conv2d\) are not it"),
        ({"cnn": {"stages": ["one", "two"], "next_stage": ["twoo"]}}, "no module 'twoo'"),
        ({"cnn": {"stages": ["one", "two"]}, "hfd_layer": 2}, r"hfd_layer 2 has no next stage.*2 stages \(one, two\)"),
        ({"cnn": {"stages": ["onne"]}}, "did you mean 'one'"),
    ],
)
def test_ways_that_do_not_lead_there_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        places_of(Model(Net()), **options)


def test_without_a_crossing_no_next_stage_is_needed():
    named = {"cnn": {"stages": ["one", "two.1"]}}
    assert places_of(Model(Net()), hfd="direct", **named).crossing is None
    assert places_of(Model(Net()), hfd="off", cnn={"stages": ["one"]}).high == "one"


def test_crossing_leaves_the_other_network_as_it_is():
    net = Net(dropout=0.5).train()
    before = copy.deepcopy(net.state_dict())
    stage, features = NextStage([net.two]), torch.randn(4, 4, 8, 8, requires_grad=True)
    first, second = (cross_stage_feature(stage, features) for _ in range(2))
    first.sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(first, second)  # nothing is dropped out
    assert all(part.training for part in net.modules())
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)  # statistics of the batch


def test_crossing_in_evaluation_uses_the_running_statistics():
    net = Net().eval()
    features = torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(cross_stage_feature(NextStage([net.two]), features), net.two(features))


def test_crossing_is_not_seen_by_the_taps():
    model = Model(Net())
    (name,) = model.tap("two")
    features = model({"image": torch.rand(1, 3, 32, 32)}).features[name]
    cross_stage_feature(NextStage([model.module.two]), torch.randn(1, 4, 8, 8))
    assert model._caught == {}
    assert features.shape == (1, 6, 4, 4)


def test_frozen_call_says_the_same_and_moves_no_statistics():
    model = Model(Net()).train()
    before = copy.deepcopy(model.state_dict())
    batch = {"image": torch.rand(2, 3, 32, 32)}
    frozen = frozen_call(model, batch).logits
    assert not frozen.requires_grad
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(frozen, model(batch).logits.detach())
