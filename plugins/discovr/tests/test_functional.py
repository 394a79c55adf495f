import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_discovr import functional as f
from kd_discovr.modules import DINOHead, MAEDecoder
from kd_discovr.vit import positions
from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"
seeds = st.integers(0, 10**6)
few = settings(max_examples=20, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_functions_agree_with_the_golden_vectors():
    cases = golden.run(FOLDER, PLUGINS, only="discovr")
    assert {case.name.rpartition("-")[0].removeprefix("discovr-") for case in cases} == {
        "dino", "dinohead", "scd", "tokennorm"}  # fmt: skip
    assert [case for case in cases if not case.passed] == []


# -- masks -----------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, size=st.integers(1, 60), ratio=st.floats(0, 0.99))
def test_as_many_positions_are_masked_as_the_ratio_says(seed, size, ratio):
    visible = f.visible_positions(uniform(seed, 3, size), ratio)
    assert visible.shape == (3, size - int(size * ratio))
    assert (visible.diff(dim=-1) > 0).all()
    assert visible.min() >= 0
    assert visible.max() < size


def test_paper_geometry():
    draw = uniform(0, 2, 49)
    assert f.visible_positions(draw, 0.9).shape == (2, 5)
    assert f.tube(f.visible_positions(draw, 0.9), 32, 49).shape == (2, 160)


def test_every_position_is_masked_alike():
    visible = f.visible_positions(uniform(0, 4000, 10), 0.5)
    share = F.one_hot(visible, 10).sum((0, 1)) / 4000
    torch.testing.assert_close(share, torch.full((10,), 0.5), atol=0.04, rtol=0)


@few
@given(seed=seeds, frames=st.integers(1, 4), size=st.integers(2, 9))
def test_a_tube_is_the_same_in_every_frame(seed, frames, size):
    visible = f.visible_positions(uniform(seed, 2, 3, size), 0.5)
    whole = f.tube(visible, frames, size).unflatten(-1, (frames, -1))
    for frame in range(frames):
        assert torch.equal(whole[:, :, frame] - frame * size, visible)


def test_take_gives_the_tokens_of_each_sample():
    tokens = torch.arange(24.0).view(2, 6, 2)
    indices = torch.tensor([[[0, 5], [1, 2]], [[3, 4], [0, 1]], [[5, 5], [2, 2]]])
    taken = f.take(tokens, indices)
    assert taken.shape == (3, 2, 2, 2)
    assert all(torch.equal(taken[v, b], tokens[b, indices[v, b]]) for v in range(3) for b in range(2))


# -- class tokens ----------------------------------------------------------------------------------------------------


def test_teacher_temperature_rises_in_equal_steps_and_stays():
    found = [f.teacher_temperature(epoch, 0.04, 0.07, 30) for epoch in range(500)]
    assert found[:30] == pytest.approx(torch.linspace(0.04, 0.07, 30, dtype=torch.float64).tolist())
    assert set(found[29:]) == {0.07}
    assert f.teacher_temperature(0, 0.04, 0.07, 1) == 0.07


def test_image_temperatures_keep_the_limits_of_the_official_code():
    assert f.image_temperatures(0.02, 0.05) == (0.04, 0.1)
    assert f.image_temperatures(0.06, 0.15) == (0.06, 0.15)
    assert f.image_temperatures(0.07, 0.5) == (0.07, 0.2)


@few
@given(seed=seeds, views=st.integers(1, 4), temperature=st.floats(0.05, 1))
def test_dino_ce_is_the_mean_cross_entropy(seed, views, temperature):
    student = normal(seed, views, 5, 7)
    teacher = f.teacher_probabilities(normal(seed + 1, 5, 7), normal(seed + 2, 1, 7), 0.1)
    loss = f.dino_ce(student, teacher, temperature)
    expected = F.cross_entropy((student / temperature).flatten(0, 1), teacher.repeat(views, 1))
    torch.testing.assert_close(loss, expected)


def test_dino_ce_is_smallest_at_the_teachers_distribution():
    teacher = normal(0, 4, 6).softmax(-1)
    best = (0.1 * teacher.log())[None].requires_grad_()
    loss = f.dino_ce(best, teacher, 0.1)
    loss.backward()
    assert best.grad.abs().max() < 1e-5
    torch.testing.assert_close(loss, -(teacher * teacher.log()).sum(-1).mean())


def test_gradient_reaches_only_the_student():
    student, teacher = normal(0, 2, 4, 6).requires_grad_(), normal(1, 4, 6).requires_grad_()
    f.dino_ce(student, f.teacher_probabilities(teacher, torch.zeros(1, 6), 0.05)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    tokens, theirs = normal(0, 2, 9, 6).requires_grad_(), normal(1, 2, 9, 6).requires_grad_()
    prototypes = f.normalise_(normal(2, 9, 6)).requires_grad_()
    f.cluster_assignment_distill(tokens, theirs, prototypes).student.backward()
    assert tokens.grad.abs().sum() > 0
    assert prototypes.grad.abs().sum() > 0
    assert theirs.grad is None


def test_center_moves_towards_the_mean():
    center, rows = normal(0, 1, 5), normal(1, 8, 5)
    torch.testing.assert_close(f.moved_center(center, rows, 0.9), 0.9 * center + 0.1 * rows.mean(0, keepdim=True))
    assert torch.equal(f.moved_center(center, rows, 1.0), center)


def test_head_gives_cosines():
    torch.manual_seed(0)
    head = DINOHead(8, outputs=12, hidden=16, bottleneck=6)
    logits = head(normal(0, 50, 8))
    assert logits.abs().max() <= 1 + 1e-6
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
    assert frozen == ["last_layer.parametrizations.weight.original0"]
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(12))


# -- clusters --------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, tokens=st.integers(1, 40), clusters=st.integers(1, 12), iterations=st.integers(0, 5))
def test_assignments_sum_to_one(seed, tokens, clusters, iterations):
    scores = normal(seed, tokens, clusters).tanh()
    q = f.sinkhorn(scores, 0.05, iterations)
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(tokens), atol=1e-5, rtol=0)


