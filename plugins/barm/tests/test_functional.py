import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_barm.functional import (
    background_feature_distill,
    bga_bce,
    bga_triplet,
    group_kd,
    label_masks,
    pb_bce,
    pseudo_label,
    shared_background,
    step_losses,
    unify_background,
)
from kdcore.data import IGNORE

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

LAYOUT, SIZE, WIDTH = (3, 2, 1), 6, 5  # classes of each step; side of the logits; channels of a branch
seeds = st.integers(0, 2**31)


def example(seed: int, batch: int = 2) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Groups and features of the student and the teacher, and labels of the last step three times as large."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> Tensor:
        return 2 * torch.randn(batch, channels, SIZE, SIZE, generator=generator)

    groups = [draw(1 + n).requires_grad_() for n in LAYOUT]
    features = [draw(WIDTH).requires_grad_() for _ in LAYOUT]
    previous = [draw(1 + n).requires_grad_() for n in LAYOUT[:-1]]
    previous_features = [draw(WIDTH).requires_grad_() for _ in LAYOUT[:-1]]
    new = 1 + sum(LAYOUT) - 1
    choice = torch.randint(4, (batch, 3 * SIZE, 3 * SIZE), generator=generator)
    labels = torch.tensor([0, 0, new, IGNORE])[choice]
    return groups, features, previous, previous_features, labels


@given(seed=seeds)
def test_evaluation_lets_residuals_only_lower_the_background(seed):
    groups = example(seed)[0]
    background = unify_background(groups, training=False)[:, 0]
    assert (background <= groups[0][:, 0]).all()
    with torch.no_grad():
        for group in groups[1:]:
            group[:, 0] = group[:, 0].abs() + 10
    assert torch.equal(unify_background(groups, training=False)[:, 0], groups[0][:, 0])


def test_unified_logits_by_hand():
    groups = [torch.tensor(v).view(1, -1, 1, 1) for v in ([1.0, 5.0, 6.0], [-2.0, 7.0], [3.0, 8.0])]
    assert unify_background(groups, training=True).flatten().tolist() == [2, 5, 6, 7, 8]
    assert unify_background(groups, training=False).flatten().tolist() == [-1, 5, 6, 7, 8]
    assert shared_background(groups).flatten().tolist() == [1, 5, 6, 7, 8]
    assert unify_background(groups[:1], training=True).flatten().tolist() == [1, 5, 6]


@given(seed=seeds)
def test_the_labels_train_the_newest_group_alone(seed):
    groups, _, _, _, labels = example(seed)
    pb_bce(unify_background(groups, training=True), labels, old_classes=sum(LAYOUT[:-1])).backward()
    for group in groups[:-1]:
        assert group.grad is None or not group.grad.any()
    assert (groups[-1].grad.abs().sum((0, 2, 3)) > 0).all()


@given(seed=seeds)
def test_pb_bce_against_plain_one_hot_targets(seed):
    groups, _, _, _, labels = example(seed)
    logits = unify_background(groups, training=True)
    upsampled = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    counts = labels != IGNORE
    target = F.one_hot(labels.where(counts, 0), logits.shape[1]).movedim(-1, 1).float()
    pixels = F.binary_cross_entropy_with_logits(upsampled, target, reduction="none").sum(1)
    torch.testing.assert_close(pb_bce(logits, labels, 2), pixels[counts].mean())


@given(seed=seeds)
def test_the_teacher_as_its_own_student_gives_no_gradient_of_group_kd(seed):
    groups = example(seed)[0]
    copies = [group.detach() for group in groups[:-1]]
    value = group_kd(groups, copies)
    entropy = sum(
        F.binary_cross_entropy(c.sigmoid(), c.sigmoid(), reduction="none").mean((0, 2, 3)).sum() for c in copies
    )
    torch.testing.assert_close(value, entropy, rtol=1e-4, atol=1e-5)
    value.backward()
    assert max(group.grad.abs().max() for group in groups[:-1]) < 1e-7
    assert groups[-1].grad is None


@given(seed=seeds)
def test_no_gradient_reaches_the_teacher(seed):
    parts = example(seed)
    sum(step_losses(*parts).values()).backward()
    assert all(tensor.grad is None for side in parts[2:4] for tensor in side)
    assert all(group.grad.isfinite().all() for group in parts[0])


