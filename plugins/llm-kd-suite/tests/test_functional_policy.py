"""Policy gradients and preferences: sampled tokens, their rewards, and rankings of answers."""

import math

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


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(seed: int, rows: int, tokens: int) -> Tensor:
    """Responses of different lengths, each of one token at least."""
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(tokens) < lengths).long()


def labels_of(seed: int, *shape: int) -> Tensor:
    labels = torch.randint(-2, 7, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(labels < 0, -100, labels)


# Log-probabilities of tokens


@few
@given(seed=seeds)
def test_token_logprobs_are_those_of_the_log_softmax(seed):
    logits, labels = draw(seed, 3, 4, 7).mul(5).requires_grad_(), labels_of(seed, 3, 4)
    found, weights = fn.token_logprobs(logits, labels), draw(seed + 1, 3, 4)
    wanted = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((values * weights).sum(), logits)[0] for values in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_token_logprobs_are_the_same_in_blocks_and_in_half_precision(monkeypatch):
    logits, labels = draw(1, 9, 7).requires_grad_(), labels_of(1, 9)
    whole = fn.token_logprobs(logits, labels)
    (gradient,) = torch.autograd.grad(whole.sum(), logits)
    monkeypatch.setattr(divergences, "CACHED", 15)
    parts = fn.token_logprobs(logits, labels)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), logits)[0], gradient)
    half = logits.detach().bfloat16().requires_grad_()
    found = fn.token_logprobs(half, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, fn.token_logprobs(half.float(), labels))
    assert torch.autograd.grad(found.sum(), half)[0].dtype == torch.bfloat16


def test_token_logprobs_bear_masked_classes_and_ignored_nan():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [math.nan] * 3], requires_grad=True)
    found = fn.token_logprobs(logits, torch.tensor([2, -100]))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([-math.log(1 + math.exp(-1)), 0.0]))
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need labels of shape"):
        fn.token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


# MiniLLM


@few
@given(seed=seeds)
def test_single_step_regulariser_is_the_exact_reverse_kl_inside_of_the_mask(seed):
    student, teacher, mask = draw(seed, 3, 5, 7).requires_grad_(), draw(seed + 1, 3, 5, 7), mask_of(seed, 3, 5)
    found = fn.single_step_regulariser(student, teacher, mask, temperature=2.0)
    torch.testing.assert_close(found, fn.reverse_kl(student, teacher, temperature=2.0) * mask)
    found.sum().backward()
    assert (student.grad[mask == 0] == 0).all()


def test_rewards_are_scaled_then_clipped_and_carry_no_gradient():
    student, teacher = torch.tensor([-1.0, -90.0], requires_grad=True), torch.tensor([-2.0, -1.0])
    found = fn.rewards(student, teacher)
    torch.testing.assert_close(found, torch.tensor([-2.0, 100.0]))
    assert not found.requires_grad
    torch.testing.assert_close(fn.rewards(student, teacher, scaling=1, clip=math.inf), torch.tensor([-1.0, 89.0]))


@few
@given(seed=seeds, gamma=st.floats(0, 1), length_norm=st.booleans())
def test_returns_are_discounted_sums_of_what_is_to_come(seed, gamma, length_norm):
    rewards, mask = draw(seed, 3, 6), mask_of(seed, 3, 6)
    found = fn.returns(rewards.masked_fill(mask == 0, math.nan), mask, gamma=gamma, length_norm=length_norm)
    for row in range(3):
        size = int(mask[row].sum())
        for t in range(6):
            weights = [gamma**k for k in range(size - t)]
            wanted = sum(w * rewards[row, t + k].item() for k, w in enumerate(weights)) if t < size else 0.0
            if length_norm and t < size:
                wanted /= sum(weights)
            assert found[row, t].item() == pytest.approx(wanted, abs=1e-4)


def test_returns_of_long_responses_do_not_underflow():
    found = fn.returns(torch.ones(1, 4000), torch.ones(1, 4000), gamma=0.5, length_norm=False)
    torch.testing.assert_close(found[0, :3900], torch.full((3900,), 2.0))


def test_normalised_returns_of_equal_rewards_do_not_depend_on_the_length():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(fn.returns(torch.ones(2, 4), mask), mask.float())


@few
@given(seed=seeds)
def test_whitened_values_have_zero_mean_and_unit_variance_inside_of_the_mask(seed):
    mask = mask_of(seed, 4, 6)
    mask[0] = 1
    found = fn.whiten(5 + 3 * draw(seed, 4, 6), mask)
    inside = found[mask == 1]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (found[mask == 0] == 0).all()


def test_a_single_value_is_whitened_to_zero():
    assert fn.whiten(torch.tensor([[3.0, 7.0]]), torch.tensor([[1, 0]])).abs().sum() == 0


