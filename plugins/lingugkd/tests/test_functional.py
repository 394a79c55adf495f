from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lingugkd.functional import (
    classification,
    distill_loss,
    hopwise_infonce,
    label_aware_infonce,
    retrieval_rate,
    similarities,
)
from kd_lingugkd.losses import TEACHER, LinguGKDLoss
from kd_lingugkd.modules import Projectors
from kd_lingugkd.options import LossOptions
from kdcore import Outputs
from kdcore.data import IGNORE
from kdcore.errors import ModelError
from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_agrees_with_the_golden_vectors():
    cases = list(golden.run(FOLDER, PLUGINS, only="lingugkd"))
    assert cases
    assert [case for case in cases if not case.passed] == []


def states(n: int, d: int = 6, seed: int = 0, hops: int = 3) -> Tensor:
    return torch.randn(hops, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


labels_of = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(labels_of, st.integers(0, 100), st.sampled_from([0.07, 0.5]))
def test_is_the_sum_written_out(labels, seed, tau):
    h, z = states(len(labels), seed=seed)[:2]
    wanted = []
    for i, own in enumerate(labels):
        candidates = [j for j, other in enumerate(labels) if j == i or other != own]
        scores = torch.stack([F.cosine_similarity(h[i], z[j], dim=0) / tau for j in candidates])
        wanted.append(scores.logsumexp(0) - scores[candidates.index(i)])
    found = label_aware_infonce(h, z, torch.tensor(labels), tau=tau)
    torch.testing.assert_close(found, torch.stack(wanted).mean())


@settings(max_examples=30, deadline=None)
@given(labels_of, st.integers(0, 100), st.floats(0.1, 10))
def test_length_and_order_do_not_matter(labels, seed, factor):
    y, (h, z, _) = torch.tensor(labels), states(len(labels), seed=seed)
    whole = label_aware_infonce(h, z, y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(label_aware_infonce(factor * h, z / factor, y), whole)
    torch.testing.assert_close(label_aware_infonce(h[order], z[order], y[order]), whole)
    assert whole >= 0


def test_one_class_costs_nothing_and_all_different_is_plain_infonce():
    h, z, _ = states(7)
    assert label_aware_infonce(h, z, torch.zeros(7, dtype=torch.long)) == 0
    scores = F.normalize(h, dim=1) @ F.normalize(z, dim=1).T / 0.07
    torch.testing.assert_close(label_aware_infonce(h, z, torch.arange(7)), F.cross_entropy(scores, torch.arange(7)))


def test_symmetric_is_the_mean_of_both_directions():
    y, (h, z, _) = torch.tensor([0, 0, 1, 2, 1]), states(5)
    both = (label_aware_infonce(h, z, y) + label_aware_infonce(z, h, y)) / 2
    torch.testing.assert_close(label_aware_infonce(h, z, y, symmetric=True), both)


def test_nodes_without_a_label_neither_ask_nor_answer():
    y, (h, z, _) = torch.tensor([0, 1, IGNORE, 2, IGNORE]), states(5)
    known = y != IGNORE
    torch.testing.assert_close(label_aware_infonce(h, z, y), label_aware_infonce(h[known], z[known], y[known]))
    loss, log_probs = classification(h, y)
    torch.testing.assert_close(loss, F.cross_entropy(h[known], y[known]))
    assert log_probs.shape == h.shape
    assert label_aware_infonce(h, z, torch.full((5,), IGNORE)) == 0


def test_weights_are_softmaxed_over_hops_and_tasks():
    y, h, z = torch.tensor([0, 0, 1, 2, 1]), states(5), states(5, seed=1)
    each = torch.stack([label_aware_infonce(a, b, y) for a, b in zip(h, z, strict=True)])
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(hopwise_infonce(h, z, y, weights), (weights.softmax(0) * each).sum())
    torch.testing.assert_close(hopwise_infonce(h, z, y), each.mean())
    found = distill_loss(h, z, h[0], y, weights, torch.tensor([0.0, 1.0], dtype=torch.float64))
    shares = torch.tensor([0.0, 1.0]).softmax(0).double()
    torch.testing.assert_close(found.loss, shares[0] * found.ce + shares[1] * found.infonce)
    torch.testing.assert_close(distill_loss(h, z, h[0], y).loss, (found.ce + each.mean()) / 2)


def test_a_single_output_is_a_binary_task():
    logits, y = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    loss, probability = classification(logits, y)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[:, 0], y.float()))
    torch.testing.assert_close(probability, logits[:, 0].sigmoid())


def test_half_precision_is_normalised_in_single():
    y, (h, z, _) = torch.tensor([0, 1, 2]), (states(3) * 200).to(torch.float16)
    assert similarities(h, z, y).dtype == torch.float32
    assert label_aware_infonce(h * 100, z, y).isfinite()