@few
@given(seed=seeds)
def test_every_prototype_is_used_alike(seed):
    q = f.sinkhorn(0.3 * normal(seed, 256, 8).tanh(), 0.05, 30)
    torch.testing.assert_close(q.mean(0), torch.full((8,), 1 / 8), atol=1e-2, rtol=0)


@few
@given(seed=seeds, shift=st.floats(-3, 3))
def test_sinkhorn_does_not_mind_order_or_a_common_shift(seed, shift):
    scores = normal(seed, 20, 5).tanh()
    q = f.sinkhorn(scores)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(f.sinkhorn(scores[order]), q[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(f.sinkhorn(scores + shift), q, atol=1e-4, rtol=1e-3)


def test_sinkhorn_is_the_plain_algorithm_in_double_precision():
    scores = normal(0, 30, 6).tanh()
    q = (scores.double() / 0.05).exp().T
    q /= q.sum()
    for _ in range(10):
        q /= 6 * q.sum(1, keepdim=True)
        q /= 30 * q.sum(0, keepdim=True)
    torch.testing.assert_close(f.sinkhorn(scores).double(), (q / q.sum(0)).T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_neither_overflow_nor_lose_their_clusters(dtype):
    scores = torch.eye(6).repeat(4, 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = f.sinkhorn(scores, 0.02)
    assert q.dtype == torch.float32
    assert q.isfinite().all()
    assert torch.equal(q.argmax(1), torch.arange(6).repeat(4))


def test_scores_are_cosines_in_float32_under_autocast():
    tokens, prototypes = 100 * normal(0, 2, 9, 5), f.normalise_(normal(1, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = f.prototype_scores(tokens.bfloat16(), prototypes)
    assert scores.dtype == torch.float32
    expected = F.cosine_similarity(tokens.bfloat16().float()[:, :, None], prototypes, dim=-1)
    torch.testing.assert_close(scores, expected)


def test_the_loss_follows_its_formula():
    student, teacher, prototypes = normal(0, 2, 9, 5), normal(1, 2, 9, 5), f.normalise_(normal(2, 4, 5))
    loss = f.cluster_assignment_distill(student, teacher, prototypes, eps=0.1, iterations=3, temperature=0.2)
    ours, theirs = (F.normalize(t, dim=-1).flatten(0, 1) @ prototypes.T for t in (student, teacher))
    q = f.sinkhorn(theirs, 0.1, 3).argmax(1)
    torch.testing.assert_close(loss.student, F.cross_entropy(ours / 0.2, q))
    torch.testing.assert_close(loss.teacher, F.cross_entropy(theirs / 0.2, f.sinkhorn(ours, 0.1, 3).argmax(1)))
    soft = f.cluster_assignment_distill(student, teacher, prototypes, eps=0.1, iterations=3, temperature=0.2,
                                        soft_targets=True)  # fmt: skip
    expected = -(f.sinkhorn(theirs, 0.1, 3) * (ours / 0.2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft.student, expected)
    assert not torch.isclose(soft.student, loss.student)


@pytest.mark.parametrize("from_image", [False, True])
def test_prototypes_learn_from_image_scores_only_if_asked(from_image):
    prototypes = f.normalise_(normal(2, 4, 5)).requires_grad_()
    loss = f.cluster_assignment_distill(normal(0, 2, 9, 5), normal(1, 2, 9, 5), prototypes,
                                        prototype_grad_from_image=from_image)  # fmt: skip
    assert loss.teacher.requires_grad == from_image
    assert loss.student.requires_grad


def test_known_targets_are_taken():
    student, teacher, prototypes = normal(0, 2, 9, 5), normal(1, 2, 9, 5), f.normalise_(normal(2, 4, 5))
    known = torch.zeros(2, 9, dtype=torch.long)
    loss = f.cluster_assignment_distill(student, teacher, prototypes, targets=known)
    torch.testing.assert_close(loss.student, f.cluster_ce(f.prototype_scores(student, prototypes), known))


@few
@given(seed=seeds, tokens=st.integers(2, 9), scale=st.floats(0.5, 5), shift=st.floats(-2, 2))
def test_standardised_tokens_have_no_scale_or_shift(seed, tokens, scale, shift):
    plain = normal(seed, 3, tokens, 4)
    found = f.standardise_tokens(plain)
    torch.testing.assert_close(found.mean(1), torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(f.standardise_tokens(scale * plain + shift), found, atol=2e-3, rtol=1e-3)


def test_aligned_pairs_are_of_one_place_and_those_of_the_code_are_not():
    place = torch.arange(4)[:, None] * 10 + torch.arange(6)  # frame and patch
    tokens = place.expand(2, 4, 6)[..., None].float()
    aligned = f.paired_tokens(tokens, 2)[0, :, 0].tolist()
    assert aligned == [0, 1, 2, 3, 4, 5, 20, 21, 22, 23, 24, 25]
    assert f.paired_tokens(tokens, 2, "code")[0, :, 0].tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24, 30, 32, 34]
    assert f.paired_tokens(tokens, 1).shape == (2, 24, 1)


def test_visible_first_is_the_order_of_the_code():
    tokens = torch.arange(6.0).expand(2, 6)[..., None]
    found = f.visible_first(tokens, torch.tensor([[1, 4], [0, 5]]))
    assert found[..., 0].tolist() == [[1, 4, 0, 2, 3, 5], [0, 5, 1, 2, 3, 4]]


def test_decoder_does_not_mind_the_order_of_what_it_sees():
    torch.manual_seed(0)
    decoder = MAEDecoder(8, 12, 2, 3)
    tokens, visible = normal(0, 2, 3, 8), torch.tensor([[0, 2, 5], [1, 3, 4]])
    order = torch.tensor([2, 0, 1])
    whole = decoder(tokens, visible, 6)
    assert whole.shape == (2, 6, 8)
    torch.testing.assert_close(decoder(tokens[:, order], visible[:, order], 6), whole)


def test_positions_are_the_table_of_the_transformer():
    table = positions(50, 12)
    for place, channel in ((0, 0), (7, 4), (49, 11)):
        angle = place / 10000 ** (2 * (channel // 2) / 12)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[place, channel].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.visible_positions(uniform(0, 2, 4), 1.0), r"lies in \[0, 1\)"),
        (lambda: f.dino_ce(normal(0, 2, 4, 6), normal(0, 5, 6).softmax(1)), "do not fit"),
        (lambda: f.dino_ce(normal(0, 2, 4, 6), normal(0, 4, 6).softmax(1), 0.0), "must be positive"),
        (lambda: f.sinkhorn(normal(0, 2, 4, 6)), "takes scores"),
        (lambda: f.sinkhorn(normal(0, 4, 6), eps=0), "eps > 0"),
        (lambda: f.cluster_assignment_distill(normal(0, 2, 4, 6), normal(0, 2, 5, 6), normal(0, 3, 6)), "do not fit"),
        (lambda: f.cluster_assignment_distill(normal(0, 2, 4, 6), normal(0, 2, 4, 6), normal(0, 3, 5)), "do not fit"),
    ],
)
def test_wrong_arguments_get_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
