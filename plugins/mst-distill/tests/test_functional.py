import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_mst_distill.functional import decayed, kd_kl, load_balance, mutual_kl, routed_kl, top_teachers
from kd_mst_distill.modules import DenseGateNet, GateNet, MaskNet1d, MaskNet2d, gate_net, mask_net
from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"

settings.register_profile("plugin", deadline=None, max_examples=25)
settings.load_profile("plugin")

seeds = st.integers(0, 2**31)
temperatures = st.floats(0.5, 8)
shapes = st.sampled_from([(6, 5), (1, 3), (3, 4, 5, 2)])


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def kl_by_loop(pupil: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over samples and positions of T^2 KL, one position at a time."""
    rows = zip(*(logits.movedim(1, -1).flatten(0, -2) for logits in (pupil, target)), strict=True)
    values = []
    for ours, theirs in rows:
        p, q = (theirs / temperature).softmax(0), (ours / temperature).softmax(0)
        values.append(temperature**2 * (p * (p.log() - q.log())).sum())
    return torch.stack(values).mean()


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_every_function_with_an_adapter_agrees_with_its_golden_vectors():
    adapters = golden.adapters("mst-distill", PLUGINS)
    cases = list(golden.run(FOLDER, PLUGINS, only="mst-distill"))
    assert {case.name.removeprefix("mst-distill-").rpartition("-")[0] for case in cases} == set(adapters)
    assert [case for case in cases if not case.passed] == []


@given(seed=seeds, shape=shapes, temperature=temperatures)
def test_divergence_is_its_formula_and_moves_both_sides(seed, shape, temperature):
    pupil, target = draw(seed, shape, shape)
    loss = kd_kl(pupil, target, temperature=temperature)
    wanted = kl_by_loop(pupil, target, temperature)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, (pupil, target)) for value in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs[1].abs().sum() > 0
    assert kd_kl(pupil, pupil).abs() < 1e-6


@given(seed=seeds, shape=shapes)
def test_mutual_divergence_is_the_sum_over_all_ordered_pairs(seed, shape):
    logits = draw(seed, shape, shape, shape)
    terms = mutual_kl(logits, temperature=3.0)
    for own, term in enumerate(terms):
        wanted = sum(kl_by_loop(logits[own], logits[other], 3.0) for other in range(3) if other != own)
        torch.testing.assert_close(term, wanted, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(terms[0], logits)
    assert all(g.abs().sum() > 0 for g in gradients)


@given(seed=seeds, shape=shapes, k=st.integers(1, 4))
def test_hard_routing_is_the_mean_over_the_chosen_teachers_of_each_sample(seed, shape, k):
    student, teachers, gate = draw(seed, shape, (4, *shape), (shape[0], 4))
    loss = routed_kl(student, teachers, gate, k=k, temperature=2.0)
    chosen = top_teachers(gate, k)
    values = [
        kl_by_loop(student[i : i + 1], teachers[e, i : i + 1].detach(), 2.0) for i in range(shape[0]) for e in chosen[i]
    ]
    torch.testing.assert_close(loss, torch.stack(values).mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teachers.grad is None
    assert gate.grad is None
    assert (gate.gather(1, chosen).diff(dim=1) <= 0).all()


@given(seed=seeds, shape=st.sampled_from([(6, 5), (3, 4, 5, 2)]))
def test_weighted_routing_reaches_the_gate_and_is_hard_where_the_gate_is_certain(seed, shape):
    student, teachers, gate = draw(seed, shape, (4, *shape), (shape[0], 4))
    routed_kl(student, teachers, gate, routing="weighted").backward()
    assert gate.grad.abs().sum() > 0
    assert teachers.grad is None
    weights = gate.detach().softmax(1)
    mean = sum(weights[:, e].reshape(-1, *(1,) * (len(shape) - 1)) * teachers[e].detach() for e in range(4))
    torch.testing.assert_close(routed_kl(student, teachers, gate, routing="weighted"), kd_kl(student, mean))
    certain = 1e4 * F.one_hot(top_teachers(gate, 1)[:, 0], 4).float()
    ours, theirs = (routed_kl(student, teachers, certain, routing=kind) for kind in ("weighted", "hard"))
    torch.testing.assert_close(ours, theirs)


@given(seed=seeds, teachers=st.integers(2, 6))
def test_load_balance_is_its_formula_and_zero_at_equal_use(seed, teachers):
    (gate,) = draw(seed, (7, teachers))
    use = gate.softmax(1).mean(0)
    uniform = torch.full_like(use, 1 / teachers)
    torch.testing.assert_close(
        load_balance(gate), (uniform * (uniform / use).log()).sum() / teachers, atol=1e-6, rtol=1e-4
    )
    summed = gate.softmax(1).sum(0)
    torch.testing.assert_close(load_balance(gate, mode="cv"), summed.std() / summed.mean(), atol=1e-6, rtol=1e-4)
    for mode in ("kl", "cv"):
        assert load_balance(torch.zeros(5, teachers), mode=mode).abs() < 1e-6
        assert load_balance(gate, mode=mode) > 1e-6


def test_a_gate_that_uses_one_teacher_alone_stays_finite():
    gate = (1e4 * F.one_hot(torch.zeros(6, dtype=torch.long), 4).float()).requires_grad_()
    loss = load_balance(gate)
    loss.backward()
    assert loss > 100
    assert gate.grad.isfinite().all()
    assert gate.grad.abs().sum() > 0


@given(factor=st.floats(0.1, 1), every=st.integers(1, 12))
def test_weights_fall_at_the_end_of_every_so_many_epochs(factor, every):
    weight = 2.0
    for epoch in range(40):
        assert decayed(2.0, epoch, factor, every) == pytest.approx(weight)
        if epoch % every == 0:
            weight *= factor


@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_and_large_logits_stay_finite(seed, dtype):
    student, teachers, gate = (1e3 * x.detach() for x in draw(seed, (4, 5), (3, 4, 5), (4, 3)))
    student = student.to(dtype).requires_grad_()
    for routing in ("hard", "weighted"):
        loss = routed_kl(student, teachers.to(dtype), gate.to(dtype), routing=routing)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, g: kd_kl(s, t[0, :, :2]), "must have one shape"),
        (lambda s, t, g: kd_kl(s, s, temperature=0), "temperature must be positive"),
        (lambda s, t, g: routed_kl(s, t[:, :2], g), r"need teachers' \[E, ...\] of the same shape"),
        (lambda s, t, g: routed_kl(s, t, g[:, :2]), r"gate logits \[B, E\]"),
        (lambda s, t, g: routed_kl(s, t, g, k=4), "between 1 and the number of teachers, 3, but is 4"),
        (lambda s, t, g: routed_kl(s, t, g, k=0), "between 1 and"),
        (lambda s, t, g: routed_kl(s, t, g, routing="soft"), "unknown routing 'soft'"),
        (lambda s, t, g: top_teachers(g[0], 1), r"must be \[B, E\]"),
        (lambda s, t, g: load_balance(g[:, :1]), r"\[B, E\] with E > 1"),
        (lambda s, t, g: load_balance(g, mode="l2"), "unknown mode 'l2'"),
    ],
)
def test_wrong_arguments_get_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw(0, (4, 5), (3, 4, 5), (4, 3)))


@pytest.mark.parametrize(
    ("shape", "kind", "hidden"),
    [((2, 12), MaskNet1d, 6), ((2, 13, 1, 1), MaskNet1d, 6), ((2, 14, 5, 4), MaskNet2d, 6), ((3, 6), MaskNet1d, 3)],
)
def test_a_mask_fits_its_layer(shape, kind, hidden):
    net = mask_net(shape)
    assert type(net) is kind
    assert net.hidden == hidden
    assert net.embed.weight.shape == (hidden * shape[1], shape[1])
    mask = net(torch.randn(shape))
    assert mask.shape == shape[:2]
    assert 0 < mask.min() < mask.max() < 1


def test_the_hidden_dim_factor_makes_a_mask_smaller():
    sizes = [sum(p.numel() for p in mask_net((1, 96), hidden_dim_factor=f).parameters()) for f in (2, 4, 8)]
    assert sizes[0] > 1.9 * sizes[1] > 3.6 * sizes[2]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 7, 5), {}, r"features of shape \[2, 7, 5\]; masks are for \[B, C\] and \[B, C, H, W\]"),
        ((2, 5), {}, "has 5 channels, which are too few for 3 heads and a hidden_dim_factor of 2"),
        ((2, 12), {"heads": 7}, "too few for 7 heads"),
    ],
)
def test_a_layer_that_cannot_be_masked_gets_a_clear_sentence(shape, options, message):
    with pytest.raises(ValueError, match=message):
        mask_net(shape, **options)


@pytest.mark.parametrize(("shape", "kind"), [((3, 5), GateNet), ((3, 5, 7, 6), DenseGateNet)])
def test_the_gate_decides_once_per_sample(shape, kind):
    gate = gate_net(torch.randn(shape), teachers=4)
    assert type(gate) is kind
    assert gate(torch.randn(shape)).shape == (3, 4)


def test_the_gate_of_class_logits_is_linear():
    gate = GateNet(5, 4)
    one, two, zero = torch.randn(3, 5), torch.randn(3, 5), torch.zeros(3, 5)
    torch.testing.assert_close(gate(one + two), gate(one) + gate(two) - gate(zero))


def test_the_dense_gate_is_its_formula():
    gate, x = DenseGateNet(2, 3), torch.randn(2, 2, 5, 4)
    wide = torch.einsum("oi,bihw->bohw", gate.conv_point.weight[..., 0, 0], x) + gate.conv_point.bias[:, None, None]
    padded = F.pad(wide.relu(), (1, 1, 1, 1))
    for b, c in itertools.product(range(2), range(4)):
        found = [
            (padded[b, c, i : i + 3, j : j + 3] * gate.conv_depthwise.weight[c, 0]).sum() + gate.conv_depthwise.bias[c]
            for i, j in itertools.product(range(0, 5, 2), range(0, 4, 2))
        ]
        assert len(found) == math.ceil(5 / 2) * math.ceil(4 / 2)
        pooled = torch.stack(found).relu().mean()
        torch.testing.assert_close(F.relu(gate.conv_depthwise(wide.relu())).mean((2, 3))[b, c], pooled)
    torch.testing.assert_close(gate(x), gate.fc(F.relu(gate.conv_depthwise(wide.relu())).mean((2, 3))))
