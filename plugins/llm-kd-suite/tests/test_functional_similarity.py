"""Hidden states, attention maps, and models with different tokenizers."""

import math
import random
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_llm_kd_suite import functional as fn

few = settings(deadline=None, max_examples=10)
many = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)

HIDDEN = {"l2": fn.hidden_l2, "l1": fn.hidden_l1, "ce": fn.hidden_ce, "mmd": fn.mmd}
ATTENTION = {"mse": fn.attention_mse, "kl": fn.attention_kl}
every_hidden = pytest.mark.parametrize("loss", HIDDEN.values(), ids=HIDDEN)
every_attention = pytest.mark.parametrize("loss", ATTENTION.values(), ids=ATTENTION)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entropy(states: Tensor) -> Tensor:
    return -(states.softmax(-1) * states.log_softmax(-1)).sum(-1).mean()


# Hidden states


@every_hidden
@few
@given(seed=seeds)
def test_hidden_losses_are_least_at_equality_and_teach_the_student_only(loss, seed):
    student, teacher = draw(seed, 6, 5).requires_grad_(), draw(seed + 1, 6, 5).requires_grad_()
    least = entropy(teacher) if loss is fn.hidden_ce else torch.zeros(())
    same = teacher.detach().clone().requires_grad_()
    at_equality = loss(same, teacher)
    torch.testing.assert_close(at_equality, least, atol=1e-6, rtol=1e-5)
    if loss is not fn.hidden_l1:
        assert torch.autograd.grad(at_equality, same)[0].abs().max() < 1e-6
    value = loss(student, teacher)
    assert value > least + 1e-3
    value.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@every_hidden
def test_hidden_losses_do_not_see_the_order_and_compute_in_float32(loss):
    student, teacher, order = draw(1, 6, 5), draw(2, 6, 5), torch.randperm(6)
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    half = loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(student.bfloat16().float(), teacher.bfloat16().float()))


@every_hidden
def test_hidden_losses_of_no_tokens_are_zero(loss):
    student = torch.zeros(0, 5, requires_grad=True)
    value = loss(student, torch.zeros(0, 5))
    value.backward()
    assert value.item() == 0


@every_hidden
def test_states_of_different_widths_are_refused(loss):
    with pytest.raises(ValueError, match=r"project the student's|one width"):
        loss(torch.zeros(4, 3), torch.zeros(4, 5))


def test_hidden_losses_are_means_over_tokens_and_features():
    zero, one = torch.zeros(4, 3), 2 * torch.ones(4, 3)
    assert fn.hidden_l2(zero, one).item() == 4
    assert fn.hidden_l1(zero, one).item() == 2
    wanted = F.cross_entropy(draw(3, 4, 3), draw(4, 4, 3).softmax(-1))
    torch.testing.assert_close(fn.hidden_ce(draw(3, 4, 3), draw(4, 4, 3)), wanted)


def test_mmd_compares_sets_and_not_pairs():
    states = draw(5, 8, 4)
    assert fn.mmd(states, states.flip(0)).item() == pytest.approx(0, abs=1e-6)
    near, far = fn.mmd(states, draw(6, 20, 4)), fn.mmd(states, draw(6, 20, 4) + 2)
    assert 0 < near < far < 2


def test_mmd_is_the_sum_over_kernels_with_the_median_as_bandwidth():
    student, teacher = draw(7, 3, 2), draw(8, 4, 2)
    states = torch.cat([student, teacher])
    distances = torch.cdist(states, states).square()
    bandwidth = distances[~torch.eye(7, dtype=torch.bool)].median()
    kernel = (-distances / bandwidth).exp()
    wanted = kernel[:3, :3].mean() + kernel[3:, 3:].mean() - 2 * kernel[:3, 3:].mean()
    torch.testing.assert_close(fn.mmd(student, teacher), wanted)
    torch.testing.assert_close(fn.mmd(student + 1000, teacher + 1000), wanted, atol=1e-3, rtol=0)


# Attention maps


def maps(seed: int, batch: int = 2, heads: int = 3, length: int = 5, causal: bool = False) -> Tensor:
    scores = draw(seed, batch, heads, length, length).mul(2)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1)


@every_attention
@few
@given(seed=seeds, causal=st.booleans())
def test_attention_losses_are_zero_at_equality_and_teach_the_student_only(loss, seed, causal):
    student, teacher = maps(seed, causal=causal).requires_grad_(), maps(seed + 1, causal=causal).requires_grad_()
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    value = loss(student, teacher)
    assert value > 1e-3
    value.backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


@every_attention
def test_padding_does_not_change_attention_losses(loss):
    student, teacher = maps(1, causal=True), maps(2, causal=True)
    wanted = loss(student, teacher)
    padded = [F.pad(side, (0, 2, 0, 2), value=0.25) for side in (student, teacher)]
    padded[0][..., 5:, :], padded[0][..., :5, 5:], padded[1][..., :5, 5:] = 0.7, 0.0, 0.0
    padded[0].requires_grad_()
    mask = torch.tensor([[1] * 5 + [0] * 2] * 2)
    value = loss(padded[0], padded[1], mask)
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert (padded[0].grad[..., 5:, :] == 0).all()


