import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_acam_kd.functional import cross_attention, mask_dice_diversity, masked_mse, pooled_size

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

seeds = st.integers(0, 2**31)
KINDS = ("channel", "spatial")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def example(seed: int, kind: str, masks: int = 4) -> tuple[Tensor, Tensor]:
    """A difference ``[2, 5, 12]`` and masks over its channels or positions."""
    return draw(seed, 2, 5, 12), draw(seed + 1, 2, masks, 5 if kind == "channel" else 12).sigmoid()


@pytest.mark.parametrize("channels", [(9, 19), (4, 8), (3, 2)])
def test_attention_against_a_plain_softmax_in_value_and_gradient(channels):
    narrow, wide = channels
    inputs = [draw(i, 2, *shape).requires_grad_() for i, shape in enumerate(((12, narrow), (7, narrow), (7, wide)))]
    queries, keys, values = inputs
    scores = queries @ keys.mT / math.sqrt(narrow)
    expected, found = scores.softmax(2) @ values, cross_attention(queries, keys, values)
    torch.testing.assert_close(found, expected)
    weight = draw(9, *expected.shape)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_attention_never_keeps_positions_by_positions():
    positions, kept = 1024, []
    inputs = [draw(i, 1, positions, c).requires_grad_() for i, c in enumerate((9, 9, 19))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cross_attention(*inputs).sum().backward()
    assert kept
    assert max(kept) < positions**2 / 10


@pytest.mark.parametrize("weight", ["squared", "linear"])
def test_masked_error_against_plain_loops(weight):
    for kind in KINDS:
        difference, masks = example(0, kind)
        total = 0.0
        for d, own in zip(difference, masks, strict=True):
            for mask in own:
                shown = mask[:, None] if kind == "channel" else mask[None]
                weighted = (shown * d).square() if weight == "squared" else shown * d.square()
                other = 12 if kind == "channel" else 5
                total += float(weighted.sum() / (other * mask.sum() + 1e-5))
        assert masked_mse(difference, masks, kind, weight).item() == pytest.approx(total / 8, rel=1e-5)


@given(seed=seeds, value=st.floats(0.05, 1.0))
def test_constant_masks_give_the_mean_squared_error(seed, value):
    for kind in KINDS:
        difference, masks = example(seed, kind)
        mse, constant = difference.square().mean(), torch.full_like(masks, value)
        torch.testing.assert_close(masked_mse(difference, constant, kind, "linear"), mse, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(masked_mse(difference, constant, kind), value * mse, rtol=1e-4, atol=1e-6)


@given(seed=seeds)
def test_masked_error_is_that_of_the_positions_the_mask_shows(seed):
    difference, _ = example(seed, "spatial")
    mask = torch.zeros(2, 1, 12)
    mask[..., 3:6] = 1
    found = masked_mse(difference, mask, "spatial")
    torch.testing.assert_close(found, difference[:, :, 3:6].square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(masked_mse(difference.where(mask == 1, 7.0), mask, "spatial"), found)


@pytest.mark.parametrize("form", ["pairwise", "global"])
def test_diversity_against_plain_loops(form):
    masks = draw(0, 2, 4, 12).sigmoid()
    total = 0.0
    for own in masks:
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        if form == "pairwise":
            dice = [2 * (own[i] @ own[j]) / (own[i] @ own[i] + own[j] @ own[j]) for i, j in pairs]
            total += float(sum(dice)) / len(pairs)
        else:
            total += float(2 * sum(own[i] @ own[j] for i, j in pairs) / (2 * own.square().sum()))
    assert mask_dice_diversity(masks, form).item() == pytest.approx(total / 2, rel=1e-5)


@given(seed=seeds, count=st.integers(2, 6))
def test_diversity_lies_between_that_of_disjoint_and_of_equal_masks(seed, count):
    masks = draw(seed, 2, count, 12).sigmoid()
    assert 0 < mask_dice_diversity(masks) <= 1 + 1e-6
    equal = masks[:, :1].expand_as(masks)
    assert mask_dice_diversity(equal).item() == pytest.approx(1, rel=1e-5)
    assert mask_dice_diversity(equal, "global").item() == pytest.approx(count - 1, rel=1e-5)
    disjoint = F.one_hot(torch.arange(count), 12)[None].float()
    assert mask_dice_diversity(disjoint) == mask_dice_diversity(disjoint, "global") == 0


@given(height=st.integers(1, 300), width=st.integers(1, 300), most=st.integers(1, 5000))
def test_pooled_maps_fill_the_limit_and_keep_their_shape(height, width, most):
    small = pooled_size(height, width, most)
    assert 1 <= small[0] <= height
    assert 1 <= small[1] <= width
    assert small[0] * small[1] <= most
    assert (small == (height, width)) == (height * width <= most)
    assert pooled_size(width, height, most) == small[::-1] or height == width
    if min(small) > 8:
        assert height / width == pytest.approx(small[0] / small[1], rel=0.2)


def test_maps_of_any_size_stay_as_they_are_without_a_limit():
    assert pooled_size(128, 256, None) == (128, 256)
    assert pooled_size(64, 128, 4096) == (45, 91)


def test_wrong_arguments_get_a_clear_sentence():
    difference, masks = example(0, "spatial")
    for arguments, message in (
        ((difference, masks, "pixels"), "channel or spatial"),
        ((difference, masks, "spatial", "cubed"), "squared or linear"),
        ((difference, masks, "channel"), r"must be \[2, M, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_mse(*arguments)
    with pytest.raises(ValueError, match="two of them"):
        mask_dice_diversity(masks[:, :1])
    with pytest.raises(ValueError, match="pairwise or global"):
        mask_dice_diversity(masks, "local")
