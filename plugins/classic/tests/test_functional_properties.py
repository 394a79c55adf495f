"""What holds for every loss of `kd_classic.functional`, from one table of cases."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_classic import functional as fn

few = settings(deadline=None, max_examples=8)
seeds = st.integers(0, 2**31)

LOGITS = (6, 5)
HEADS = (6, 2, 5)
VECTORS = (6, 7)
SCORES = (4, 3, 5, 4)
MAPS = (4, 3, 4, 4)
WIDER = (4, 5, 4, 4)
LARGER = (4, 5, 8, 8)
CLASSES = 5

Arguments = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of one student and one teacher tensor (and labels 0 to 4), both batch first.

    `best` is a student with which the loss is `least`; without it, the teacher itself.
    """

    loss: Callable[..., Tensor]
    student: tuple[int, ...] = LOGITS
    teacher: tuple[int, ...] = LOGITS
    best: Callable[[Tensor, Tensor], Tensor] = lambda t, y: t
    least: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda s, t, y: torch.zeros(())


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def certain(classes: Tensor) -> Tensor:
    return 1e3 * F.one_hot(classes, CLASSES)


def smoothed(y: Tensor, correct: float) -> Tensor:
    return torch.full((len(y), CLASSES), (1 - correct) / (CLASSES - 1)).scatter(1, y[:, None], correct)


