import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_classic.functional import (
    at,
    attention_map,
    cross_entropy,
    dist,
    dkd,
    fitnet,
    flatten_positions,
    kd,
    logit_standardize,
)
from kd_classic.modules import Regressor

settings.register_profile("plugin", deadline=None, max_examples=25)
settings.load_profile("plugin")

seeds = st.integers(0, 2**31)
temperatures = st.floats(0.5, 20)
layouts = st.sampled_from([(6, 5), (2, 4, 5), (2, 5, 3, 2)])


def draw(seed: int, shape: tuple[int, ...], scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and a target, in one of the three layouts."""
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    teacher = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    classes, positions = (shape[1], shape[:1] + shape[2:]) if len(shape) == 4 else (shape[-1], shape[:-1])
    return student, teacher, torch.randint(classes, positions, generator=generator)


LOGIT_LOSSES = {
    "kd": lambda s, t, y, **o: kd(s, t, y, **o),
    "kd_standardized": lambda s, t, y, **o: kd(s, t, y, standardize=True, **o),
    "dkd": lambda s, t, y, **o: dkd(s, t, y, **o),
    "dkd_standardized": lambda s, t, y, **o: dkd(s, t, y, standardize=True, **o),
}
ALL_LOSSES = LOGIT_LOSSES | {"dist": lambda s, t, y: dist(s, t)}
every_loss = pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES.keys())
every_masked_loss = pytest.mark.parametrize("loss", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES.keys())


@every_loss
@given(seed=seeds, shape=layouts)
def test_loss_is_zero_at_equality_and_positive_elsewhere(loss, seed, shape):
    student, teacher, target = draw(seed, shape)
    assert loss(teacher, teacher, target).item() == pytest.approx(0, abs=1e-5)
    assert loss(student, teacher, target) > 1e-4


@every_loss
@given(seed=seeds, shape=layouts)
def test_only_the_student_gets_a_gradient(loss, seed, shape):
    student, teacher, target = draw(seed, shape)
    loss(student, teacher, target).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@every_loss
@given(seed=seeds)
def test_order_of_the_batch_does_not_matter(loss, seed):
    student, teacher, target = draw(seed, (6, 5))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(student[order], teacher[order], target[order]), loss(student, teacher, target))


@every_loss
@given(seed=seeds)
def test_layouts_agree(loss, seed):
    student, teacher, target = draw(seed, (2, 5, 3, 2))
    sequences = [logits.flatten(2).transpose(1, 2) for logits in (student, teacher)]
    rows = [logits.reshape(12, 5) for logits in sequences]
    dense = loss(student, teacher, target)
    torch.testing.assert_close(loss(*sequences, target.flatten(1)), dense)
    torch.testing.assert_close(loss(*rows, target.flatten()), dense)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(seed=seeds)
def test_half_precision_is_computed_in_float32(loss, dtype, seed):
    student, teacher, target = draw(seed, (6, 5))
    student, teacher = student.detach().to(dtype).requires_grad_(), teacher.detach().to(dtype)
    value = loss(student, teacher, target)
    value.backward()
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), target))
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@every_loss
@given(seed=seeds, size=st.sampled_from([1e2, 1e4, 6e4]))
def test_large_logits_stay_finite(loss, seed, size):
    student, teacher, target = draw(seed, (6, 5), scale=size)
    value = loss(student, teacher, target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@every_masked_loss
@given(seed=seeds, shape=layouts, ignore=st.sampled_from([-100, 255]))
def test_ignored_positions_do_not_count(loss, seed, shape, ignore):
    student, teacher, target = draw(seed, shape)
    target[0] = ignore
    changed = student.detach().clone()
    changed[0] += torch.randn_like(changed[0])
    value = loss(student, teacher, target, ignore_index=ignore)
    assert value == loss(changed, teacher, target, ignore_index=ignore)
    torch.testing.assert_close(value, loss(student[1:], teacher[1:], target[1:]))
    value.backward()
    assert not student.grad[0].any()


@every_masked_loss
def test_batch_without_valid_position_gives_zero(loss):
    student, teacher, _ = draw(0, (6, 5))
    value = loss(student, teacher, torch.full((6,), -100))
    value.backward()
    assert value == 0
    assert not student.grad.any()


@every_masked_loss
@given(seed=seeds, shape=layouts)
def test_unreduced_values_average_to_the_loss(loss, seed, shape):
    student, teacher, target = draw(seed, shape)
    target[0] = -100
    values = loss(student, teacher, target, reduction="none")
    assert values.shape == target.shape
    assert not values[0].any()
    torch.testing.assert_close(values.sum() / (target != -100).sum(), loss(student, teacher, target))


@given(seed=seeds, temperature=temperatures)
def test_kd_is_the_tempered_divergence_from_the_teacher(seed, temperature):
    student, teacher, _ = draw(seed, (6, 5))
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum() / 6
    torch.testing.assert_close(kd(student, teacher, temperature=temperature), expected, rtol=1e-3, atol=1e-5)


@given(seed=seeds, temperature=temperatures)
def test_kd_mean_also_averages_over_classes(seed, temperature):
    student, teacher, _ = draw(seed, (6, 5))
    total = kd(student, teacher, temperature=temperature)
    torch.testing.assert_close(5 * kd(student, teacher, temperature=temperature, reduction="mean"), total)


def test_squared_temperature_keeps_the_size_of_the_gradient():
    norms = []
    for temperature in (4.0, 8.0):
        student, teacher, _ = draw(0, (64, 100), scale=1.0)
        kd(student, teacher, temperature=temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@given(seed=seeds, temperature=temperatures)
def test_dkd_with_coupled_weights_equals_kd(seed, temperature):
    student, teacher, target = draw(seed, (6, 5))
    options = {"temperature": temperature, "reduction": "none"}
    targets = dkd(student, teacher, target, alpha=1, beta=0, **options)
    others = dkd(student, teacher, target, alpha=0, beta=1, **options)
    p_target = (teacher / temperature).softmax(1).gather(1, target[:, None])[:, 0]
    expected = kd(student, teacher, **options)
    torch.testing.assert_close(targets + (1 - p_target) * others, expected, rtol=1e-4, atol=1e-4)


@given(seed=seeds)
def test_dkd_among_other_classes_ignores_the_target_logit(seed):
    student, teacher, target = draw(seed, (6, 5))
    shifted = student + 3 * torch.nn.functional.one_hot(target, 5)
    others = dkd(student, teacher, target, alpha=0)
    torch.testing.assert_close(dkd(shifted, teacher, target, alpha=0), others)
    assert (dkd(shifted, teacher, target, beta=0) - dkd(student, teacher, target, beta=0)).abs() > 1e-3


def test_dkd_survives_an_underflowing_rest():
    student = torch.tensor([[500.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 3.0]])
    value = dkd(student, teacher, torch.tensor([0]), beta=0, temperature=1)
    value.backward()
    assert value > 400  # about 0.88 * 499: the log of the rest is -499, not -inf
    assert student.grad.abs().max() == pytest.approx(0.882, abs=0.01)


@given(seed=seeds, shape=layouts, gain=st.floats(0.5, 20), shift=st.floats(-5, 5))
def test_standardised_logits_do_not_depend_on_scale_and_shift(seed, shape, gain, shift):
    logits, _, _ = draw(seed, shape)
    standard = logit_standardize(logits)
    torch.testing.assert_close(logit_standardize(gain * logits + shift), standard, rtol=1e-3, atol=1e-4)
    class_dim = 1 if logits.ndim == 4 else -1
    torch.testing.assert_close(standard.std(class_dim), torch.ones_like(standard.std(class_dim)))


def test_standardising_a_constant_row_gives_zero_and_a_finite_gradient():
    logits = torch.tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 4.0]], requires_grad=True)
    standard = logit_standardize(logits)
    (standard * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert not standard[0].any()
    assert logits.grad.isfinite().all()


@given(seed=seeds)
def test_kd_and_dkd_standardise_both_sides(seed):
    student, teacher, target = draw(seed, (6, 5))
    standard = logit_standardize(student), logit_standardize(teacher)
    torch.testing.assert_close(kd(student, teacher, standardize=True), kd(*standard))
    torch.testing.assert_close(dkd(student, teacher, target, standardize=True), dkd(*standard, target))


@given(seed=seeds)
def test_dist_sees_only_correlation(seed):
    """With two classes the samples' probabilities are always perfectly (anti-)correlated."""
    generator = torch.Generator().manual_seed(seed)
    log_odds = 0.1 + torch.rand(6, generator=generator)
    logits = torch.stack([log_odds, torch.zeros(6)], dim=1)
    inter = dist(logits, 5 * logits, gamma=0)
    assert inter.item() == pytest.approx(0, abs=1e-4)
    assert dist(-logits, logits, gamma=0).item() == pytest.approx(2, abs=1e-4)
    assert kd(logits, 5 * logits) > 0.1


@given(seed=seeds)
def test_dist_adds_its_terms_by_weight_and_temperature(seed):
    student, teacher, _ = draw(seed, (6, 5))
    inter = dist(student / 4, teacher / 4, beta=1, gamma=0)
    intra = dist(student / 4, teacher / 4, beta=0, gamma=1)
    combined = dist(student, teacher, beta=2, gamma=3, tau=4)
    torch.testing.assert_close(combined, 16 * (2 * inter + 3 * intra), rtol=1e-3, atol=1e-4)


def test_dist_intra_term_of_one_sample_is_constant():
    student, teacher, _ = draw(0, (1, 5))
    assert dist(student, teacher, beta=0) == 1


@given(seed=seeds, shape=layouts)
def test_cross_entropy_matches_the_definition(seed, shape):
    logits, _, target = draw(seed, shape)
    target[0] = -100
    rows, labels = flatten_positions(logits, target)
    valid = labels != -100
    expected = -rows.log_softmax(1)[valid].gather(1, labels[valid][:, None]).mean()
    torch.testing.assert_close(cross_entropy(logits, target), expected)
    assert cross_entropy(logits, target, reduction="none").shape == target.shape
    assert cross_entropy(logits, torch.full_like(target, -100)) == 0


def features(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("mode", ["code", "paper"])
@given(seed=seeds)
def test_attention_transfer_compares_where_and_not_what(mode, seed):
    student, teacher = features(seed, (3, 4, 6, 6), (3, 8, 6, 6))
    permuted = 3 * student[:, [2, 0, 3, 1]]
    assert at(student, permuted, mode=mode).item() == pytest.approx(0, abs=1e-5)
    value = at(student, teacher, mode=mode)
    value.backward()
    assert value > 1e-4
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_attention_map_is_the_normalised_power_of_the_channels():
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    torch.testing.assert_close(attention_map(maps), torch.tensor([[10.0, 4.0]]) / 116**0.5)
    torch.testing.assert_close(attention_map(maps, p=4), torch.tensor([[82.0, 16.0]]) / (82**2 + 16**2) ** 0.5)


def test_attention_transfer_modes_and_layers():
    student, teacher, small = features(0, (3, 4, 6, 6), (3, 8, 6, 6), (3, 5, 3, 3))
    difference = attention_map(student) - attention_map(teacher)
    torch.testing.assert_close(at(student, teacher), difference.square().mean())
    torch.testing.assert_close(at(student, teacher, mode="paper"), difference.square().sum(1).sqrt().mean())
    pooled = torch.nn.functional.adaptive_avg_pool2d(student, 3)
    torch.testing.assert_close(at(student, small), at(pooled, small))
    torch.testing.assert_close(at(small, student), at(small, pooled))
    torch.testing.assert_close(at([student, small], [teacher, student]), at(student, teacher) + at(small, student))


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_transfer_stays_finite_in_half_precision_and_at_zero(mode):
    student, teacher = features(0, (3, 4, 6, 6), (3, 4, 6, 6))
    half = (1e3 * student.detach()).half().requires_grad_()
    zero = torch.zeros_like(student, requires_grad=True)
    for candidate, reference in ((half, teacher.half()), (zero, teacher), (student, student.detach())):
        value = at(candidate, reference, mode=mode)
        value.backward()
        assert value.isfinite()
        assert candidate.grad.isfinite().all()


SHAPES = {
    "equal": ((8, 8), (8, 8)),
    "halve": ((8, 8), (4, 4)),
    "halve_odd_width": ((8, 7), (4, 4)),
    "double": ((4, 4), (8, 8)),
    "trim": ((9, 7), (6, 5)),
}


@pytest.mark.parametrize(("student", "teacher"), SHAPES.values(), ids=SHAPES.keys())
def test_regressor_reaches_the_shape_of_the_teacher(student, teacher):
    source, target = features(0, (4, 3, *student), (4, 6, *teacher))
    regressor = Regressor(source.shape, target.shape)
    assert regressor(source).shape == target.shape
    assert (regressor(source) >= 0).all()
    assert (Regressor(source.shape, target.shape, relu=False)(source) < 0).any()


def test_hint_falls_to_zero_for_reachable_features():
    source, reference = features(0, (8, 3, 4, 4), (8, 5, 4, 4))
    torch.manual_seed(0)
    teacher = Regressor(source.shape, reference.shape)(source).detach().requires_grad_()
    torch.manual_seed(1)
    regressor = Regressor(source.shape, reference.shape)
    optimizer = torch.optim.Adam(regressor.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss = fitnet(regressor(source.detach()), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: kd(x, x, temperature=0), "must be positive"),
        (lambda x, y: dkd(x, x, y, temperature=-1), "must be positive"),
        (lambda x, y: dist(x, x, tau=0), "must be positive"),
        (lambda x, y: kd(x, x[:, :4]), "5 classes and the teacher 4"),
        (lambda x, y: kd(x, x[:5]), "differ in shape"),
        (lambda x, y: dkd(x, x, y[:5]), "need a target of shape"),
        (lambda x, y: dkd(x[:, :1], x[:, :1], 0 * y), "at least two classes"),
        (lambda x, y: kd(x[:, :1], x[:, :1], standardize=True), "at least two classes"),
        (lambda x, y: kd(x, x, reduction="sum"), "unknown reduction"),
        (lambda x, y: flatten_positions(x[0]), "logits must be"),
        (lambda x, y: fitnet(x, x[:, :4]), "Regressor"),
        (lambda x, y: at(x, x), "feature maps"),
        (lambda x, y: at([x], [x, x]), "compared in pairs"),
        (lambda x, y: at(x, x, mode="other"), "mode must be"),
        (lambda x, y: Regressor((1, 2), (1, 2)), "feature maps"),
    ],
)
def test_wrong_arguments_get_a_clear_sentence(call, message):
    _, teacher, target = draw(0, (6, 5))
    with pytest.raises(ValueError, match=message):
        call(teacher, target)


def test_divergence_is_finite_for_teachers_certain_of_any_class():
    for student_class, teacher_class in itertools.product(range(3), repeat=2):
        student = torch.zeros(1, 3).index_fill(1, torch.tensor([student_class]), 1e4).requires_grad_()
        teacher = torch.zeros(1, 3).index_fill(1, torch.tensor([teacher_class]), 1e4)
        value = kd(student, teacher, temperature=1)
        assert math.isclose(value.item(), 0 if student_class == teacher_class else 1e4, rel_tol=1e-5)