def test_retrieval_rate_counts_nearest_own_states():
    y = torch.tensor([0, 0, 1])
    h = torch.eye(3)
    assert retrieval_rate(h, h, y) == 1
    assert retrieval_rate(h, h[[2, 1, 0]], y) == pytest.approx(1 / 3)
    assert retrieval_rate(h, h[[1, 0, 2]], y) == 1  # nodes of one class are no candidates for each other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, y: label_aware_infonce(h[0], h[1, :3], y), "states must be"),
        (lambda h, y: label_aware_infonce(h[0], h[1], y[:2]), "labels"),
        (lambda h, y: label_aware_infonce(h[0], h[1], y, tau=0), "tau must be positive"),
        (lambda h, y: hopwise_infonce(h, h[:2], y), r"states must be \[L, n, d\]"),
        (lambda h, y: hopwise_infonce(h, h, y, torch.ones(2)), "3 hops need as many weights"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(states(5), torch.arange(5))


def batch_of(n: int = 6, hops: int = 3) -> tuple[Outputs, dict[str, Tensor]]:
    torch.manual_seed(0)
    hidden = [torch.randn(n, 4, requires_grad=True) for _ in range(hops)]
    batch = {"label": torch.arange(n) % 3, TEACHER: torch.randn(n, hops, 10), "index": torch.arange(n)}
    return Outputs(logits=torch.randn(n, 3, requires_grad=True), extras={"hidden": hidden}), batch


def test_loss_is_the_objective_of_its_projected_states():
    loss = LinguGKDLoss(LossOptions(dropout=0, tau=0.2))
    student, batch = batch_of()
    terms = loss(student, Outputs(), batch)
    projected = torch.stack(loss.projectors(list(batch[TEACHER].unbind(1))))
    wanted = distill_loss(torch.stack(student.extras["hidden"]), projected, student.logits, batch["label"],
                          loss.layer_weights, loss.task_weights, tau=0.2)  # fmt: skip
    torch.testing.assert_close(sum(terms.values()), wanted.loss)
    sum(terms.values()).backward()
    learned = dict(loss.named_parameters())
    assert all(p.grad is not None for p in learned.values())
    assert {"layer_weights", "task_weights", "projectors.transform.0.weight"} <= set(learned)
    assert all(state.grad is not None for state in student.extras["hidden"])
    assert not batch[TEACHER].requires_grad


def test_weights_that_are_not_learned_are_equal():
    loss = LinguGKDLoss(LossOptions(layer_weighting="uniform", task_weighting="fixed", dropout=0))
    student, batch = batch_of()
    terms = loss(student, Outputs(), batch)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student.logits, batch["label"]) / 2)
    assert not [name for name, _ in loss.named_parameters() if "weights" in name]


def test_states_of_any_precision_are_projected_in_single():
    loss = LinguGKDLoss(LossOptions(dropout=0))
    student, batch = batch_of()
    plain = loss(student, Outputs(), batch)
    half = {**batch, TEACHER: batch[TEACHER].bfloat16()}
    rounded = {**batch, TEACHER: half[TEACHER].float()}
    assert loss(student, Outputs(), half) == loss(student, Outputs(), rounded)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, Outputs(), batch)
    assert {term.dtype for term in found.values()} == {torch.float32}
    torch.testing.assert_close(found["nce"], plain["nce"], atol=0.05, rtol=0.05)


def test_some_nodes_of_a_batch_are_contrasted_and_all_classified():
    loss = LinguGKDLoss(LossOptions(nce_nodes=3, dropout=0, task_weighting="fixed"), seed=5)
    student, batch = batch_of(40)
    first, again = loss(student, Outputs(), batch), loss(student, Outputs(), batch)
    assert first == again
    loss.progress = type(loss.progress)(step=1)
    other = loss(student, Outputs(), batch)
    assert other["nce"] != first["nce"]
    assert other["ce"] == first["ce"]
    assert len(loss._drawn(batch)) == 3


@pytest.mark.parametrize(("filters", "transforms"), [(0, 0), (1, 1), (2, 2)])
def test_projectors_have_the_layers_asked_for(filters, transforms):
    made = Projectors(3, 10, 4, filter_layer=filters, projector_layer=transforms, dropout=0.1)
    linear = [m for m in made.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3 * (filters + 1) + transforms
    assert sum(m.bias is None for m in linear) == transforms
    assert [z.shape for z in made([torch.randn(5, 10)] * 3)] == [(5, 4)] * 3


def test_a_student_without_enough_layers_is_refused():
    student, batch = batch_of(hops=2)
    batch[TEACHER] = torch.randn(6, 3, 10)
    with pytest.raises(ModelError, match=r"hops 0 to 2 .* only 1 message-passing layers: set method.hops=1"):
        LinguGKDLoss()(student, Outputs(), batch)
    with pytest.raises(ModelError, match="this student does not give them"):
        LinguGKDLoss()(Outputs(logits=student.logits), Outputs(), batch)
