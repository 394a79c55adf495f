import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lad.noising import CHANNEL
from kd_lad.stem import WEIGHTS, LabelPlane, find_stem, fitted, reads_labels
from kdcore import Model
from kdcore.components import Kind
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.plugins import PluginManager

SIZE = 32
TASK = Task("segmentation", num_classes=4, image=(3, SIZE, SIZE))


class Net(nn.Module):
    """Normalises, has a convolution that reads no image first, and a bias in its stem."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 4, 1)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem((image - 0.4) / 0.2).relu())


def batch(count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(count, 3, SIZE, SIZE, generator=generator),
        CHANNEL: torch.randn(count, 1, SIZE, SIZE, generator=generator),
    }


def build(kind: Kind, use: str, **options) -> Model:
    component = PluginManager().get(kind, use)
    torch.manual_seed(0)
    return component.load_target()(component.load_options().model_validate(options), TASK)


def providers() -> list:
    segformer = {"model_type": "segformer", "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "decoder_hidden_size": 8,
                 "num_attention_heads": [1] * 4}  # fmt: skip
    return [
        pytest.param("kd_demo", {"use": "demo-segmenter", "width": 4}, "stem.0", id="demo-segmenter"),
        pytest.param("kd_transformers", {"use": "transformers", "config": segformer}, "patch_embed", id="segformer"),
        pytest.param("kd_smp", {"use": "smp", "arch": "pspnet", "encoder": "resnet18"}, "encoder.conv1", id="smp"),
    ]


def test_a_widened_model_is_the_network_that_reads_four_channels():
    torch.manual_seed(0)
    model, inputs = Model(Net()), batch()
    LabelPlane(model, 3, std=0.5)
    net = model.module
    assert net.stem.weight.shape == (8, 4, 3, 3)
    four = torch.cat([(inputs["image"] - 0.4) / 0.2, inputs[CHANNEL]], 1)
    plain = net.head(F.conv2d(four, net.stem.weight, net.stem.bias, 2, 1).relu())
    torch.testing.assert_close(model(inputs).logits, plain)


@pytest.mark.parametrize(("package", "spec", "name"), providers())
def test_any_provider_s_network_learns_to_read_labels_and_keeps_its_native_format(package, spec, name, tmp_path):
    pytest.importorskip(package)
    options = {key: value for key, value in spec.items() if key != "use"}
    model, inputs = build("student", spec["use"], **options).eval(), batch()
    before = model(inputs).logits
    assert not reads_labels(model, inputs)
    plane = LabelPlane(model, 3, std=0.5)
    assert name in plane.name
    assert reads_labels(model, inputs)
    image = {"image": inputs["image"]}
    torch.testing.assert_close(model(image).logits, before)  # as with zeros
    seen = model(inputs).logits
    plane.export().save(tmp_path / "teacher")
    torch.testing.assert_close(model(inputs).logits, seen)  # saving changed nothing
    again = build("student", spec["use"], **options, checkpoint=str(tmp_path / "teacher")).eval()
    torch.testing.assert_close(again(image).logits, before)
    LabelPlane(again, 3, std=0.5).load(tmp_path / "teacher")
    torch.testing.assert_close(again(inputs).logits, seen)


def test_the_new_plane_starts_small_and_the_others_stay():
    torch.manual_seed(0)
    model = Model(Net())
    old = model.module.stem.weight.detach().clone()
    LabelPlane(model, 3, std=1e-4)
    weight = model.module.stem.weight
    assert weight.requires_grad
    assert torch.equal(weight[:, :3], old)
    assert 0.5e-4 < weight[:, 3].std() < 2e-4


def test_removing_the_plane_gives_back_the_model():
    torch.manual_seed(0)
    model, inputs = Model(Net()), batch()
    before, keys = model(inputs).logits, {k: v.shape for k, v in model.module.state_dict().items()}
    plane = LabelPlane(model, 3, std=0.5)
    plane.remove()
    assert torch.equal(model(inputs).logits, before)
    assert {k: v.shape for k, v in model.module.state_dict().items()} == keys
    assert model.module.stem.in_channels == 3


def test_a_channel_is_not_remembered_for_the_next_batch():
    model, inputs = Model(Net()), batch()
    LabelPlane(model, 3, std=0.5)
    empty = model({"image": inputs["image"]}).logits
    model(inputs)
    assert torch.equal(model({"image": inputs["image"]}).logits, empty)


def test_a_copy_reads_its_own_batch():
    model, inputs = Model(Net()), batch()
    LabelPlane(model, 3, std=0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.module.stem.weight.zero_()
    assert reads_labels(twin, inputs)
    assert not reads_labels(model, inputs)


@pytest.mark.parametrize("filled", [True, False])
def test_the_channel_follows_an_image_that_the_model_fills_up_or_resizes(filled):
    image, channel = torch.rand(1, 3, 6, 6), torch.rand(1, 1, 6, 6)
    if filled:
        found = fitted(channel, F.pad(image, (0, 2, 0, 2), value=0.5))
        assert torch.equal(found, F.pad(channel, (0, 2, 0, 2)))
    else:
        found = fitted(channel, F.interpolate(image, (12, 12), mode="bilinear"))
        assert torch.equal(found, channel.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert fitted(channel, image) is channel
    assert torch.equal(fitted(channel, image[..., ::2, ::2]), channel[..., ::2, ::2])


@pytest.mark.parametrize(
    ("net", "stem", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), None, "Sequential has no plain 2D convolution of 3.*none"),
        (nn.Sequential(nn.Conv2d(1, 4, 3)), None, r"it has: 0 \(1\)"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)), None, "no plain 2D convolution of 3"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), None, "no plain 2D convolution"),
        (Net(), "stm", "method.stem.*'stm'.*stem"),
        (Net(), "head", "method.stem.*'head'"),
    ],
)
def test_a_model_without_a_convolution_to_widen_is_told(net, stem, message):
    with pytest.raises(ModelError, match=message):
        find_stem(net, 3, stem)


def test_another_convolution_can_be_named():
    net = nn.ModuleDict({"first": nn.Conv2d(3, 4, 3), "second": nn.Conv2d(3, 5, 3)})
    assert find_stem(net, 3)[0] == "first"
    assert find_stem(net, 3, "second")[1] is net["second"]


def test_a_plane_of_another_network_or_a_damaged_file_is_told(tmp_path):
    LabelPlane(Model(Net()), 3, std=0.5).save(tmp_path)
    other = LabelPlane(Model(nn.Sequential(nn.Conv2d(3, 4, 3))), 3, std=0.5)
    with pytest.raises(ModelError, match=r"plane of stem \[8, 1, 3, 3\]; the teacher's is 0 \[4, 1, 3, 3\]"):
        other.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(ModelError, match=f"{WEIGHTS} cannot be read"):
        other.load(tmp_path)
