import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_llm_kd_suite.functional import forward_kl
from kd_mgsr_llm import functional as F
from kd_mgsr_llm.modules import Levels
from kdcore.data import IGNORE

SEEDS = st.integers(0, 10_000)


def pair(seed: int, rows: int = 5, size: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, rows, size, generator=generator, dtype=torch.float64))


def levels(rows: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.full((rows,), low, dtype=torch.float64), torch.full((rows,), high, dtype=torch.float64)


def test_kl_map_is_the_forward_kl_where_labels_count_and_0_elsewhere():
    student, teacher = (side.view(1, 5, 11) for side in pair(0))
    labels = torch.tensor([[IGNORE, 3, 4, 5, IGNORE]])
    found = F.kl_map(student, teacher, labels)
    torch.testing.assert_close(found[0, 1:4], forward_kl(student, teacher)[0, 1:4])
    assert found[0, [0, 4]].tolist() == [0, 0]


def test_error_is_the_largest_divergence_where_tokens_differ_inside_of_the_mask():
    divergences = torch.tensor([[9.0, 1, 5, 2, 9], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    theirs = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    answers = torch.tensor([[2, 2, 1, 2, 2], [1, 1, 1, 1, 2], [2, 1, 2, 1, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert F.find_errors(divergences, theirs, answers, mask).tolist() == [3, -1, 2]
    with pytest.raises(ValueError, match="same shape"):
        F.find_errors(divergences, theirs[:2], answers, mask)


def test_rank_quantile_counts_the_classes_that_are_not_more_probable():
    found = F.rank_quantiles(torch.tensor([[0.0, 3, 1, 1], [5, 2, -torch.inf, 7]]))
    torch.testing.assert_close(found, torch.tensor([[0.25, 1, 0.75, 0.75], [0.75, 0.5, 0.25, 1]]))


def test_mask_keeps_what_lies_between_the_levels_and_what_it_is_told_to():
    logits = torch.arange(10.0).expand(3, 10)
    low, high = torch.tensor([0.35, 0.35, 0.92]), torch.tensor([0.85, 0.85, 0.95])
    plain = F.clip_mask(logits, low, high)
    assert plain[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert plain[2].nonzero().flatten().tolist() == [9]  # nothing is between: the likeliest one
    kept = F.clip_mask(logits, low, high, torch.tensor([[9, 0], [9, 9], [9, 1]]))
    assert kept[0].nonzero().flatten().tolist() == [0, 3, 4, 5, 6, 7, 9]
    assert kept[1].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 9]
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="tau"):
        F.clip_mask(logits, low, high, tau=0)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_clipped_kl_is_the_kl_without_clipping_in_value_and_gradient(seed):
    student, teacher = pair(seed)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    clipped, plain = F.dac_kl(one, teacher, *levels(5, 0.0, 1.0)), forward_kl(two, teacher)
    torch.testing.assert_close(clipped, plain)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x)[0] for v, x in ((clipped, one), (plain, two))))


@given(SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
@settings(max_examples=50, deadline=None)
def test_clipped_kl_is_that_of_the_clipped_teacher_and_not_negative(seed, one, two, keep):
    student, teacher = pair(seed)
    low, high = levels(5, min(one, two), max(one, two))
    kept = teacher.argmax(1) if keep else None
    found = F.dac_kl(student, teacher, low, high, kept)
    p = teacher.softmax(1) * F.clip_mask(teacher, low, high, kept)
    p = p / p.sum(1, keepdim=True)
    wanted = (torch.special.xlogy(p, p) - p * student.log_softmax(1)).sum(1)
    torch.testing.assert_close(found, wanted)
    assert (found >= -1e-12).all()


def test_levels_get_the_gradient_of_the_divergence_through_the_soft_mask():
    student, teacher = pair(3, rows=4, size=50)
    low, high = (side.requires_grad_() for side in levels(4, 0.3, 0.9))
    found = torch.autograd.grad(F.dac_kl(student, teacher, low, high, tau=0.05).sum(), [low, high])
    # the same by hand: dL/dm_c = p_c / Z (log(p~_c / q_c) - L), times the slope of the soft mask
    mask, p, q = F.clip_mask(teacher, low, high).detach(), teacher.log_softmax(1), student.log_softmax(1)
    total = (p.exp() * mask).sum(1, keepdim=True)
    ratio = torch.where(mask > 0, p - total.log(), math.log(F.LEAST)) - q
    value = (p.exp() * mask / total * ratio).sum(1, keepdim=True)
    rho, low, high = F.rank_quantiles(teacher), low[:, None], high[:, None]
    soft = torch.sigmoid((rho - low) / 0.05) * torch.sigmoid((high - rho) / 0.05)
    by_hand = torch.autograd.grad((soft * (p.exp() / total * (ratio - value)).detach()).sum(), [low, high])
    for ours, theirs in zip(found, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs.flatten())
        assert (ours != 0).all()


def test_impossible_tokens_and_padded_vocabularies_leave_value_and_gradients_finite():
    student, teacher = pair(1)
    teacher[:, 2], student = -torch.inf, torch.nn.functional.pad(student, (0, 3), value=0.5).requires_grad_()
    low, high = (side.requires_grad_() for side in levels(5, 0.1, 0.99))
    value = F.dac_kl(student, teacher, low, high, teacher.argmax(1))
    found = torch.autograd.grad(value.sum(), [student, low, high])
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found)
    assert (found[0][:, 11:] == 0).all()


def test_levels_start_near_1_and_at_half_of_it_and_above_all_but_the_likeliest_of_a_large_vocabulary():
    for size, topk in ((50, 64), (50, None), (5000, 64)):
        net = Levels(size, topk)
        low, high = net(torch.randn(3, size), torch.randn(3, size))
        assert (high > 0.98).all()
        torch.testing.assert_close(low, high / 2)
        assert 1 - high[0] < 1 / size or size == 50
        assert net.layers[0].in_features == 2 * min(size, topk or size)
    assert Levels(5000, start=2.0)(torch.randn(1, 5000), torch.randn(1, 5000))[1].item() == pytest.approx(
        0.8808, abs=1e-4
    )


def test_clipping_network_gets_a_gradient_and_the_student_none_through_it():
    student, teacher = (side.float() for side in pair(2, size=50))
    student.requires_grad_()
    net = Levels(50)
    low, high = net(student, teacher)
    assert torch.autograd.grad(low.sum() + high.sum(), student, allow_unused=True, retain_graph=True) == (None,)
    F.dac_kl(student, teacher, low, high, teacher.argmax(1)).sum().backward()
    assert (net.layers[2].bias.grad != 0).all()
    torch.nn.init.normal_(net.layers[2].weight)
    F.dac_kl(student, teacher, *net(student, teacher), teacher.argmax(1)).sum().backward()
    assert net.layers[0].weight.grad.abs().max() > 0


def test_joint_training_does_not_collapse_the_mask_and_agreement_rises():
    torch.manual_seed(0)
    inputs = torch.randn(256, 16)
    teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 50))
    with torch.no_grad():
        theirs = 6 * teacher(inputs)
    student, net = torch.nn.Linear(16, 50), Levels(50)
    optimizer = torch.optim.AdamW(
        [{"params": student.parameters(), "lr": 2e-2}, {"params": net.parameters(), "lr": 2e-3}]
    )

    def agreement() -> float:
        return (student(inputs).argmax(1) == theirs.argmax(1)).float().mean().item()

    before = agreement()
    for _ in range(200):
        ours = student(inputs)
        loss = F.dac_kl(ours, theirs, *net(ours, theirs), theirs.argmax(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low, high = net(student(inputs), theirs)
    assert F.clip_mask(theirs, low, high, theirs.argmax(1)).mean() > 0.05
    assert agreement() > before + 0.2


@given(SEEDS, st.sampled_from(["l2", "squared", "cosine"]))
@settings(max_examples=30, deadline=None)
def test_span_distance_is_0_where_both_agree_and_above_0_otherwise(seed, metric):
    ours, theirs = (side.view(3, 2, 11) for side in pair(seed, rows=6))
    same = F.span_correlation(theirs + 3.0, theirs, metric=metric)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-7, rtol=0)
    assert (F.span_correlation(ours, theirs, metric=metric) > 1e-9).all()


def test_span_distance_compares_products_of_neighbours():
    ours, theirs = (side.view(3, 2, 11) for side in pair(4, rows=6))
    r, s = (side.softmax(-1).prod(1) for side in (theirs, ours))
    torch.testing.assert_close(F.span_products(theirs), r)
    torch.testing.assert_close(F.span_correlation(ours, theirs), (r - s).square().sum(1).sqrt())
    torch.testing.assert_close(F.span_correlation(ours, theirs, metric="squared"), (r - s).square().sum(1))
    cosine = 1 - (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1))
    torch.testing.assert_close(F.span_correlation(ours, theirs, metric="cosine"), cosine)
    with pytest.raises(ValueError, match="metric"):
        F.span_correlation(ours, theirs, metric="l1")


