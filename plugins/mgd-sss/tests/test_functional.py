import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_mgd_sss.functional import (
    box_masks,
    cut_mix,
    gap_logit_l1,
    hard_pseudo_ce,
    ohem_keeps,
    region_cosine_mse,
    region_similarity,
)

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Constant(np.random.RandomState):
    """Numbers that are all the same part of their range."""

    def __init__(self, part: float) -> None:
        super().__init__(0)
        self.part = part

    def uniform(self, low: float = 0.0, high: float = 1.0, size: tuple[int, ...] = ()) -> np.ndarray:
        return np.full(size, low + self.part * (high - low))


@given(seeds, st.integers(1, 4))
def test_masks_are_boxes_of_zeros_and_ones_that_the_seed_decides(seed, boxes):
    masks = box_masks(np.random.RandomState(seed), 5, (24, 32), boxes)
    assert masks.shape == (5, 1, 24, 32)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.mean() < 0.55  # of the image: at most the largest area, and rounding
    torch.testing.assert_close(masks, box_masks(np.random.RandomState(seed), 5, (24, 32), boxes))


@given(seeds)
def test_one_box_has_an_area_in_the_range_and_is_a_rectangle(seed):
    (mask,) = box_masks(np.random.RandomState(seed), 1, (100, 100), 1, (0.25, 0.5))[:, 0]
    rows, columns = mask.amax(1), mask.amax(0)
    assert mask.sum() == rows.sum() * columns.sum()
    assert 0.23 < mask.mean() < 0.53


def test_boxes_that_overlap_cancel():
    alone, twice = (box_masks(Constant(0.5), 1, (20, 20), boxes, (0.4, 0.4)) for boxes in (1, 2))
    assert alone.sum() > 0
    assert twice.sum() == 0


def test_a_box_of_the_whole_area_covers_the_image():
    assert box_masks(Constant(0.3), 1, (8, 12), 1, (1.0, 1.0)).mean() == 1


@given(seeds)
def test_mixed_classes_are_the_classes_of_mixed_logits(seed):
    first, second = draw(seed, 2, 5, 6, 8), draw(seed + 1, 2, 5, 6, 8)
    mask = (draw(seed + 2, 2, 1, 6, 8) > 0).float()
    mixed = cut_mix(first.argmax(1), second.argmax(1), mask)
    assert torch.equal(mixed, (first * (1 - mask) + second * mask).argmax(1))
    assert torch.equal(cut_mix(first, second, mask), first * (1 - mask) + second * mask)
    assert torch.equal(cut_mix(first.argmax(1), second.argmax(1), torch.ones_like(mask)), second.argmax(1))
    assert torch.equal(cut_mix(first, second, torch.zeros(2, 1, 1, 1)), first)


@pytest.mark.parametrize("shape", [(2, 1, 6, 7), (3, 1, 6, 8)])
def test_masks_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="cannot be mixed"):
        cut_mix(draw(0, 2, 3, 6, 8), draw(1, 2, 3, 6, 8), torch.zeros(shape))


def plain_region_loss(student: Tensor, teacher: Tensor, grid: int) -> Tensor:
    """Cell by cell and pair by pair, for maps that the grid divides."""
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        vectors = []
        for features in (ours, theirs):
            height, width = features.shape[1] // grid, features.shape[2] // grid
            vectors.append([
                features[:, i * height : (i + 1) * height, j * width : (j + 1) * width].mean((1, 2))
                for i in range(grid) for j in range(grid)
            ])  # fmt: skip
        for i in range(grid**2):
            for j in range(grid**2):
                one, two = (F.cosine_similarity(v[i], v[j], dim=0) for v in vectors)
                total = total + (one - two) ** 2
    return total / len(student) / grid**4


@given(seeds)
def test_region_loss_against_a_loop_in_value_and_gradient(seed):
    student, teacher = draw(seed, 2, 5, 6, 9).requires_grad_(), draw(seed + 1, 2, 4, 3, 6)
    fast, plain = region_cosine_mse(student, teacher, 3), plain_region_loss(student, teacher, 3)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(torch.autograd.grad(fast, student), torch.autograd.grad(plain, student))


@given(seeds, st.floats(0.01, 100))
def test_region_loss_does_not_see_the_scale_of_features(seed, scale):
    student, teacher = draw(seed, 2, 6, 8, 8), draw(seed + 1, 2, 6, 8, 8)
    torch.testing.assert_close(region_cosine_mse(scale * student, teacher), region_cosine_mse(student, teacher))
    assert region_cosine_mse(scale * student, student) < 1e-8


@given(seeds)
def test_similarities_are_symmetric_cosines_with_ones_on_the_diagonal(seed):
    found = region_similarity(draw(seed, 2, 6, 8, 8), 4)
    torch.testing.assert_close(found, found.mT)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), torch.ones(2, 16))
    assert found.abs().max() < 1 + 1e-5


def test_empty_maps_give_finite_gradients():
    student = torch.zeros(1, 4, 8, 8, requires_grad=True)
    region_cosine_mse(student, draw(0, 1, 4, 8, 8)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_maps_smaller_than_the_grid_are_refused():
    with pytest.raises(ValueError, match="7 x 7 or more"):
        region_cosine_mse(draw(0, 1, 4, 8, 6), draw(0, 1, 4, 8, 8))


@given(seeds, st.floats(0.1, 3))
def test_image_loss_sees_the_mean_of_logits_and_nothing_else(seed, constant):
    logits = draw(seed, 3, 5, 4, 6)
    moved = logits.flatten(2)[..., torch.randperm(24)].unflatten(2, (4, 6))
    assert gap_logit_l1(moved, logits) < 1e-5
    torch.testing.assert_close(gap_logit_l1(moved + constant, logits), torch.tensor(15 * constant), rtol=1e-4, atol=0)


@given(seeds)
def test_image_loss_sums_over_classes_and_images(seed):
    student, teacher = draw(seed, 3, 5, 4, 6).requires_grad_(), draw(seed + 1, 3, 5, 2, 3)
    plain = torch.stack([(student[b, k].mean() - teacher[b, k].mean()).abs() for b in range(3) for k in range(5)]).sum()
    found = gap_logit_l1(student, teacher)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(plain, student))
    torch.testing.assert_close(3 * gap_logit_l1(student, teacher, "batchmean"), plain)


def test_image_loss_refuses_other_classes():
    with pytest.raises(ValueError, match="of the same K"):
        gap_logit_l1(draw(0, 2, 5, 4, 4), draw(0, 2, 4, 4, 4))


@pytest.mark.parametrize("loss", [gap_logit_l1, region_cosine_mse])
def test_teachers_get_no_gradient(loss):
    student, teacher = draw(0, 2, 5, 8, 8).requires_grad_(), draw(1, 2, 5, 8, 8).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@given(seeds)
def test_pseudo_labels_count_at_every_pixel(seed):
    logits, classes = draw(seed, 2, 5, 4, 6), draw(seed + 1, 2, 5, 4, 6).argmax(1)
    chosen = logits.softmax(1).gather(1, classes[:, None])
    torch.testing.assert_close(hard_pseudo_ce(logits, classes), -chosen.log().mean())


@given(seeds, st.floats(0.05, 1), st.integers(0, 60))
def test_hard_pixels_are_those_below_the_threshold_or_the_hardest(seed, threshold, kept):
    probability = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    count = int((probability <= ohem_keeps(probability, threshold, kept)).sum())
    assert count == max(int((probability <= threshold).sum()), min(kept, 50))