def focal_entropy(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    hard, theirs = (F.cross_entropy(logits, y, reduction="none") for logits in (s, t))
    return (hard + 10 * (1 - (-hard / theirs).exp()) * entropy(t / 2)).mean()


def vid(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return fn.vid(s, torch.linspace(-1, 1, s.shape[1], dtype=s.dtype), t)


def ofd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return fn.ofd(s, t, torch.full((1, s.shape[1], 1, 1), -0.5, dtype=s.dtype))


def byot(s: Tensor, t: Tensor, y: Tensor, **options: float) -> Tensor:
    exits = [*s.unbind(1), t]
    return fn.byot(exits, exits, y, **{"beta": 0.1, **options})


CASES = {
    "cross_entropy": Case(lambda s, t, y, **o: fn.cross_entropy(s, y, **o), best=lambda t, y: certain(y)),
    "kd": Case(lambda s, t, y, **o: fn.kd(s, t, y, **o)),
    "kd-mean": Case(lambda s, t, y, **o: fn.kd(s, t, y, reduction="mean", **o)),
    "kd-standardized": Case(lambda s, t, y, **o: fn.kd(s, t, y, standardize=True, **o)),
    "dkd": Case(lambda s, t, y, **o: fn.dkd(s, t, y, **o)),
    "dkd-standardized": Case(lambda s, t, y, **o: fn.dkd(s, t, y, standardize=True, **o)),
    "dist": Case(lambda s, t, y: fn.dist(s, t)),
    "dist-standardized": Case(lambda s, t, y: fn.dist(s, t, standardize=True)),
    "wsld": Case(lambda s, t, y, **o: fn.wsld(s, t, y, **o), least=focal_entropy),
    "lsr": Case(
        lambda s, t, y, **o: fn.lsr(s, y, **o),
        best=lambda t, y: smoothed(y, 0.9).log(),
        least=lambda s, t, y: entropy(smoothed(y, 0.9).log()).mean(),
    ),
    "tfkd_reg": Case(
        lambda s, t, y, **o: fn.tfkd_reg(s, y, **o),
        best=lambda t, y: smoothed(y, 0.99) / 20,
        least=lambda s, t, y: 0.9 * F.cross_entropy(s, y),
    ),
    "deit-hard": Case(
        lambda s, t, y: fn.deit(*s.unbind(1), t, y),
        student=HEADS,
        best=lambda t, y: torch.stack([t, certain(t.argmax(1))], 1),
        least=lambda s, t, y: 0.5 * F.cross_entropy(s[:, 0], y),
    ),
    "deit-soft": Case(
        lambda s, t, y: fn.deit(*s.unbind(1), t, y, kind="soft", temperature=3),
        student=HEADS,
        best=lambda t, y: torch.stack([t, t], 1),
        least=lambda s, t, y: 0.5 * F.cross_entropy(s[:, 0], y),
    ),
    "deit-mixed": Case(
        lambda s, t, y: fn.deit(*s.unbind(1), t, smoothed(y, 0.7).to(s.dtype)),
        student=HEADS,
        best=lambda t, y: torch.stack([smoothed(y, 0.7).log(), certain(t.argmax(1))], 1),
        least=lambda s, t, y: 0.5 * entropy(smoothed(y, 0.7).log()).mean(),
    ),
    "byot": Case(
        byot,
        student=HEADS,
        best=lambda t, y: torch.stack([t, t], 1),
        least=lambda s, t, y: (
            0.9 * sum(F.cross_entropy(z, y) for z in (*s.unbind(1), t)) + 0.1 * 9 * 2 * entropy(t / 3).mean()
        ),
    ),
    "fitnet": Case(lambda s, t, y: fn.fitnet(s, t), MAPS, MAPS),
    "at": Case(lambda s, t, y: fn.at(s, t), MAPS, WIDER),
    "at-paper": Case(lambda s, t, y: fn.at(s, t, mode="paper"), MAPS, LARGER),
    "at-layers": Case(lambda s, t, y: fn.at([s, s], [t, t], p=4), LARGER, MAPS),
    "nst": Case(lambda s, t, y: fn.nst(s, t), MAPS, WIDER),
    "nst-layers": Case(lambda s, t, y: fn.nst([s, s], [t, t]), MAPS, LARGER),
    "vid": Case(vid, MAPS, MAPS, least=lambda s, t, y: vid(t, t, y)),
    "ab": Case(lambda s, t, y: fn.ab(s, t), MAPS, MAPS, best=lambda t, y: 1.5 * t.sign()),
    "ab-layers": Case(lambda s, t, y: fn.ab([s, s], [t, t]), MAPS, MAPS, best=lambda t, y: 1.5 * t.sign()),
    "ofd": Case(ofd, MAPS, MAPS),
    "ofd-pooled": Case(ofd, WIDER, LARGER, best=lambda t, y: F.adaptive_avg_pool2d(t, 4)),
    "hcl": Case(lambda s, t, y: fn.hcl(s, t), LARGER, LARGER),
    "hcl-levels": Case(lambda s, t, y: fn.hcl([s, s[..., :2, :2]], [t, t[..., :2, :2]]), MAPS, MAPS),
    "mgd": Case(lambda s, t, y: fn.mgd(s, t), MAPS, MAPS),
    "sp": Case(lambda s, t, y: fn.sp(s, t), VECTORS, LOGITS),
    "sp-maps": Case(lambda s, t, y: fn.sp(s, t), MAPS, WIDER),
    "rkd": Case(lambda s, t, y: fn.rkd(s, t), VECTORS, LOGITS),
    "rkd-maps": Case(lambda s, t, y: fn.rkd(s, t), MAPS, WIDER),
    "rkd_distance": Case(lambda s, t, y: fn.rkd_distance(s, t), VECTORS, LOGITS),
    "rkd_angle": Case(lambda s, t, y: fn.rkd_angle(s, t), VECTORS, LOGITS),
    "pkt": Case(lambda s, t, y: fn.pkt(s, t), VECTORS, LOGITS),
    "crd": Case(
        lambda s, t, y: fn.crd(s.abs() + 0.01, 40),
        best=lambda t, y: 1e6 * certain(torch.zeros_like(y)),
        least=lambda s, t, y: torch.tensor(4 * math.log(1 + 0.01 / 0.1)),
    ),
    "cwd-channel": Case(lambda s, t, y: fn.cwd(s, t), MAPS, MAPS),
    "cwd-spatial": Case(lambda s, t, y: fn.cwd(s, t, norm="spatial"), MAPS, MAPS),
    "cwd-mse": Case(lambda s, t, y: fn.cwd(s, t, norm="mse"), MAPS, MAPS),
    "skd_pixelwise": Case(
        lambda s, t, y, **o: fn.skd_pixelwise(s, t, y[:, None, None].expand(-1, *s.shape[2:]), temperature=2, **o),
        SCORES,
        SCORES,
        least=lambda s, t, y: len(t) * entropy(t / 2).mean(),
    ),
    "skd_pairwise": Case(lambda s, t, y: fn.skd_pairwise(s, t), MAPS, WIDER),
}
MASKED = {
    name: CASES[name].loss
    for name in CASES
    if name.partition("-")[0] in ("cross_entropy", "kd", "dkd", "wsld", "lsr", "tfkd_reg", "skd_pixelwise")
}
MASKED["byot-hard"] = lambda s, t, y, **o: byot(s[:, None], t, y, alpha=0, beta=0, **o)
MASKED["deit-base"] = lambda s, t, y, ignore_index=-100: fn.deit(
    s, s, t, y.masked_fill(y == ignore_index, -100), alpha=0
)

NOT_LOSSES = {"attention_map", "flatten_positions", "logit_standardize", "ofd_margin", "pool_to_smaller"}
DETACHED = {"skd_pairwise", "wsld"}  # a part of their value counts as a constant
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_masked_loss = pytest.mark.parametrize("name", MASKED)
both_halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def draw(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for shape in (case.student, case.teacher)
    )
    return student, teacher, torch.randint(CLASSES, case.teacher[:1], generator=generator)


def draw_masked(name: str, seed: int) -> Arguments:
    return draw(CASES.get(name, Case(MASKED[name])), seed)


def test_every_loss_has_a_case():
    assert {name.partition("-")[0] for name in CASES} == set(fn.__all__) - NOT_LOSSES


@every_case
@few
@given(seed=seeds)
def test_loss_is_least_for_the_best_student(case, seed):
    student, teacher, target = (tensor.detach() for tensor in draw(case, seed))
    best = case.best(teacher, target)
    torch.testing.assert_close(
        case.loss(best, teacher, target), case.least(best, teacher, target), rtol=1e-5, atol=2e-5
    )
    assert case.loss(student, teacher, target) > case.least(student, teacher, target)


@every_case
@few
@given(seed=seeds)
def test_only_the_student_gets_a_finite_gradient(case, seed):
    student, teacher, target = draw(case, seed)
    case.loss(student, teacher, target).backward()
    assert teacher.grad is None or case is CASES["byot"]  # whose deepest exit also learns from the labels
    assert student.grad.isfinite().all()
    assert student.grad.any()


@few
@given(seed=seeds)
def test_byot_teaches_nothing_to_the_deepest_exit(seed):
    student, teacher, target = draw(CASES["byot"], seed)
    byot(student, teacher, target, alpha=1).backward()
    assert not teacher.grad.any()
    assert student.grad.any()


@every_case
@few
@given(seed=seeds)
def test_order_of_the_batch_does_not_matter(case, seed):
    arguments = draw(case, seed)
    order = torch.randperm(len(arguments[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = case.loss(*(tensor[order] for tensor in arguments))
    torch.testing.assert_close(shuffled, case.loss(*arguments), rtol=1e-4, atol=1e-5)


@every_case
@both_halves
@few
@given(seed=seeds)
def test_half_precision_gives_nearly_the_value_of_float32(case, dtype, seed):
    student, teacher, target = draw(case, seed, dtype)
    value = case.loss(student, teacher, target)
    value.backward()
    rtol = 0.02 if dtype is torch.bfloat16 else 0.003
    torch.testing.assert_close(value.float(), case.loss(student.float(), teacher.float(), target), rtol=rtol, atol=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "crd"])
@both_halves
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher, target = draw(CASES[name], 0, dtype)
    assert CASES[name].loss(student, teacher, target).dtype == torch.float32


@every_case
@few
@given(seed=seeds)
def test_large_values_stay_finite(case, seed):
    student, teacher, target = draw(case, seed)
    student = (1e3 * student.detach()).requires_grad_()
    value = case.loss(student, 1e3 * teacher, target)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@every_case
def test_a_constant_student_gets_a_finite_gradient(case):
    student, teacher, target = draw(case, 0)
    constant = torch.zeros_like(student, requires_grad=True)
    value = case.loss(constant, teacher, target)
    value.backward()
    assert value.isfinite()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in DETACHED])
def test_gradient_is_the_derivative(name):
    student, teacher, target = draw(CASES[name], 0, torch.float64)
    assert torch.autograd.gradcheck(lambda s: CASES[name].loss(s, teacher, target), student)


@every_masked_loss
@few
@given(seed=seeds, ignore=st.sampled_from([-100, 255]), kept=st.sets(st.integers(0, 3), min_size=1))
def test_ignored_labels_do_not_count(name, seed, ignore, kept):
    student, teacher, target = draw_masked(name, seed)
    rows = sorted(kept)
    masked = torch.full_like(target, ignore)
    masked[rows] = target[rows]
    value = MASKED[name](student, teacher, masked, ignore_index=ignore)
    torch.testing.assert_close(value, MASKED[name](student[rows], teacher[rows], target[rows]))
    value.backward()
    assert not student.grad[masked == ignore].any()


@every_masked_loss
def test_a_batch_of_ignored_labels_gives_zero(name):
    student, teacher, target = draw_masked(name, 0)
    value = MASKED[name](student, teacher, torch.full_like(target, -100))
    value.backward()
    assert value == 0
    assert not student.grad.any()


TEMPERED = {
    "kd": lambda s, y, t: fn.kd(s, s, temperature=t),
    "dkd": lambda s, y, t: fn.dkd(s, s, y, temperature=t),
    "dist": lambda s, y, t: fn.dist(s, s, tau=t),
    "wsld": lambda s, y, t: fn.wsld(s, s, y, temperature=t),
    "tfkd_reg": lambda s, y, t: fn.tfkd_reg(s, y, temperature=t),
    "deit": lambda s, y, t: fn.deit(s, s, s, y, kind="soft", temperature=t),
    "byot": lambda s, y, t: fn.byot([s, s], [s, s], y, temperature=t),
    "cwd": lambda s, y, t: fn.cwd(s[:, :, None, None], s[:, :, None, None], temperature=t),
    "skd_pixelwise": lambda s, y, t: fn.skd_pixelwise(s[:, :, None, None], s[:, :, None, None], temperature=t),
}


@pytest.mark.parametrize("loss", TEMPERED.values(), ids=TEMPERED.keys())
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(loss, temperature):
    student, _, target = draw(CASES["kd"], 0)
    with pytest.raises(ValueError, match=f"must be positive and finite, not {temperature}"):
        loss(student, target, temperature)


WRONG = {
    "cross_entropy-target": (lambda x, y, m: fn.cross_entropy(x, y[:5]), "need a target of shape"),
    "cross_entropy-reduction": (lambda x, y, m: fn.cross_entropy(x, y, reduction="sum"), "unknown reduction"),
    "kd-target": (lambda x, y, m: fn.kd(x, x, y[:5]), "need a target of shape"),
    "kd-dimensions": (lambda x, y, m: fn.kd(x[0], x[0]), "logits must be"),
    "dkd-classes": (lambda x, y, m: fn.dkd(x, x[:, :4], y), "5 classes and the teacher 4"),
    "dkd-reduction": (lambda x, y, m: fn.dkd(x, x, y, reduction="sum"), "unknown reduction"),
    "dist-classes": (lambda x, y, m: fn.dist(x, x[:, :4]), "5 classes and the teacher 4"),
    "wsld-batch": (lambda x, y, m: fn.wsld(x, x[:5], y), "differ in shape"),
    "wsld-target": (lambda x, y, m: fn.wsld(x, x, y[:5]), "need a target of shape"),
    "lsr-target": (lambda x, y, m: fn.lsr(x, y[:5]), "need a target of shape"),
    "lsr-classes": (lambda x, y, m: fn.lsr(x[:, :1], y), "at least two classes"),
    "lsr-reduction": (lambda x, y, m: fn.lsr(x, y, reduction="sum"), "unknown reduction"),
    "tfkd_reg-target": (lambda x, y, m: fn.tfkd_reg(x, y[:5]), "need a target of shape"),
    "tfkd_reg-classes": (lambda x, y, m: fn.tfkd_reg(x[:, :1], y), "at least two classes"),
    "deit-kind": (lambda x, y, m: fn.deit(x, x, x, y, kind="other"), "kind must be"),
    "deit-hard": (lambda x, y, m: fn.deit(x, x, x[:, :4], y), "5 classes and the teacher 4"),
    "deit-soft": (lambda x, y, m: fn.deit(x, x, x[:5], y, kind="soft"), "differ in shape"),
    "deit-target": (lambda x, y, m: fn.deit(x, x, x, y[:5]), "need a target of shape"),
    "byot-one": (lambda x, y, m: fn.byot([x], [x], y), "two exits"),
    "byot-counts": (lambda x, y, m: fn.byot([x, x], [x], y), "got 2 and 1"),
    "byot-classes": (lambda x, y, m: fn.byot([x, x[:, :4]], [x, x], y), "5 classes and the teacher 4"),
    "byot-features": (lambda x, y, m: fn.byot([x, x], [x, x[:, :4]], y), "features of the exits differ"),
    "fitnet-shape": (lambda x, y, m: fn.fitnet(m, m[:, :2]), "through a Regressor"),
    "at-dimensions": (lambda x, y, m: fn.at(x, x), "feature map"),
    "at-layers": (lambda x, y, m: fn.at([m], [m, m]), "1 of the student and 2 of the teacher"),
    "at-mode": (lambda x, y, m: fn.at(m, m, mode="other"), "mode must be"),
    "attention_map-dimensions": (lambda x, y, m: fn.attention_map(x), r"features \[B, Ch, H, W\]"),
    "nst-dimensions": (lambda x, y, m: fn.nst(x, x), "feature maps"),
    "nst-none": (lambda x, y, m: fn.nst([], []), "compared in pairs"),
    "vid-shape": (lambda x, y, m: fn.vid(m, torch.zeros(3), m[:, :2]), "one shape"),
    "ab-shape": (lambda x, y, m: fn.ab(m, m[:, :2]), "one shape"),
    "ab-layers": (lambda x, y, m: fn.ab([m, m], [m]), "2 of the student and 1 of the teacher"),
    "ofd-channels": (lambda x, y, m: fn.ofd(m, m[:, :2], torch.zeros(1, 2, 1, 1)), "connector to 2 channels; got 3"),
    "ofd-layers": (
        lambda x, y, m: fn.ofd([m, m], [m], torch.zeros(1, 3, 1, 1)),
        "2 of the student and 1 of the teacher",
    ),
    "hcl-shape": (lambda x, y, m: fn.hcl(m, m[:, :2]), "differ in shape"),
    "hcl-levels": (lambda x, y, m: fn.hcl([m, m], [m]), "2 of the student and 1 of the teacher"),
    "mgd-shape": (lambda x, y, m: fn.mgd(m, m[:, :2]), "differ in shape"),
    "sp-one": (lambda x, y, m: fn.sp(x[:1], x[:1]), "at least two"),
    "sp-batch": (lambda x, y, m: fn.sp(x, x[:5]), "got 6 and 5"),
    "rkd-one": (lambda x, y, m: fn.rkd(x[:1], x[:1]), "at least two"),
    "rkd_distance-batch": (lambda x, y, m: fn.rkd_distance(x, x[:5]), "got 6 and 5"),
    "rkd_angle-batch": (lambda x, y, m: fn.rkd_angle(x, x[:5]), "got 6 and 5"),
    "pkt-one": (lambda x, y, m: fn.pkt(x[:1], x[:1]), "at least two"),
    "pkt-batch": (lambda x, y, m: fn.pkt(x, x[:5]), "got 6 and 5"),
    "crd-dimensions": (lambda x, y, m: fn.crd(m, 40), r"scores \[B, 1 \+ K\]"),
    "crd-negatives": (lambda x, y, m: fn.crd(x[:, :1], 40), r"scores \[B, 1 \+ K\]"),
    "cwd-shape": (lambda x, y, m: fn.cwd(m, m[:, :2]), "one shape"),
    "cwd-dimensions": (lambda x, y, m: fn.cwd(x, x), "one shape"),
    "cwd-norm": (lambda x, y, m: fn.cwd(m, m, norm="other"), "norm must be"),
    "skd_pixelwise-dimensions": (lambda x, y, m: fn.skd_pixelwise(x, x), "score maps"),
    "skd_pixelwise-classes": (lambda x, y, m: fn.skd_pixelwise(m, m[:, :2]), "3 classes and the teacher 2"),
    "skd_pixelwise-shape": (lambda x, y, m: fn.skd_pixelwise(m, m[..., :2]), "differ in shape"),
    "skd_pairwise-dimensions": (lambda x, y, m: fn.skd_pairwise(x, x), "maps of one size"),
    "skd_pairwise-shape": (lambda x, y, m: fn.skd_pairwise(m, m[..., :2]), "maps of one size"),
    "skd_pairwise-scale": (lambda x, y, m: fn.skd_pairwise(m, m, scale=0.1), "less than a pixel"),
    "logit_standardize-classes": (lambda x, y, m: fn.logit_standardize(x[:, :1]), "at least two classes"),
    "flatten_positions-dimensions": (lambda x, y, m: fn.flatten_positions(m[None]), "logits must be"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_get_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(LOGITS), torch.zeros(6, dtype=torch.long), torch.zeros(MAPS))
