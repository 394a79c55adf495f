from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_hierarchical_prune.functional import (
    choose,
    feature_loss,
    output_loss,
    parse_ranges,
    rank,
    score,
    task_loss,
    update_factors,
)
from kdcore.testing import golden

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"
seeds = st.integers(0, 2**31)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_every_function_with_an_adapter_agrees_with_its_golden_vectors():
    cases = list(golden.run(FOLDER, PLUGINS, only="hierarchical-prune"))
    assert cases
    assert [case for case in cases if not case.passed] == []


def tensors(seed, count, *shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_ranges_are_half_open():
    assert parse_ranges("25-29,31-35") == [25, 26, 27, 28, 31, 32, 33, 34]
    assert parse_ranges("13, 15,16") == [13, 15, 16]
    assert parse_ranges("3-5,4") == [3, 4]
    assert parse_ranges("") == []


@pytest.mark.parametrize(
    ("text", "message"), [("3-x", "neither a number"), ("-4", "neither a number"), ("5-5", "half-open"), ("a", "'a'")]
)
def test_wrong_ranges_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ranges(text)


@given(damage=st.floats(1e-3, 10), blocks=st.integers(2, 60))
def test_of_equal_damage_the_later_block_is_pruned_first(damage, blocks):
    scores = [score(damage, i, blocks) for i in range(blocks)]
    assert scores == sorted(scores)
    assert scores[0] == -damage
    flat = {(i, None): damage for i in range(blocks)}
    assert (
        rank(flat, blocks) == rank(flat, blocks, position_weight=False) == [(i, None) for i in reversed(range(blocks))]
    )


def test_position_weight_moves_the_ranking():
    damage = {(0, None): 1.0, (1, None): 1.1, (2, None): 1.3}
    assert rank(damage, 3, position_weight=False)[0] == (0, None)
    assert rank(damage, 3)[0] == (2, None)
    assert rank({(0, "attention"): -0.1, (0, "feed-forward"): 0.2}, 1)[0] == (0, "attention")


@given(seed=seeds, target=st.floats(0.3, 0.99))
def test_choice_is_the_shortest_that_meets_the_target(seed, target):
    sizes = {
        (i, None): int(v)
        for i, v in enumerate(torch.randint(1, 50, (12,), generator=torch.Generator().manual_seed(seed)))
    }
    total = sum(sizes.values()) + 10
    chosen = choose(list(sizes), sizes, total, target)
    left = total - sum(sizes[part] for part in chosen)
    assert left <= target * total
    assert left + sizes[chosen[-1]] > target * total
    with pytest.raises(ValueError, match="leaves"):
        choose(list(sizes)[:1], sizes, total, 1e-3)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_update_factors_fall_with_the_contribution(values):
    parts = {(i, None): value for i, value in enumerate(values)}
    factors = update_factors(parts)
    assert max(factors.values()) == 1.0
    assert min(factors.values()) >= 0
    order = sorted(parts, key=lambda p: abs(parts[p]))
    assert [factors[p] for p in order] == sorted(factors.values(), reverse=True)
    assert update_factors({(0, None): 0.5, (1, None): -1.0}) == {(0, None): 1.0, (1, None): 0.5}
    assert update_factors({}) == {}


@given(seed=seeds, shape=st.sampled_from([(3, 4, 2, 2), (3, 2), (3, 5, 6)]))
def test_losses_match_their_formulas_and_reach_only_the_student(seed, shape):
    student, teacher, clean, noise = tensors(seed, 4, *shape)
    student.requires_grad_()
    teacher.requires_grad_()
    sigma = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    wide = sigma.reshape(-1, *[1] * (len(shape) - 1))
    predicted = (wide * noise + (1 - wide) * clean) - wide * student
    torch.testing.assert_close(task_loss(student, clean, noise, sigma), (predicted - clean).square().mean())
    velocity = (wide.square() * (student - (noise - clean)).square()).mean()
    torch.testing.assert_close(task_loss(student, clean, noise, sigma), velocity, atol=1e-5, rtol=1e-4)
    loss = output_loss(student, teacher)
    torch.testing.assert_close(loss, (student - teacher).square().mean())
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert output_loss(student, student) == 0


@given(seed=seeds)
def test_feature_loss_is_a_sum_over_blocks_and_streams(seed):
    keys = [(4, "img"), (4, "txt"), (7, "img")]
    ours, theirs = (dict(zip(keys, tensors(seed + i, 3, 2, 5, 6), strict=True)) for i in range(2))
    wanted = sum((ours[key] - theirs[key]).square().mean() for key in keys)
    torch.testing.assert_close(feature_loss(ours, theirs, [4, 7]), wanted)
    torch.testing.assert_close(
        feature_loss(ours, theirs, [7], ["img", "txt"]), (ours[7, "img"] - theirs[7, "img"]).square().mean()
    )
    with pytest.raises(ValueError, match="no block among"):
        feature_loss(ours, theirs, [7], ["txt"])


@given(seed=seeds)
def test_weights_belong_to_samples(seed):
    student, teacher = tensors(seed, 2, 3, 4, 5)
    weight = torch.tensor([0.0, 1.0, 2.0])
    each = (student - teacher).square().flatten(1).mean(1)
    torch.testing.assert_close(output_loss(student, teacher, weight), (weight * each).mean())
    found = feature_loss({(0, "img"): student}, {(0, "img"): teacher}, [0], ["img"], weight.reshape(3, 1, 1, 1))
    torch.testing.assert_close(found, (weight * each).mean())


def test_half_precision_is_compared_in_float32():
    student = torch.full((2, 3), 300.0, dtype=torch.float16)
    assert output_loss(student, torch.zeros(2, 3, dtype=torch.float16)) == 90000
    with pytest.raises(ValueError, match="differ in shape"):
        output_loss(student, torch.zeros(2, 4))