def test_advantages_carry_no_gradient_and_ignore_what_is_outside_of_the_mask():
    student, teacher, mask = draw(1, 3, 6).requires_grad_(), draw(2, 3, 6), mask_of(3, 3, 6)
    found = fn.advantages(student, teacher, mask)
    assert not found.requires_grad
    other = torch.where(mask.bool(), student, 50.0)
    torch.testing.assert_close(fn.advantages(other, teacher, mask), found)
    raw = fn.advantages(student, teacher, mask, whitened=False)
    torch.testing.assert_close(fn.whiten(raw, mask), found)
    torch.testing.assert_close(raw, fn.returns(fn.rewards(student, teacher), mask))


def test_on_the_policy_that_sampled_the_loss_has_the_policy_gradient():
    logprobs, advantages, mask = draw(4, 3, 5).requires_grad_(), draw(5, 3, 5), mask_of(6, 3, 5)
    fn.clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask).backward()
    torch.testing.assert_close(logprobs.grad, -advantages * mask / mask.sum())


@pytest.mark.parametrize(("ratio", "advantage", "moves"), [(1.3, 1, 0), (1.3, -1, 1), (0.7, 1, 1), (0.7, -1, 0)])
def test_ratios_are_clipped_only_where_they_have_gone_far_enough(ratio, advantage, moves):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss = fn.clipped_policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one, cliprange=0.2)
    loss.backward()
    wanted = ratio if moves else min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-advantage * wanted)
    assert (logprobs.grad.item() != 0) == bool(moves)


def test_importance_multiplies_the_ratio_before_it_is_clipped():
    one = torch.ones(1, 1)
    loss = fn.clipped_policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), one, one, importance=1.5 * one)
    assert loss.item() == pytest.approx(-1.2)


def test_overflow_outside_of_the_mask_does_not_spoil_the_gradient():
    logprobs, mask = torch.tensor([[0.0, 500.0]], requires_grad=True), torch.tensor([[1, 0]])
    loss = fn.clipped_policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), mask)
    loss.backward()
    assert loss.item() == -1
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 0.0]]))


def test_policy_loss_of_an_empty_mask_is_zero():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    fn.clipped_policy_loss(logprobs, logprobs, torch.ones(1, 2), torch.zeros(1, 2)).backward()
    assert (logprobs.grad == 0).all()


# Reinforcement by a reward model


def test_reinforce_raises_what_is_rewarded_above_the_mean_and_lowers_the_rest():
    logprobs, mask = torch.full((3, 4), -1.0, requires_grad=True), torch.tensor([[1, 1, 0, 0]] * 3)
    fn.reinforce(logprobs, logprobs.detach(), torch.tensor([3.0, 0.0, 0.0]), mask).backward()
    torch.testing.assert_close(logprobs.grad[:, 0], torch.tensor([-2.0, 1.0, 1.0]) / 3)
    assert (logprobs.grad[:, 2:] == 0).all()


def test_reinforce_holds_the_policy_to_the_reference():
    logprobs, reference = torch.full((2, 2), -1.0, requires_grad=True), torch.tensor([[-3.0, -3.0], [-1.0, -1.0]])
    mask = torch.ones(2, 2)
    fn.reinforce(logprobs, reference, torch.zeros(2), mask, beta=0.5).backward()
    # the first response is 4 nats above the reference: its return is -2, the mean is -1
    torch.testing.assert_close(logprobs.grad, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) / 2)


def test_reinforce_finds_the_best_action():
    logits, reward = torch.zeros(4, requires_grad=True), torch.tensor([0.0, 1.0, 0.2, 0.1])
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam([logits], lr=0.1)
    for _ in range(80):
        actions = torch.multinomial(logits.detach().softmax(0), 32, replacement=True, generator=generator)
        logprobs = logits.log_softmax(0)[actions].unsqueeze(1)
        optimizer.zero_grad()
        uniform = torch.full_like(logprobs, -math.log(4))
        fn.reinforce(logprobs, uniform, reward[actions], torch.ones(32, 1), beta=0.05).backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.8


def test_reward_model_prefers_the_chosen_answer():
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3)
    loss = fn.reward_model_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert (chosen.grad < 0).all()
    assert fn.reward_model_loss(chosen + 1, rejected) < loss < fn.reward_model_loss(chosen - 1, rejected)


# Preferences


def test_sequences_are_sums_over_the_tokens_that_count():
    logits, labels = draw(7, 2, 3, 5, 7), labels_of(8, 2, 3, 5)
    sums, counts = fn.sequence_logprobs(logits, labels)
    each = fn.token_logprobs(logits, labels)
    torch.testing.assert_close(sums, each.sum(-1))
    assert counts.tolist() == (labels != -100).sum(-1).tolist()
    longer = F.pad(logits, (0, 0, 0, 2)), F.pad(labels, (0, 2), value=-100)
    torch.testing.assert_close(fn.sequence_logprobs(*longer)[0], sums)