def test_span_distance_on_the_largest_products_is_that_of_the_union_of_both_sides():
    ours, theirs = (side.view(3, 2, 11) for side in pair(5, rows=6))
    r, s = (side.softmax(-1).prod(1) for side in (theirs, ours))
    kept = torch.zeros_like(r, dtype=torch.bool)
    for side in (r, s):
        kept.scatter_(1, side.topk(3).indices, True)
    wanted = ((r - s) * kept).norm(dim=1)
    torch.testing.assert_close(F.span_correlation(ours, theirs, top=3), wanted)
    torch.testing.assert_close(F.span_correlation(ours, theirs, top=11), (r - s).norm(dim=1))


def test_large_vocabularies_are_compared_on_their_largest_products(monkeypatch):
    ours, theirs = (side.view(3, 2, 11) for side in pair(6, rows=6))
    whole = F.span_correlation(ours, theirs)
    monkeypatch.setattr(F, "LARGE", 10)
    monkeypatch.setattr(F, "TOP", 2)
    torch.testing.assert_close(F.span_correlation(ours, theirs), F.span_correlation(ours, theirs, top=2))
    assert (F.span_correlation(ours, theirs) < whole).all()


def test_span_gradient_is_0_and_not_nan_where_both_agree():
    theirs = pair(7, rows=6)[1].view(3, 2, 11)
    ours = theirs.clone().requires_grad_()
    F.span_correlation(ours, theirs).sum().backward()
    assert (ours.grad.abs() < 1e-6).all()


def test_pairs_are_neighbours_inside_a_span_and_a_single_token_has_none():
    labels = torch.zeros(2, 10)
    assert F.span_pairs(labels, [[(1, 4), (6, 7)], [(0, 2)]]).tolist() == [1, 2, 10]
    assert F.span_pairs(labels, [[(3, 4)], []]).tolist() == []
