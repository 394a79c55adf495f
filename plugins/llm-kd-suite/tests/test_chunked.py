"""Losses over a large vocabulary, chunk by chunk, against all positions at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kd_llm_kd_suite import chunked, functional
from kd_llm_kd_suite.chunked import mean_over_tokens
from kd_llm_kd_suite.losses import next_token
from kdcore.data import IGNORE
from kdcore.models import Outputs

V, D = 97, 12


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "PLAIN", 0)
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 5 * V, "cuda": 5 * V})


def models(bias=True, theirs=V):
    torch.manual_seed(0)
    student, teacher = nn.Linear(D, V, bias=bias), nn.Linear(D, theirs, bias=bias).requires_grad_(False)
    hidden, other = torch.randn(3, 9, D, requires_grad=True), torch.randn(3, 9, D)
    labels = torch.randint(0, V, (3, 9))
    labels[0, :4] = labels[2, 6:] = IGNORE
    return student, teacher, hidden, other, labels


def rows(name):
    if name == "next-token":
        return next_token
    return lambda s, t, _: functional.DIVERGENCES[name](s, t)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*functional.DIVERGENCES, "next-token"])
def test_value_and_every_gradient_are_those_of_all_positions_at_once(name, bias, monkeypatch):
    student, teacher, hidden, other, labels = models(bias)
    wanted = [hidden, *student.parameters()]

    def both(outputs, theirs):
        value = mean_over_tokens(rows(name), outputs, None if name == "next-token" else theirs, labels)
        return value, torch.autograd.grad(value * 3, wanted)

    chunks = both(Outputs(embedding=hidden, head=student), Outputs(embedding=other, head=teacher))
    made = both(Outputs(logits=student(hidden)), Outputs(logits=teacher(other)))
    monkeypatch.setattr(chunked, "PLAIN", 2**40)
    plain = both(Outputs(logits=student(hidden)), Outputs(logits=teacher(other)))
    for found in (chunks, made):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_logits_of_a_pending_output_are_never_made_whole():
    student, teacher, hidden, other, labels = models()
    ours, theirs = Outputs(embedding=hidden, head=student), Outputs(embedding=other, head=teacher)
    mean_over_tokens(rows("jsd"), ours, theirs, labels).backward()
    assert ours.pending
    assert theirs.pending


def test_padded_vocabularies_are_cut_to_what_both_have():
    student, teacher, hidden, other, labels = models(theirs=V + 31)
    found = mean_over_tokens(rows("fkl"), Outputs(embedding=hidden, head=student),
                             Outputs(embedding=other, head=teacher), labels)  # fmt: skip
    p, q = teacher(other)[..., :V].log_softmax(-1), student(hidden).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[labels != IGNORE].mean()
    torch.testing.assert_close(found, expected)


def test_tensors_that_a_loss_trains_besides_get_their_gradient():
    student, teacher, hidden, other, labels = models()
    scale = torch.tensor(1.5, requires_grad=True)

    def scaled(s, t, _):
        return functional.forward_kl(s, t * 1.0) * scale

    value = mean_over_tokens(scaled, Outputs(embedding=hidden, head=student), Outputs(embedding=other, head=teacher),
                             labels, parameters=[scale])  # fmt: skip
    value.backward()
    torch.testing.assert_close(scale.grad, value.detach() / scale.detach())


def test_without_any_position_the_loss_and_its_gradient_are_0():
    student, teacher, hidden, other, labels = models()
    nothing = torch.full_like(labels, IGNORE)
    value = mean_over_tokens(rows("fkl"), Outputs(embedding=hidden, head=student),
                             Outputs(embedding=other, head=teacher), nothing)  # fmt: skip
    value.backward()
    assert value == 0
    assert hidden.grad.abs().sum() == 0


def test_a_second_backward_is_refused_rather_than_wrong():
    student, teacher, hidden, other, labels = models()
    value = mean_over_tokens(rows("fkl"), Outputs(embedding=hidden, head=student),
                             Outputs(embedding=other, head=teacher), labels)  # fmt: skip
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        value.backward()


def test_under_autocast_the_gradients_have_the_types_of_what_they_belong_to():
    student, teacher, hidden, other, labels = models()
    with torch.autocast("cpu", torch.bfloat16):
        value = mean_over_tokens(next_token, Outputs(embedding=hidden, head=student), None, labels)
    value.backward()
    exact = F.cross_entropy(student(hidden)[labels != IGNORE], labels[labels != IGNORE])
    assert student.weight.grad.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.02, atol=0.02)


def test_where_no_gradient_is_asked_for_none_is_computed(monkeypatch):
    student, teacher, hidden, other, labels = models()
    outputs = Outputs(embedding=hidden, head=student), Outputs(embedding=other, head=teacher)
    wanted = mean_over_tokens(rows("jsd"), *outputs, labels)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        found = mean_over_tokens(rows("jsd"), *outputs, labels)
    torch.testing.assert_close(found, wanted.detach())
