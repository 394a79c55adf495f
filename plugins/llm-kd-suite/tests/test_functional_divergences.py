"""Every divergence against one plain reference, and what holds for all of them."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_llm_kd_suite import functional as fn
from kd_llm_kd_suite.functional import divergences

few = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**31)
shapes = st.sampled_from([(7,), (3, 5), (2, 3, 11)])
temperatures = st.floats(0.5, 4)

every = pytest.mark.parametrize("name", fn.DIVERGENCES)
CROSS_ENTROPIES = ("fkl", "sym", "sfkl")
BOUNDED = {"jsd": math.log(2), "jsdistance": math.log(2), "tvd": 1.0, "sfkl": math.log(10), "srkl": math.log(10)}


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Of log-probabilities; a class without mass on either side adds nothing."""
    terms = torch.where(a.isneginf() | b.isneginf(), 0.0, a.exp() * (a - b))
    return terms.sum(-1)


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(a + math.log(share), b + math.log(1 - share))


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fkl": lambda q, p: kl(p, q),
    "rkl": lambda q, p: kl(q, p),
    "sym": lambda q, p: 0.1 * kl(p, q) + 0.9 * kl(q, p),
    "jsd": lambda q, p: 0.5 * kl(p, mixed(p, q, 0.5)) + 0.5 * kl(q, mixed(p, q, 0.5)),
    "jsdistance": lambda q, p: 0.9 * kl(q, mixed(q, p, 0.9)) + 0.1 * kl(p, mixed(q, p, 0.9)),
    "tvd": lambda q, p: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    "sfkl": lambda q, p: kl(p, mixed(p, q, 0.1)),
    "srkl": lambda q, p: kl(q, mixed(q, p, 0.1)),
}


