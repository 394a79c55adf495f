"""What single losses, and the modules that go with them, must not depend on, and what they must agree with."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_classic import functional as fn
from kd_classic.modules import ContrastMemory, VariationalRegressor, generation_mask

few = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
gains = st.floats(0.2, 20)
shifts = st.floats(-5, 5)
temperatures = st.floats(0.5, 20)

RELATIONS = {name: getattr(fn, name) for name in ("sp", "rkd", "rkd_distance", "rkd_angle", "pkt")}
every_relation = pytest.mark.parametrize("loss", RELATIONS.values(), ids=RELATIONS.keys())


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(draw(seed, (size, size))[0]).Q


@few
@given(seed=seeds, shape=st.sampled_from([(6, 5), (2, 4, 5), (2, 5, 3, 2)]), gain=gains, shift=shifts)
def test_standardized_logits_do_not_depend_on_scale_and_shift(seed, shape, gain, shift):
    (logits,) = draw(seed, shape)
    moved = fn.logit_standardize(gain * logits + shift)
    torch.testing.assert_close(moved, fn.logit_standardize(logits), rtol=1e-3, atol=1e-3)


@few
@given(seed=seeds, gain=gains, shift=shifts)
def test_standardized_losses_do_not_depend_on_the_students_scale_and_shift(seed, gain, shift):
    student, teacher = draw(seed, (6, 5), (6, 5))
    target = torch.arange(6) % 5
    for loss in (
        lambda s: fn.kd(s, teacher, standardize=True),
        lambda s: fn.dkd(s, teacher, target, standardize=True),
        lambda s: fn.dist(s, teacher, standardize=True),
        lambda s: fn.skd_pixelwise(s[..., None, None], teacher[..., None, None], standardize=True),
    ):
        torch.testing.assert_close(loss(gain * student + shift), loss(student), rtol=1e-3, atol=1e-3)


@every_relation
@few
@given(seed=seeds)
def test_relations_do_not_depend_on_a_rotation(loss, seed):
    student, teacher = draw(seed, (6, 7), (6, 5))
    rotated = loss(student @ rotation(seed, 7), teacher @ rotation(seed + 1, 5))
    torch.testing.assert_close(rotated, loss(student, teacher), rtol=1e-3, atol=1e-6)


@every_relation
@few
@given(seed=seeds, gain=gains)
def test_relations_do_not_depend_on_the_scale(loss, seed, gain):
    student, teacher = draw(seed, (6, 7), (6, 5))
    torch.testing.assert_close(loss(gain * student, teacher), loss(student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["rkd", "rkd_distance", "rkd_angle"])
@few
@given(seed=seeds)
def test_relational_distillation_does_not_depend_on_the_origin(name, seed):
    student, teacher, offset = draw(seed, (6, 7), (6, 5), (7,))
    moved = RELATIONS[name](student + offset, teacher)
    torch.testing.assert_close(moved, RELATIONS[name](student, teacher), rtol=1e-3, atol=1e-6)


def test_relational_distillation_adds_its_parts_by_weight():
    student, teacher = draw(0, (6, 7), (6, 5))
    expected = 2 * fn.rkd_distance(student, teacher) + 3 * fn.rkd_angle(student, teacher)
    torch.testing.assert_close(fn.rkd(student, teacher, distance_weight=2, angle_weight=3), expected)


@every_relation
def test_equal_samples_get_a_finite_gradient(loss):
    student, teacher = draw(0, (1, 7), (6, 5))
    student = student.expand(6, 7).clone().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()


@few
@given(seed=seeds, student_shape=st.sampled_from([(3, 4, 4, 4), (3, 4, 8, 8), (3, 2, 2, 2)]), gain=gains)
def test_nst_is_never_negative_and_ignores_order_and_scale_of_channels(seed, student_shape, gain):
    student, teacher = draw(seed, student_shape, (3, 5, 4, 4))
    value = fn.nst(student, teacher)
    assert value >= 0
    assert fn.nst(teacher + 1e-4 * torch.sin(teacher), teacher) >= -1e-6
    torch.testing.assert_close(fn.nst(student, gain * teacher.flip(1)), value)


@few
@given(seed=seeds, temperature=temperatures)
def test_dkd_weighted_as_in_kd_equals_kd(seed, temperature):
    student, teacher = draw(seed, (6, 5), (6, 5))
    target = torch.arange(6) % 5
    options = {"temperature": temperature, "reduction": "none"}
    certainty = (teacher / temperature).softmax(1).gather(1, target[:, None])[:, 0]
    decoupled = [
        fn.dkd(student[[i]], teacher[[i]], target[[i]], alpha=1, beta=1 - certainty[i].item(), **options)
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(decoupled), fn.kd(student, teacher, **options), rtol=1e-3, atol=1e-4)


@few
@given(seed=seeds)
def test_squared_temperature_keeps_the_norm_of_kds_gradient(seed):
    norms = []
    for temperature in (4, 8):
        student, teacher = draw(seed, (64, 100), (64, 100))
        fn.kd(student.requires_grad_(), teacher, temperature=temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@few
@given(seed=seeds, rise=st.floats(0.1, 10))
def test_crd_falls_when_the_matched_scores_rise_and_rises_with_the_others(seed, rise):
    (similarities,) = draw(seed, (4, 6))
    scores = similarities.exp() / 40
    more = torch.full((4, 1), 1 + rise)
    matched = torch.cat([more * scores[:, :1], scores[:, 1:]], dim=1)
    others = torch.cat([scores[:, :1], more * scores[:, 1:]], dim=1)
    assert fn.crd(matched, 40) < fn.crd(scores, 40) < fn.crd(others, 40)


@few
@given(seed=seeds)
def test_crd_does_not_depend_on_the_order_of_the_negatives(seed):
    scores = draw(seed, (4, 6))[0].exp()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)) + 1
    torch.testing.assert_close(fn.crd(torch.cat([scores[:, :1], scores[:, order]], dim=1), 40), fn.crd(scores, 40))


def test_margin_is_the_mean_of_the_negative_values():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 0.5, -4.0])
    generator = torch.Generator().manual_seed(0)
    values = weight * torch.randn(200_000, 4, generator=generator, dtype=torch.float64) + bias
    negative = values < 0
    expected = (values * negative).sum(0) / negative.sum(0)
    margin = fn.ofd_margin(weight, bias)
    assert margin.shape == (1, 4, 1, 1)
    torch.testing.assert_close(margin.flatten().double(), expected, rtol=0.02, atol=0)


def test_margin_of_a_channel_that_is_hardly_ever_negative_is_three_deviations():
    margin = fn.ofd_margin(torch.tensor([2.0, -0.5]), torch.tensor([7.0, 50.0]))
    assert margin.flatten().tolist() == [-6.0, -1.5]


def test_margin_of_a_certain_channel_is_finite():
    margin = fn.ofd_margin(torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0]))
    assert margin.flatten().tolist() == [-1.0, 0.0, 0.0]


def test_ofd_lets_the_student_stay_below_the_margin():
    teacher = torch.tensor([-2.0, -2.0, -0.5, -0.5, 1.0, 1.0]).view(1, 1, 1, 6)
    student = torch.tensor([-3.0, 0.0, -0.7, 0.0, -1.0, 2.0]).view(1, 1, 1, 6)
    margin = torch.full((1, 1, 1, 1), -1.0)
    costs = [fn.ofd(student[..., [i]], teacher[..., [i]], margin).item() for i in range(6)]
    assert costs == pytest.approx([0, 1, 0, 0.25, 4, 1])


def test_ab_asks_for_the_teachers_sign_with_a_margin():
    teacher = torch.tensor([5.0, 5.0, 5.0, -5.0, -5.0, 0.0]).view(1, 1, 1, 6)
    student = torch.tensor([2.0, 0.5, -1.0, -2.0, 0.5, 0.5]).view(1, 1, 1, 6)
    costs = [fn.ab(student[..., [i]], teacher[..., [i]], margin=1).item() / 3e-3 for i in range(6)]
    assert costs == pytest.approx([0, 0.25, 4, 0, 2.25, 2.25])


@pytest.mark.parametrize("name", ["ab", "ofd"])
def test_a_layer_weighs_half_of_the_next_deeper_one(name):
    shallow, deep = draw(0, (2, 3, 4, 4), (2, 5, 2, 2)), draw(1, (2, 3, 4, 4), (2, 5, 2, 2))
    margins = [torch.full((1, channels, 1, 1), -0.5) for channels in (3, 5)]
    extra = [margins] if name == "ofd" else []
    alone = [getattr(fn, name)(shallow[i], deep[i], *([margins[i]] if extra else [])) for i in range(2)]
    torch.testing.assert_close(getattr(fn, name)(shallow, deep, *extra), alone[0] / 2 + alone[1])


@few
@given(seed=seeds)
def test_hcl_of_single_pixels_is_the_mean_squared_error(seed):
    student, teacher = draw(seed, (3, 4, 1, 1), (3, 4, 1, 1))
    torch.testing.assert_close(fn.hcl(student, teacher), F.mse_loss(student, teacher))


def test_hcl_weighs_each_smaller_scale_half_as_much():
    student, teacher = draw(0, (3, 4, 4, 4), (3, 4, 4, 4))
    scales = [F.mse_loss(F.adaptive_avg_pool2d(student, n), F.adaptive_avg_pool2d(teacher, n)) for n in (4, 2, 1)]
    expected = (scales[0] + scales[1] / 2 + scales[2] / 4) / 1.75
    torch.testing.assert_close(fn.hcl(student, teacher), expected)


def test_a_shift_of_a_whole_map_costs_the_same_at_every_scale():
    (teacher,) = draw(0, (3, 4, 8, 8))
    torch.testing.assert_close(fn.hcl(teacher + 3, teacher), torch.tensor(9.0))


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_pooled_to_the_smaller(larger):
    small, large = draw(0, (2, 3, 4, 2), (2, 5, 8, 4))
    pooled = F.avg_pool2d(large, 2)
    if larger == "student":
        found, expected = fn.pool_to_smaller(large, small), (pooled, small)
    else:
        found, expected = fn.pool_to_smaller(small, large), (small, pooled)
    torch.testing.assert_close(found, expected)


def test_maps_of_one_size_are_not_pooled():
    student, teacher = draw(0, (2, 3, 4, 4), (2, 5, 4, 4))
    found = fn.pool_to_smaller(student, teacher)
    assert found[0] is student
    assert found[1] is teacher


@pytest.mark.parametrize("shape", [(2, 1, 40, 50), (2, 2000, 1, 1)])
@pytest.mark.parametrize("kind", ["dense", "cls"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.75, 1.0])
def test_mask_covers_its_share(shape, kind, share):
    keep = generation_mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)), share, kind)
    assert keep.shape == shape
    assert set(keep.unique().tolist()) <= {0, 1}
    assert 1 - keep.mean().item() == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0.001)


def test_mask_covers_the_upper_draws_of_positions_and_the_lower_ones_of_channels():
    numbers = torch.tensor([0.1, 0.5, 0.9])
    assert generation_mask(numbers, 0.25, "dense").tolist() == [1, 1, 0]
    assert generation_mask(numbers, 0.25, "cls").tolist() == [0, 1, 1]


def test_the_initial_variance_of_vid_is_five():
    regressor = VariationalRegressor(3, 4)
    torch.testing.assert_close(F.softplus(regressor.log_scale) + 1e-5, torch.full((4,), 5.0))
    student, teacher = draw(0, (2, 3, 4, 4), (2, 4, 4, 4))
    mean = regressor(student)
    expected = 0.5 * ((mean - teacher).square() / 5 + torch.tensor(5.0).log()).mean()
    torch.testing.assert_close(fn.vid(mean, regressor.log_scale, teacher), expected)


def test_vid_learns_the_variance_of_the_error():
    mean, noise = draw(0, (64, 2, 4, 4), (64, 2, 4, 4))
    teacher = mean + torch.tensor([0.5, 2.0]).view(1, 2, 1, 1) * noise
    log_scale = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        fn.vid(mean, log_scale, teacher).backward()
        optimizer.step()
    variance = (teacher - mean).square().mean((0, 2, 3))
    torch.testing.assert_close(F.softplus(log_scale.detach()), variance, rtol=0.02, atol=0)


def contrast(seed: int = 0) -> tuple[ContrastMemory, tuple[Tensor, Tensor, Tensor]]:
    """A memory of 20 samples, and the first four of them with five negatives each."""
    torch.manual_seed(seed)
    rows = torch.cat([torch.arange(4)[:, None], torch.randint(4, 20, (4, 5))], dim=1)
    return ContrastMemory(6, 7, 20, width=8), (torch.randn(4, 6), torch.randn(4, 7), rows)


def test_normalizers_are_fixed_by_the_first_training_batch():
    memory, (student, teacher, rows) = contrast()
    memory(student, teacher, rows)
    fixed = memory.student_z.clone(), memory.teacher_z.clone()
    assert fixed[0] > 0
    assert fixed[1] > 0
    memory(3 * teacher[:, :6], 3 * teacher, rows)
    assert (memory.student_z, memory.teacher_z) == fixed


def test_first_scores_average_to_the_density_of_the_noise():
    memory, arguments = contrast()
    ours, theirs, *_ = memory(*arguments)
    assert ours.mean().item() == pytest.approx(1 / 20)
    assert theirs.mean().item() == pytest.approx(1 / 20)


def test_normalizers_stay_untouched_in_evaluation():
    memory, arguments = contrast()
    memory.eval()
    assert all(score.isfinite().all() for score in memory(*arguments)[:2])
    assert memory.student_z == memory.teacher_z == -1
    memory.train()
    memory(*arguments)
    fixed = memory.student_z.clone(), memory.teacher_z.clone()
    memory.eval()
    memory(*(-tensor for tensor in arguments[:2]), arguments[2])
    assert (memory.student_z, memory.teacher_z) == fixed


def test_updated_rows_have_unit_length_and_the_others_stay():
    memory, arguments = contrast()
    before = memory.student_bank.clone(), memory.teacher_bank.clone()
    *_, ours, theirs = memory(*arguments)
    for _ in range(3):
        memory.update(ours, theirs, torch.arange(4))
    for bank, old, new in zip((memory.student_bank, memory.teacher_bank), before, (ours, theirs), strict=True):
        torch.testing.assert_close(bank[:4].norm(dim=1), torch.ones(4))
        assert (F.cosine_similarity(bank[:4], new) > F.cosine_similarity(old[:4], new)).all()
        assert bank[4:].equal(old[4:])
        assert not bank.requires_grad


def test_both_embeddings_learn_and_neither_model_gets_the_others_gradient():
    memory, (student, teacher, rows) = contrast()
    student.requires_grad_()
    teacher.requires_grad_()
    ours, theirs, *_ = memory(student, teacher, rows)
    (fn.crd(ours, 20) + fn.crd(theirs, 20)).backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert all(parameter.grad.any() for parameter in memory.parameters())


def test_scores_of_matched_samples_rise_as_the_memory_learns():
    memory, arguments = contrast()
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        ours, theirs, *anchors = memory(*arguments)
        loss = fn.crd(ours, 20) + fn.crd(theirs, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory.update(*anchors, torch.arange(4))
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (ours[:, 0] > ours[:, 1:].max(dim=1).values).all()