@given(seed=seeds)
def test_features_count_on_the_background_only(seed):
    _, features, _, previous, labels = example(seed)
    positive, negative = label_masks(labels, (SIZE, SIZE))
    reference = background_feature_distill(features, previous, negative)
    moved = [f + 5 * (1 - negative) for f in features]
    torch.testing.assert_close(background_feature_distill(moved, previous, negative), reference)
    assert background_feature_distill(previous, previous, negative) == 0
    assert not (positive * negative).any()


@given(seed=seeds)
def test_terms_of_parts_combine_to_those_of_the_whole(seed):
    *parts, labels = example(seed, batch=3)
    whole = step_losses(*parts, labels)
    total = dict.fromkeys(whole, 0.0)
    counts = {"pb-bce": (labels != IGNORE).flatten(1).sum(1)}
    for name, mask in zip(("bga-bce", "bga-tri"), label_masks(labels, (SIZE, SIZE)), strict=True):
        counts[name] = mask.flatten(1).sum(1)
    for rows in (slice(0, 1), slice(1, 3)):
        terms = step_losses(*([t[rows] for t in side] for side in parts), labels[rows])
        for name, term in terms.items():
            count = counts.get(name, torch.ones(3))
            total[name] = total[name] + term * count[rows].sum() / count.sum()
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_pseudo_labels_fill_the_background_and_nothing_else():
    probs = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.6, 0.1], [0.1, 0.69, 0.3], [0.1, 0.2, 0.7]]).T.reshape(1, 3, 2, 2)
    zeros = torch.zeros(1, 2, 2, dtype=torch.long)
    assert pseudo_label(probs, zeros, 0.7).flatten().tolist() == [1, 0, 0, 2]
    given = torch.tensor([[[4, 0], [IGNORE, IGNORE]]])
    assert pseudo_label(probs, given, 0.7).flatten().tolist() == [4, 0, IGNORE, IGNORE]


def test_masks_take_the_upper_left_pixel_of_each_cell():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 0, 0], labels[0, 2, 2], labels[0, 1, 3] = 3, IGNORE, 3
    positive, negative = label_masks(labels, (2, 2))
    assert positive.flatten().tolist() == [1, 0, 0, 0]
    assert negative.flatten().tolist() == [0, 1, 1, 0]


def test_terms_of_the_residual_pull_apart():
    residual = torch.zeros(1, 1, 1, 2, requires_grad=True)
    new, background = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    (bga_bce(residual, new) + bga_triplet(residual - 1e-3, background)).backward()
    assert residual.grad[..., 0] > 0 > residual.grad[..., 1]
    assert bga_triplet(torch.ones(1, 1, 1, 2), background) == 0


@pytest.mark.parametrize("label", [0, 5, IGNORE])
def test_labels_of_one_kind_stay_finite(label):
    *parts, labels = example(0)
    terms = step_losses(*parts, torch.full_like(labels, label))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert parts[0][-1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    *parts, labels = example(0)
    halves = [[t.detach().to(dtype) for t in side] for side in parts]
    floats = [[t.float() for t in side] for side in halves]
    torch.testing.assert_close(step_losses(*halves, labels), step_losses(*floats, labels))


def test_a_shared_background_is_plain_training_on_the_labels():
    *parts, labels = example(0)
    terms = step_losses(*parts, labels, pseudo_thresh=None, shared=True)
    assert set(terms) == {"pb-bce", "bfd", "gkd"}
    terms["pb-bce"].backward()
    assert all(group.grad[:, 1:].any() for group in parts[0])
    assert parts[0][0].grad[:, 0].any()


def test_what_does_not_fit_gets_a_clear_sentence():
    groups, features, previous, previous_features, labels = example(0)
    with pytest.raises(ValueError, match="no group"):
        unify_background([], training=True)
    with pytest.raises(ValueError, match="one batch and size"):
        unify_background([groups[0], groups[1][..., :3]], training=True)
    with pytest.raises(ValueError, match="one head less"):
        step_losses(groups, features, previous[:1], previous_features[:1], labels)
    with pytest.raises(ValueError, match="must be the same"):
        group_kd(groups, [previous[1], previous[0]])
    with pytest.raises(ValueError, match="do not fit"):
        pseudo_label(torch.rand(2, 3, 4, 4), labels, 0.5)