@few
@given(seed=seeds, beta=st.floats(0.01, 1))
def test_dpo_is_the_log_sigmoid_of_the_summed_margin(seed, beta):
    sums = draw(seed, 4, 5).requires_grad_()
    loss = fn.dpo(*sums, beta=beta)
    margin = (sums[0] - sums[2]) - (sums[1] - sums[3])
    torch.testing.assert_close(loss, torch.log1p((-beta * margin).exp()).mean(), atol=1e-6, rtol=1e-5)
    loss.backward()
    assert (sums.grad[0] < 0).all()
    assert (sums.grad[1] > 0).all()
    assert (sums.grad[2:] == 0).all()


def test_dpo_of_the_reference_itself_is_log_two():
    sums = draw(9, 2, 5)
    assert fn.dpo(sums[0], sums[1], sums[0], sums[1]).item() == pytest.approx(math.log(2))


def test_dpo_uses_sums_so_that_longer_answers_move_its_margin_further():
    logits = torch.zeros(2, 6, 5)
    logits[..., 0] = 1.0
    short = torch.tensor([[0, -100, -100, -100, -100, -100]] * 2)
    long = torch.zeros(2, 6, dtype=torch.long)
    (one, _), (six, counts) = (fn.sequence_logprobs(logits, labels) for labels in (short, long))
    torch.testing.assert_close(six, 6 * one)
    assert counts.tolist() == [6, 6]


def test_rrhf_counts_only_the_pairs_in_wrong_order():
    assert fn.rrhf(torch.tensor([[-1.0, -2.0, -3.0]])).item() == 0
    assert fn.rrhf(torch.tensor([[-3.0, -1.0, -2.0]])).item() == pytest.approx(2 + 1)
    both = fn.rrhf(torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]]))
    assert both.item() == pytest.approx(1.5)


@few
@given(seed=seeds)
def test_pro_is_a_cross_entropy_of_each_answer_against_the_worse_ones(seed):
    scores = draw(seed, 3, 4).mul(3)
    wanted = sum(
        F.cross_entropy(scores[:, k:], torch.zeros(3, dtype=torch.long)) for k in range(3)
    )  # fmt: skip
    torch.testing.assert_close(fn.pro(scores), wanted)


@pytest.mark.parametrize("loss", [fn.rrhf, fn.pro])
def test_descending_the_ranking_losses_puts_the_answers_in_order(loss):
    scores = torch.tensor([[-3.0, -2.0, -1.0]], requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=0.2)
    before = loss(scores).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(scores).backward()
        optimizer.step()
    assert loss(scores).item() < before
    first, second, third = scores[0].tolist()
    assert first >= second - 0.3 >= third - 0.6
    assert first > -3


@pytest.mark.parametrize("loss", [fn.rrhf, fn.pro])
def test_ranking_losses_do_not_see_the_level_or_the_order_of_prompts(loss):
    scores = draw(10, 4, 3)
    torch.testing.assert_close(loss(scores + 5), loss(scores), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(scores.flip(0)), loss(scores))


def test_best_nll_is_the_mean_over_the_tokens_of_the_best_answers():
    sums = torch.tensor([[-6.0, -99.0], [-2.0, -99.0]], requires_grad=True)
    loss = fn.best_nll(sums, torch.tensor([[3, 1], [1, 1]]))
    loss.backward()
    assert loss.item() == 2
    assert (sums.grad[:, 1] == 0).all()


PAIR = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.rewards(PAIR, PAIR, scaling=0), "scaling must be positive"),
        (lambda: fn.rewards(PAIR, PAIR, clip=-1), "clip must be positive"),
        (lambda: fn.returns(PAIR, PAIR, gamma=1.1), "gamma must lie in"),
        (lambda: fn.whiten(PAIR, PAIR[:1]), "must have"),
        (lambda: fn.clipped_policy_loss(PAIR, PAIR, PAIR, PAIR, cliprange=0), "cliprange must be positive"),
        (lambda: fn.reinforce(PAIR, PAIR, PAIR[:, 0], PAIR, beta=-1), "beta must be at least 0"),
        (lambda: fn.reinforce(PAIR, PAIR[:1], PAIR[:, 0], PAIR), "reference's log-probabilities have shape"),
        (lambda: fn.reinforce(PAIR, PAIR, PAIR, PAIR), "rewards have shape"),
        (lambda: fn.reward_model_loss(PAIR, PAIR[:1]), "rejected rewards have shape"),
        (lambda: fn.dpo(PAIR, PAIR, PAIR, PAIR, beta=0), "beta must be positive"),
        (lambda: fn.dpo(PAIR, PAIR, PAIR, PAIR[:1]), "one shape"),
        (lambda: fn.rrhf(PAIR[:, :1]), "at least two answers"),
        (lambda: fn.pro(PAIR[0]), "at least two answers"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()