@every_attention
def test_different_numbers_of_heads_are_averaged(loss):
    student, teacher = maps(3, heads=2), maps(4, heads=4)
    wanted = loss(student.mean(1, keepdim=True), teacher.mean(1, keepdim=True))
    torch.testing.assert_close(loss(student, teacher), wanted)


@every_attention
def test_attention_maps_that_do_not_fit_are_refused(loss):
    with pytest.raises(ValueError, match="one batch and length"):
        loss(maps(1), maps(1, length=4))
    with pytest.raises(ValueError, match="need a mask"):
        loss(maps(1), maps(1), torch.ones(2, 4))


def test_attention_kl_is_the_mean_over_rows_of_their_kl():
    student, teacher = maps(5), maps(6)
    wanted = F.kl_div(student.log(), teacher, reduction="sum") / (2 * 3 * 5)
    torch.testing.assert_close(fn.attention_kl(student, teacher), wanted)


# Sorted probabilities


@few
@given(seed=seeds)
def test_uld_sees_the_shape_of_a_distribution_and_not_its_tokens(seed):
    logits = draw(seed, 3, 6).requires_grad_()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fn.uld(logits, logits[:, order]), torch.zeros(3), atol=1e-6, rtol=0)
    other = draw(seed + 1, 3, 9).requires_grad_()
    values = fn.uld(logits, other)
    assert ((values > 1e-4) & (values <= 2)).all()
    values.sum().backward()
    assert other.grad is None
    assert logits.grad.abs().sum() > 0


def test_uld_pads_the_shorter_vocabulary_with_zeros():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.2, 0.4, 0.4]]).log()
    assert fn.uld(student, teacher).item() == pytest.approx(0.1 + 0.1 + 0.2)
    assert fn.uld(teacher, student).item() == pytest.approx(0.4)
    masked = F.pad(student, (0, 3), value=-math.inf).requires_grad_()
    value = fn.uld(masked, teacher)
    value.sum().backward()
    assert value.item() == pytest.approx(0.4)
    assert masked.grad.isfinite().all()


def test_uld_of_the_largest_probabilities_only():
    student, teacher = draw(1, 4, 9), draw(2, 4, 7)
    ours, theirs = (side.softmax(-1).sort(descending=True).values[:, :3] for side in (student, teacher))
    torch.testing.assert_close(fn.uld(student, teacher, top=3), (ours - theirs).abs().sum(-1))
    torch.testing.assert_close(fn.uld(student, teacher, top=100), fn.uld(student, teacher))
    torch.testing.assert_close(fn.uld(student, teacher, temperature=2), fn.uld(student / 2, teacher / 2))


def test_uld_of_half_precision_is_in_float32():
    student, teacher = draw(3, 4, 9).bfloat16(), draw(4, 4, 9).bfloat16()
    torch.testing.assert_close(fn.uld(student, teacher), fn.uld(student.float(), teacher.float()))


# Alignment