def plain(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The formula of the card in float64, written down as it reads."""
    q, p = (F.log_softmax(side.double() / temperature, -1) for side in (student, teacher.detach()))
    return PLAIN[name](q, p)


def draw(seed: int, shape: tuple[int, ...], scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def labels_of(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, shape, generator=generator)
    return torch.where(labels < 0, -100, labels)


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
@few
@given(seed=seeds, shape=shapes, temperature=temperatures)
def test_value_and_gradient_are_those_of_the_formula(name, dtype, tolerance, seed, shape, temperature):
    student, teacher = (side.detach().to(dtype).requires_grad_() for side in draw(seed, shape))
    weights = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed))
    values = fn.DIVERGENCES[name](student, teacher, temperature=temperature)
    wanted = plain(name, student, teacher, temperature)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), wanted, rtol=tolerance, atol=tolerance)
    (found,) = torch.autograd.grad((values * weights).sum(), student)
    (gradient,) = torch.autograd.grad((wanted * weights).sum(), student)
    torch.testing.assert_close(found, gradient, rtol=tolerance, atol=tolerance)


@every
def test_gradient_is_that_of_finite_differences(name):
    student, teacher = draw(1, (3, 6))
    student, teacher = student.double().detach().requires_grad_(), teacher.double()
    assert torch.autograd.gradcheck(lambda s: fn.DIVERGENCES[name](s, teacher, temperature=1.7), student)


@every
def test_blocks_of_rows_agree_with_the_whole(name, monkeypatch):
    student, teacher = draw(2, (7, 5))
    whole = fn.DIVERGENCES[name](student, teacher)
    (gradient,) = torch.autograd.grad(whole.square().sum(), student)
    monkeypatch.setattr(divergences, "CACHED", 12)
    parts = fn.DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), student)[0], gradient)


@every
@few
@given(seed=seeds)
def test_zero_at_equality_and_positive_elsewhere(name, seed):
    student, teacher = draw(seed, (4, 9))
    same = teacher.detach().clone().requires_grad_()
    values = fn.DIVERGENCES[name](same, teacher)
    torch.testing.assert_close(values, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), same)[0], torch.zeros(4, 9), atol=1e-6, rtol=0)
    assert (fn.DIVERGENCES[name](student, teacher) > 1e-4).all()


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_divergences_stay_below_their_bound_at_disjoint_support(name):
    student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    value = fn.DIVERGENCES[name](student, teacher).item()
    assert 0 < value <= BOUNDED[name] + 1e-5


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@few
@given(seed=seeds)
def test_cross_entropy_form_has_the_same_gradient_and_differs_by_the_entropy(name, seed):
    student, teacher = draw(seed, (4, 9))
    true = fn.DIVERGENCES[name](student, teacher)
    form = fn.DIVERGENCES[name](student, teacher, cross_entropy_form=True)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).detach()
    torch.testing.assert_close(form - true, entropy * (0.1 if name == "sym" else 1), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(values.sum(), student)[0] for values in (true, form)]
    torch.testing.assert_close(*gradients)


@few
@given(seed=seeds, beta=st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99))
def test_generalized_jsd_is_symmetric_under_exchange_of_sides_and_shares(seed, beta):
    student, teacher = draw(seed, (4, 9))
    ours = fn.generalized_jsd(student, teacher, beta=beta)
    theirs = fn.generalized_jsd(teacher, student, beta=1 - beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_generalized_jsd_at_the_ends_is_forward_and_reverse_kl():
    student, teacher = draw(3, (4, 9))
    torch.testing.assert_close(fn.generalized_jsd(student, teacher, beta=0), fn.forward_kl(student, teacher))
    torch.testing.assert_close(fn.generalized_jsd(student, teacher, beta=1), fn.reverse_kl(student, teacher))
    student, teacher = draw(3, (4, 9), scale=1)
    small = fn.generalized_jsd(student, teacher, beta=1e-3) / (1e-3 * (1 - 1e-3))
    torch.testing.assert_close(small, fn.forward_kl(student, teacher), rtol=0.01, atol=0)


def test_without_skew_the_skewed_divergences_are_the_plain_ones():
    student, teacher = draw(4, (4, 9))
    torch.testing.assert_close(fn.skewed_forward_kl(student, teacher, alpha=0), fn.forward_kl(student, teacher))
    torch.testing.assert_close(fn.skewed_reverse_kl(student, teacher, alpha=0), fn.reverse_kl(student, teacher))


@every
def test_only_the_student_gets_a_gradient(name):
    student, teacher = draw(5, (4, 9))
    fn.DIVERGENCES[name](student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@every
def test_backward_twice_gives_the_same_gradient(name):
    student, teacher = draw(5, (4, 9))
    loss = fn.DIVERGENCES[name](student, teacher).sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


@every
def test_without_gradients_the_values_are_the_same(name):
    student, teacher = draw(6, (4, 9))
    with torch.no_grad():
        values = fn.DIVERGENCES[name](student, teacher)
    assert not values.requires_grad
    torch.testing.assert_close(values, fn.DIVERGENCES[name](student, teacher))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = (side.detach().to(dtype) for side in draw(7, (4, 300)))
    student.requires_grad_()
    values = fn.DIVERGENCES[name](student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), plain(name, student, teacher), rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(values.sum(), student)
    assert found.dtype == dtype
    exact = student.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(name, exact, teacher).sum(), exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-5)


@every
def test_autocast_does_not_lower_the_precision(name):
    student, teacher = draw(7, (4, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = fn.DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(values, fn.DIVERGENCES[name](student, teacher), rtol=0, atol=0)


@every
def test_classes_masked_on_both_sides_change_nothing(name):
    student, teacher = draw(8, (4, 9))
    values = fn.DIVERGENCES[name](student, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    wider = [F.pad(side.detach(), (0, 3), value=-math.inf) for side in (student, teacher)]
    wider[0].requires_grad_()
    masked = fn.DIVERGENCES[name](wider[0], wider[1], temperature=1.0)
    torch.testing.assert_close(masked, values)
    (found,) = torch.autograd.grad(masked.sum(), wider[0])
    torch.testing.assert_close(found, F.pad(gradient, (0, 3)))


@every
@pytest.mark.parametrize("side", ["student", "teacher", "different"])
def test_classes_masked_on_one_side_are_left_out_of_the_sum(name, side):
    student, teacher = (t.detach() for t in draw(9, (2, 6)))
    if side != "teacher":
        student[:, 1] = -math.inf
    if side != "student":
        teacher[:, 4] = -math.inf
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    q, p = exact.log_softmax(-1), teacher.double().log_softmax(-1)
    kept = ~(q.isneginf() | p.isneginf())
    wanted = torch.stack([PLAIN[name](a[k], b[k]) for a, b, k in zip(q, p, kept, strict=True)])
    values = fn.DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-6)
    (found,) = torch.autograd.grad(values.sum(), student)
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(found.double(), gradient.nan_to_num(), rtol=1e-4, atol=1e-6)


@every
def test_far_apart_logits_stay_finite(name):
    student = torch.tensor([[0.0, -500.0, 300.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    values = fn.DIVERGENCES[name](student, torch.tensor([[400.0, 0.0, -1e4], [1e4, -1e4, 0.0]]))
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


@every
def test_different_vocabularies_are_cut_to_the_smaller_one(name):
    student, teacher = draw(10, (4, 9))
    values = fn.DIVERGENCES[name](student, teacher[:, :7])
    torch.testing.assert_close(values, fn.DIVERGENCES[name](student[:, :7], teacher[:, :7]))
    values.sum().backward()
    assert student.grad[:, 7:].abs().sum() == 0
    torch.testing.assert_close(fn.DIVERGENCES[name](student[:, :7], teacher), values)


@every
@few
@given(seed=seeds)
def test_positions_that_do_not_count_change_nothing(name, seed):
    student, teacher = draw(seed, (3, 5, 7))
    labels = labels_of(seed, (3, 5))
    keep = labels != -100
    loss = fn.divergence(name, student, teacher, labels)
    wanted = plain(name, student[keep], teacher[keep]).sum() / max(int(keep.sum()), 1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert (student.grad[~keep] == 0).all()
    spoilt = student.detach().masked_fill(~keep.unsqueeze(-1), math.nan)
    torch.testing.assert_close(fn.divergence(name, spoilt, teacher, labels), loss)


@every
def test_reductions_and_layouts_agree(name):
    student, teacher = draw(11, (3, 5, 7))
    labels = labels_of(11, (3, 5))
    keep, total = labels != -100, int((labels != -100).sum())
    mean, summed, each = (
        fn.divergence(name, student, teacher, labels, reduction=r) for r in ("mean", "sum", "none")
    )  # fmt: skip
    assert each.shape == labels.shape
    assert (each[~keep] == 0).all()
    torch.testing.assert_close(each.sum(), summed)
    torch.testing.assert_close(mean * total, summed)
    torch.testing.assert_close(fn.mean(fn.DIVERGENCES[name](student, teacher), labels), mean)
    flat = fn.divergence(name, student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(flat, mean)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(fn.divergence(name, student[order], teacher[order], labels[order]), mean)
    everything = fn.divergence(name, student, teacher)
    torch.testing.assert_close(everything, fn.divergence(name, student, teacher, labels.clamp(min=0)))
    torch.testing.assert_close(everything * 15, fn.divergence(name, student, teacher, reduction="sum"))


@every
def test_where_nothing_counts_loss_and_gradient_are_zero(name):
    student, teacher = draw(12, (2, 3, 7))
    loss = fn.divergence(name, student, teacher, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_mean_of_no_rows_is_zero_with_a_zero_gradient():
    rows = torch.ones(2, 3, requires_grad=True)
    fn.mean(rows, torch.full((2, 3), -100)).backward()
    assert (rows.grad == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(
            (name, {"temperature": t}, "temperature")
            for name in fn.DIVERGENCES
            for t in (0.0, -1.0, math.inf, math.nan)
        ),
        *(("jsd", {"beta": b}, "beta must lie in") for b in (-0.1, 1.1)),
        *(("sym", {"lam": v}, "lam must lie in") for v in (-0.1, 1.0)),
        *(("jsdistance", {"lam": v}, "lam must") for v in (-0.1, 0.0, 1.0)),
        *((name, {"alpha": v}, "alpha must lie in") for name in ("sfkl", "srkl") for v in (-0.1, 1.0)),
        ("jds", {}, "did you mean 'jsd'"),
        ("fkl", {"reduction": "batchmean"}, "reduction"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(name, options, message):
    student, teacher = draw(13, (2, 5))
    with pytest.raises(ValueError, match=message):
        fn.divergence(name, student, teacher, **options)


def test_positions_that_do_not_match_are_refused():
    student, teacher = draw(14, (2, 3, 5))
    with pytest.raises(ValueError, match="teacher logits have the positions"):
        fn.forward_kl(student, teacher[:, :2])
    with pytest.raises(ValueError, match="teacher logits have the positions"):
        fn.divergence("fkl", student, teacher[:, :2], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="labels have the positions"):
        fn.divergence("fkl", student, teacher, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="labels have the positions"):
        fn.mean(torch.zeros(2, 3), torch.zeros(3))


def fitted(loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """A Gaussian over 41 classes, narrow and between the two modes of a teacher at first, fitted to it; the classes."""
    classes = torch.linspace(-4, 4, 41)
    teacher = torch.logaddexp(-0.5 * ((classes + 2) / 0.5) ** 2, -0.5 * ((classes - 2) / 0.5) ** 2 - 0.2)
    place, width = torch.tensor(0.5, requires_grad=True), torch.tensor(-0.7, requires_grad=True)
    optimizer = torch.optim.Adam([place, width], lr=0.1)
    for _ in range(150):
        student = -0.5 * ((classes - place) / width.exp()) ** 2
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    return student.detach().softmax(0), classes


def test_reverse_kl_seeks_a_mode_where_forward_kl_covers_both():
    shares = {}
    for name in ("fkl", "rkl"):
        probs, classes = fitted(fn.DIVERGENCES[name])
        left, right = probs[classes < 0].sum(), probs[classes > 0].sum()
        shares[name] = torch.maximum(left, right).item()
    assert shares["rkl"] > 0.95
    assert shares["fkl"] < 0.7
