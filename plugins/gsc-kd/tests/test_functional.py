import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_gsc_kd.functional import (
    cosine_distance,
    pixel_direction,
    pixel_errors,
    region_direction,
    region_features,
    resize_labels,
    selective_pixel_kl,
    selective_region_cosine,
)

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

CLASSES, SIZE = 5, 8
seeds = st.integers(0, 2**31)


def halves(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two nets and labels: the first net knows the left half and guesses on the right, the second the
    opposite."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (2, SIZE, SIZE), generator=generator)
    right = 10 * F.one_hot(labels, CLASSES).movedim(-1, 1).float()
    guess = torch.randn(right.shape, generator=generator)
    left = (torch.arange(SIZE) < SIZE // 2).expand(2, 1, SIZE, SIZE)
    return torch.where(left, right, guess), torch.where(left, guess, right), labels


def directions(cnn: Tensor, vit: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    errors = (pixel_errors(logits, labels) for logits in (cnn, vit))
    return pixel_direction(*errors, labels != 255)


def test_each_net_teaches_the_half_that_it_knows():
    cnn, vit, labels = halves()
    cnn_teaches, vit_teaches = directions(cnn, vit, labels)
    left = (torch.arange(SIZE) < SIZE // 2).expand(2, SIZE, SIZE)
    assert torch.equal(cnn_teaches, left)
    assert torch.equal(vit_teaches, ~left)


def test_gradient_reaches_the_side_that_learns_only_and_only_where_it_is_taught():
    cnn, vit, labels = halves()
    cnn.requires_grad_()
    vit.requires_grad_()
    cnn_teaches, vit_teaches = directions(cnn, vit, labels)
    selective_pixel_kl(vit, cnn, cnn_teaches).backward()
    assert cnn.grad is None
    assert torch.equal((vit.grad != 0).any(1), cnn_teaches)
    vit.grad = None
    selective_pixel_kl(cnn, vit, vit_teaches).backward()
    assert vit.grad is None
    assert torch.equal((cnn.grad != 0).any(1), vit_teaches)


def trained(inverted: bool) -> list[float]:
    """The mean label errors of two nets after they taught each other."""
    cnn, vit, labels = halves()
    cnn.requires_grad_()
    vit.requires_grad_()
    optimizer = torch.optim.SGD([cnn, vit], lr=5.0)
    for _ in range(40):
        to_vit, to_cnn = directions(cnn.detach(), vit.detach(), labels)
        if inverted:
            to_vit, to_cnn = to_cnn, to_vit
        loss = selective_pixel_kl(vit, cnn, to_vit) + selective_pixel_kl(cnn, vit, to_cnn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [pixel_errors(logits.detach(), labels).mean().item() for logits in (cnn, vit)]


def test_selection_lowers_the_errors_of_both_and_its_inverse_raises_them():
    cnn, vit, labels = halves()
    before = [pixel_errors(logits, labels).mean().item() for logits in (cnn, vit)]
    for start, selected, inverted in zip(before, trained(False), trained(True), strict=True):
        assert selected < start < inverted


@given(seeds, st.floats(0.5, 5))
def test_divergence_of_all_pixels_is_that_of_mutual_learning(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, CLASSES, 3, 4, generator=generator)
    found = selective_pixel_kl(student, teacher, torch.ones(2, 3, 4, dtype=torch.bool), temperature)
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert selective_pixel_kl(teacher, teacher, torch.ones(2, 3, 4, dtype=torch.bool)).abs() < 1e-6


@given(seeds)
def test_mean_is_over_the_mask_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, CLASSES, 4, 4, generator=generator)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 3, 0] = True
    singles = [selective_pixel_kl(student[..., i : i + 1, j : j + 1], teacher[..., i : i + 1, j : j + 1],
                                  torch.ones(1, 1, 1, dtype=torch.bool)) for i, j in ((1, 2), (3, 0))]  # fmt: skip
    torch.testing.assert_close(selective_pixel_kl(student, teacher, mask), torch.stack(singles).mean())
    assert selective_pixel_kl(student, teacher, ~mask, over=torch.tensor(7.0)) == pytest.approx(
        2 * selective_pixel_kl(student, teacher, ~mask).item(), rel=1e-4
    )


def test_nobody_taught_costs_nothing():
    student, teacher = torch.randn(2, 1, CLASSES, 4, 4)
    nobody = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert selective_pixel_kl(student, teacher, nobody) == 0
    assert selective_region_cosine(student, teacher, nobody) == 0


@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_regions_are_compared_by_their_mean_over_valid_pixels(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.rand(2, 2, 4 * rows, 3 * columns, generator=generator)
    valid = torch.rand(one.shape, generator=generator) < 0.5
    mask = region_direction(one, other, (rows, columns), valid)
    for b in range(2):
        for r in range(rows):
            for c in range(columns):
                cell = (b, slice(4 * r, 4 * r + 4), slice(3 * c, 3 * c + 3))
                counts = valid[cell]
                expected = counts.any() and one[cell][counts].mean() < other[cell][counts].mean()
                assert mask[b, r, c] == expected


def test_a_tie_and_a_region_without_labels_teach_neither():
    one, other = torch.ones(1, 4, 4), torch.ones(1, 4, 4)
    one[0, 2:] = 2
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    for pair in ((one, other), (other, one)):
        assert not region_direction(*pair, (2, 2), valid).any()


def test_ignored_pixels_teach_neither_and_have_no_error():
    cnn, vit, labels = halves()
    labels[:, :3] = 255
    assert not pixel_errors(cnn, labels)[:, :3].any()
    for mask in directions(cnn, vit, labels):
        assert not mask[:, :3].any()


def test_errors_are_those_of_enlarged_logits():
    logits, labels = torch.randn(1, CLASSES, 4, 4), torch.randint(CLASSES, (1, 16, 16))
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pixel_errors(logits, labels), F.cross_entropy(large, labels, reduction="none"))


def test_reduced_labels_are_the_pixels_at_the_centres():
    labels = torch.randint(150, (2, 16, 32))
    labels[0, 2, 2] = -100
    assert torch.equal(resize_labels(labels, (4, 8)), labels[:, 2::4, 2::4])


@given(seeds)
def test_region_cosine_ignores_the_length_of_features(seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 2, 6, 8, 8, generator=generator)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    found = selective_region_cosine(region_features(3 * one, (4, 4)), region_features(other, (4, 4)), mask)
    pooled = (F.avg_pool2d(maps, 2) for maps in (one, other))
    torch.testing.assert_close(found, cosine_distance(*pooled))


def test_region_cosine_teaches_one_side_in_the_mask_only():
    one, other = (torch.randn(1, 6, 4, 4, requires_grad=True) for _ in range(2))
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0] = True
    selective_region_cosine(region_features(one, (4, 4)), region_features(other, (4, 4)), mask).backward()
    assert other.grad is None
    assert torch.equal((one.grad != 0).any(1), mask)


@pytest.mark.parametrize("loss", [selective_pixel_kl, selective_region_cosine])
def test_shapes_that_do_not_fit_are_refused(loss):
    maps, mask = torch.randn(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="differ"):
        loss(maps, torch.randn(1, 3, 2, 2), mask)
    with pytest.raises(ValueError, match="mask"):
        loss(maps, maps, mask[:, :2])
    with pytest.raises(ValueError, match="differ"):
        cosine_distance(maps, torch.randn(1, 2, 4, 4))