def offsets(pieces: list[str]) -> list[tuple[int, int]]:
    ends = list(accumulate(map(len, pieces)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize(
    ("student", "teacher", "groups"),
    [
        (["ab", "c"], ["ab", "c"], [((0, 1), (0, 1)), ((1, 2), (1, 2))]),
        (["un", "believ", "able"], ["unbeliev", "able"], [((0, 2), (0, 1)), ((2, 3), (1, 2))]),
        (["a", "bc", "d"], ["ab", "cd"], [((0, 3), (0, 2))]),
        (["Hello", " world"], ["Hello ", "world"], [((0, 2), (0, 2))]),
        (["a", "b", "cd", "e"], ["a", "bc", "d", "e"], [((0, 1), (0, 1)), ((1, 3), (1, 3)), ((3, 4), (3, 4))]),
        (["abc"], ["a", "b", "c"], [((0, 1), (0, 3))]),
    ],
)
def test_groups_are_the_finest_stretches_that_both_sides_spell(student, teacher, groups):
    assert fn.align(offsets(student), offsets(teacher)) == groups


def test_bytes_of_one_letter_are_never_parted():
    # "é!" as two bytes of é and "!", against one token for each letter
    assert fn.align([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)]) == [((0, 2), (0, 1)), ((2, 3), (1, 2))]


def test_spaces_that_offsets_leave_out_belong_to_either_side():
    assert fn.align([(0, 5), (6, 11)], [(0, 6), (6, 11)]) == [((0, 1), (0, 1)), ((1, 2), (1, 2))]


def test_end_tokens_go_together_and_a_lonely_one_is_in_no_group():
    end = (2, 2)
    assert fn.align([(0, 2), end], [(0, 1), (1, 2), end]) == [((0, 1), (0, 2)), ((1, 2), (2, 3))]
    assert fn.align([(0, 2), end], [(0, 1), (1, 2)]) == [((0, 1), (0, 2))]


def test_what_only_one_side_still_spells_is_in_no_group():
    assert fn.align(offsets(["ab", "cd", "ef"]), offsets(["ab", "c"])) == [((0, 1), (0, 1))]
    assert fn.align([], [(0, 1)]) == []


@many
@given(text=st.text("ab é", min_size=1, max_size=30), seed=seeds)
def test_groups_of_random_tokenizations_cover_the_text_and_are_the_finest(text, seed):
    chance = random.Random(seed)
    sides = []
    for _ in range(2):
        cuts = sorted({0, len(text), *(i for i in range(1, len(text)) if chance.random() < 0.5)})
        sides.append([text[a:b] for a, b in pairwise(cuts)])
    groups = fn.align(*map(offsets, sides))
    for side, pieces in enumerate(sides):
        spelt = ["".join(pieces[slice(*group[side])]) for group in groups]
        assert "".join(spelt) == text
        others = ["".join(sides[1 - side][slice(*group[1 - side])]) for group in groups]
        assert spelt == others
    common = {end for _, end in offsets(sides[0])} & {end for _, end in offsets(sides[1])}
    assert len(groups) == len(common)


# Stretches of text


def test_logprobs_of_spans_are_sums_with_their_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    found = fn.span_logprobs(logprobs, [(0, 1), (1, 3)])
    assert found.tolist() == [-1, -5]
    found.sum().backward()
    assert logprobs.grad.tolist() == [1, 1, 1, 0]
    assert fn.span_logprobs(logprobs, []).shape == (0,)


OURS = torch.tensor([1, 0, 2])
THEIRS = torch.tensor([3, 2])
GROUPS = [((0, 2), (0, 1)), ((2, 3), (1, 2))]


def test_a_group_is_its_first_distribution_times_the_tokens_that_follow():
    student, teacher = draw(5, 3, 4), draw(6, 2, 6)
    q, p = student.softmax(-1), teacher.softmax(-1)
    merged = [(q[0] * q[1, 0], p[0]), (q[2], p[1])]
    wanted = [F.pad(a.sort(descending=True).values, (0, 2)) - b.sort(descending=True).values for a, b in merged]
    found = fn.span_uld(student, teacher, OURS, THEIRS, GROUPS)
    torch.testing.assert_close(found, torch.stack(wanted).abs().sum(1))


def test_common_tokens_are_compared_directly_and_the_rest_sorted():
    student, teacher = draw(7, 3, 4), draw(8, 2, 6)
    common = [(0, 5), (2, 1)]
    q = student.softmax(-1)
    merged = torch.stack([q[0] * q[1, 0], q[2]])
    p = teacher.softmax(-1)
    ours, theirs = merged[:, [0, 2]], p[:, [5, 1]]
    kl = (theirs * (theirs / ours).log() - theirs + ours).sum(1)
    rest = [side.sort(descending=True).values for side in (merged[:, [1, 3]], p[:, [0, 2, 3, 4]])]
    sorted_distance = (F.pad(rest[0], (0, 2)) - rest[1]).abs().sum(1)
    for pairs in (common, torch.tensor(common)):
        found = fn.span_uld(student, teacher, OURS, THEIRS, GROUPS, common=pairs, kl_weight=2, uld_weight=0.5)
        torch.testing.assert_close(found, 2 * kl + 0.5 * sorted_distance)


@few
@given(seed=seeds)
def test_same_tokens_and_same_models_are_at_zero(seed):
    logits, labels = draw(seed, 4, 6).requires_grad_(), torch.tensor([0, 3, 1, 5])
    teacher = logits.detach().clone().requires_grad_()
    groups = [((0, 2), (0, 2)), ((2, 3), (2, 3)), ((3, 4), (3, 4))]
    for common in ([], [(i, i) for i in range(4)]):
        values = fn.span_uld(logits, teacher, labels, labels, groups, common=common)
        torch.testing.assert_close(values, torch.zeros(3), atol=1e-6, rtol=0)
        other = fn.span_uld(draw(seed + 1, 4, 6).requires_grad_(), teacher, labels, labels, groups, common=common)
        assert (other > 0).all()
        other.sum().backward()
    assert teacher.grad is None


def test_masked_classes_stay_finite_in_spans():
    student, teacher = draw(9, 3, 4), draw(10, 2, 6)
    student[:, 3], teacher[:, 5], teacher[:, 4] = -math.inf, -math.inf, -math.inf
    student.requires_grad_()
    found = fn.span_uld(student, teacher, OURS, THEIRS, GROUPS, common=[(0, 5), (3, 1), (2, 2)])
    found.sum().backward()
    assert found.isfinite().all()
    assert student.grad.isfinite().all()


def test_bad_arguments_are_refused_with_the_reason():
    two, three = torch.zeros(2, 5), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="same positions"):
        fn.uld(two, three)
    with pytest.raises(ValueError, match="top must be at least 1"):
        fn.uld(two, two, top=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        fn.uld(two, two, temperature=0)
    with pytest.raises(ValueError, match="weights must be at least 0"):
        fn.span_uld(three, two, OURS, THEIRS, GROUPS, uld_weight=-1)
    with pytest.raises(ValueError, match="need labels of shape"):
        fn.span_uld(three, two, OURS[:2], THEIRS, GROUPS)
