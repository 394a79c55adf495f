import pytest
import torch
from torch import Tensor, nn

from kd_mst_distill.masking import find_layers, layer_shapes, masked, replaced_outputs, specialise
from kd_mst_distill.modules import MaskNet1d, MaskNet2d
from kdcore import Model
from kdcore.errors import ModelError


class Net(nn.Module):
    """Two convolutions and two linear layers, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"conv1": nn.Conv2d(1, 6, 3, padding=1), "conv2": nn.Conv2d(6, 8, 3, padding=1)})
        self.fc1, self.fc2, self.spare = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(1, 1)
        self.pair = nn.LSTM(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder["conv2"](self.encoder["conv1"](image).relu()).relu().mean((2, 3))
        x = self.fc2(self.fc1(x).relu())
        return self.pair(x[None])[0][0]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Net(), stages=("fc1", "fc2"))


def image() -> dict[str, Tensor]:
    return {"image": torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))}


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["encoder.conv1"], ["encoder.conv1"]),
        (["encoder.*"], ["encoder.conv1", "encoder.conv2"]),
        (["fc?", "fc1"], ["fc1", "fc2"]),
        (["fc2", "encoder.conv1"], ["fc2", "encoder.conv1"]),
        (["@-1", "@0"], ["fc2", "fc1"]),
        (["@all"], ["fc1", "fc2"]),
    ],
)
def test_layers_are_found_by_path_wildcard_and_stage(model, patterns, found):
    assert find_layers(model, patterns) == found


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["encoder.conv3"], "'encoder.conv3' matches no module of Net; did you mean 'encoder.conv[12]'"),
        (["@2"], "write @all or the number of a stage; the stages are fc1, fc2"),
        (["@last"], "write @all or the number"),
    ],
)
def test_a_layer_that_is_not_there_gets_a_clear_sentence(model, patterns, message):
    with pytest.raises(ModelError, match=message):
        find_layers(model, patterns)
    with pytest.raises(ModelError, match="names no stages; write module names instead"):
        find_layers(Model(model.module), ["@-1"])


def test_outputs_are_replaced_inside_and_no_hook_is_left(model):
    plain = model(image()).logits
    with replaced_outputs(model.module, {"fc1": torch.zeros_like, "encoder.conv2": lambda x: 2 * x}):
        assert hooks(model) == 2
        changed = model(image()).logits
    assert hooks(model) == 0
    torch.testing.assert_close(changed, model.module.pair(model.module.fc2(torch.zeros(3, 8))[None])[0][0])
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(model(image()).logits, plain)


def test_no_hook_is_left_after_an_error(model):
    def refuse(x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), replaced_outputs(model.module, {"fc1": refuse, "fc2": refuse}):
        model(image())
    with pytest.raises(ModelError, match=r"there is no layer 'fc3'; did you mean 'fc[12]'"):
        replaced_outputs(model.module, {"fc1": refuse, "fc3": refuse}).__enter__()
    assert hooks(model) == 0


def test_a_layer_that_gives_no_tensor_or_is_not_called_gets_a_clear_sentence(model):
    with pytest.raises(ModelError, match="layer 'pair' gives a tuple, not a tensor"):
        layer_shapes(model, ["pair"], image())
    with pytest.raises(ModelError, match="layer 'spare' is not called"):
        layer_shapes(model, ["fc1", "spare"], image())
    assert layer_shapes(model, ["encoder.conv2", "fc1"], image()) == [(3, 8, 6, 6), (3, 8)]
    assert hooks(model) == 0


def test_gradient_goes_through_the_frozen_teacher_to_the_mask_alone(model):
    model.freeze()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = [MaskNet2d(8, 3), MaskNet1d(8, 3)]
    both = specialise(model, ["encoder.conv2", "fc1"], masks)
    both(image()).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for mask in masks for p in mask.parameters())
    assert any(p.grad.abs().sum() > 0 for p in masks[0].parameters())
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in both.parameters()} == {id(p) for mask in masks for p in mask.parameters()}


def test_a_specialised_teacher_is_the_teacher_with_that_mask_and_no_other(model):
    masks = [MaskNet2d(8, 3).eval(), MaskNet1d(8, 3).eval()]
    alone = [specialise(model, [name], [mask]) for name, mask in zip(("encoder.conv2", "fc1"), masks, strict=True)]
    stacked = specialise(model, ["encoder.conv2", "fc1"], masks)
    net, batch = model.module, image()
    x = net.encoder["conv2"](net.encoder["conv1"](batch["image"]).relu())
    first, second = x * masks[0](x)[..., None, None], x
    outputs = []
    for features, mask in ((first, None), (second, masks[1]), (first, masks[1])):
        y = net.fc1(features.relu().mean((2, 3)))
        y = y if mask is None else y * mask(y)
        outputs.append(net.pair(net.fc2(y.relu())[None])[0][0])
    for teacher, wanted in zip((*alone, stacked), outputs, strict=True):
        torch.testing.assert_close(teacher(batch).logits, wanted)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-4)


class ChannelsLast(nn.Module):
    """A stage that gives `[B, H, W, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.head = nn.Linear(1, 8), nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stage(image.movedim(1, -1)).mean((1, 2)))


def test_stages_with_channels_last_are_masked_by_channel():
    model = Model(ChannelsLast(), stages=("stage",), channels_last=True)
    assert layer_shapes(model, ["stage"], image()) == [(3, 8, 6, 6)]
    mask = MaskNet2d(8, 3).eval()
    maps = model.module.stage(image()["image"].movedim(1, -1))
    weights = mask(maps.movedim(-1, 1))
    wanted = model.module.head((maps * weights[:, None, None]).mean((1, 2)))
    torch.testing.assert_close(specialise(model, ["stage"], [mask])(image()).logits, wanted)
    assert masked(maps, mask, channels_last=True).shape == maps.shape
