"""The score, the spaces and the search."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import kendalltau

from kd_diswot import nets
from kd_diswot.functional import batch_similarity, channel_similarity
from kd_diswot.options import CellOptions, CIFARResNetOptions, DisWOTOptions
from kd_diswot.search import Search, best, fitness, initialise, outputs_and_gradient, similarity
from kd_diswot.space import SearchSpace, cell_space, decode_cell, depths_space, encode_cell
from kdcore import Model, Trial
from kdcore.errors import ModelError, RecipeError
from kdcore.models import Labels

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
BOTH = ("semantic", "relation")


def images(size=16, classes=100, channels=3, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(size, channels, side, side, generator=generator),
            "label": torch.randint(classes, (size,), generator=generator)}  # fmt: skip


def resnet(depths, seed=0, width=16, classes=100, channels=3, init="gaussian"):
    torch.manual_seed(seed)
    net = nets.CIFARResNet(depths, width, channels, classes)
    initialise(net, init)
    model = Model(net, labels=Labels(classes), stages=net.stages)
    model.tap("@-1")
    return model


def small(depths=(1, 1, 1), **more):
    return resnet(depths, width=4, classes=5, channels=1, **more)


TAPS = ("layers.2", "layers.2")


# -- the score ---------------------------------------------------------------------------------------------------------


def test_an_identical_network_has_the_score_zero_and_none_has_more():
    batch = images(8, 5, 1, 8)
    assert similarity(small(), small(), batch, TAPS, BOTH) == {"semantic": 0, "relation": 0}
    other = similarity(small(seed=1), small(), batch, TAPS, BOTH)
    assert max(other.values()) < 0


def test_the_order_of_the_batch_does_not_matter():
    batch = images(8, 5, 1, 8)
    turned = {key: value.flip(0) for key, value in batch.items()}
    one, two = (similarity(small(seed=1), small((2, 1, 1)), b, TAPS, BOTH) for b in (batch, turned))
    assert one == pytest.approx(two, rel=1e-4)


def test_scoring_leaves_no_gradients_and_reads_those_of_the_classifier():
    model, batch = small(), images(8, 5, 1, 8)
    outputs, gradient = outputs_and_gradient(model, batch)
    assert all(p.grad is None for p in model.parameters())
    error = outputs.logits.softmax(1) - torch.nn.functional.one_hot(batch["label"], 5)
    torch.testing.assert_close(gradient, error.T @ outputs.embedding / 8)
    again = outputs_and_gradient(small(), batch)[1]
    torch.testing.assert_close(gradient, again)


def test_a_dead_feature_gives_a_zero_and_not_a_nan():
    gradient = torch.randn(5, 8)
    gradient[:, 3] = 0
    assert channel_similarity(gradient, torch.randn(5, 8)).isfinite()
    assert channel_similarity(gradient, gradient) == 0


def test_classifiers_of_different_width_are_refused_but_for_the_relation():
    wide = resnet((1, 1, 1), width=8, classes=5, channels=1)
    with pytest.raises(ModelError, match=r"read 16 and 32 features.*method.terms=\[relation\]"):
        similarity(small(), wide, images(8, 5, 1, 8), TAPS, BOTH)
    assert "relation" in similarity(small(), wide, images(8, 5, 1, 8), TAPS, ("relation",))


shapes = st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 4))


@given(shapes, st.integers(0, 1000))
def test_similarities_are_zero_at_equality_not_negative_and_reach_the_student_only(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    for function in (batch_similarity, channel_similarity):
        assert function(teacher, teacher) == 0
        value = function(student, teacher)
        assert value >= 0
        (gradient,) = torch.autograd.grad(value, [student])
        assert gradient.isfinite().all()
        torch.testing.assert_close(function(3 * student, teacher), value, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden vectors are not here")
def test_the_score_ranks_the_residual_networks_of_the_paper():
    """Space S1, every fourth of its networks, beside accuracies after distillation on CIFAR-100."""
    table = np.load(GOLDEN / "diswot-s1-table-1.npz")
    depths, accuracy = table["in_depths"][::4], table["out_acc_kd"][::4]
    teacher, batch = resnet((9, 9, 9), seed=1), images(seed=1)
    found = [similarity(resnet([int(d) for d in row], seed=2), teacher, batch, TAPS, BOTH) for row in depths]
    taus = {name: kendalltau([scores[name] for scores in found], accuracy)[0] for name in BOTH}
    taus["sum"] = kendalltau([sum(scores.values()) for scores in found], accuracy)[0]
    assert taus["semantic"] > 0.25
    assert taus["relation"] > 0.35
    assert taus["sum"] > 0.25


# -- the spaces --------------------------------------------------------------------------------------------------------


def test_the_spaces_are_those_of_the_paper():
    assert depths_space((1, 3, 5, 7), 3).size == len(set(depths_space((1, 3, 5, 7), 3))) == 64
    assert cell_space().size == 15_625
    found = "|nor_conv_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    assert encode_cell(decode_cell(found)) == found
    assert found in set(cell_space())


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_a_mutation_differs_in_one_position(seed):
    rng, space = random.Random(seed), cell_space()
    arch = space.random(rng)
    changed = [a != b for a, b in zip(decode_cell(arch), decode_cell(space.mutate(arch, rng)), strict=True)]
    assert sum(changed) == 1


@pytest.mark.parametrize(
    ("options", "value", "words"),
    [(CellOptions, "|nor_conv_3x3~0|", "no cell"),
     (CellOptions, encode_cell(["none"] * 6).replace("none", "max"), "no operation of a cell"),
     (CIFARResNetOptions, "5-x-7", "blocks of each stage"), (CIFARResNetOptions, "0-1-1", "blocks of each stage")],
)  # fmt: skip
def test_a_malformed_architecture_is_told(options, value, words):
    with pytest.raises(ValidationError, match=words):
        options(arch=value)


@pytest.mark.parametrize("operations", [["none"] * 6, ["skip_connect"] * 6, ["avg_pool_3x3"] * 6, ["nor_conv_1x1"] * 6])
def test_every_operation_keeps_the_shape(operations):
    net = nets.CellNet(operations, channels=4, cells=1, in_channels=1, num_classes=3)
    out = net(torch.randn(2, 1, 9, 9))
    assert out["logits"].shape == (2, 3)
    assert out["embedding"].shape == (2, 16)


# -- the search --------------------------------------------------------------------------------------------------------


def bits(length=10):
    return SearchSpace((("0", "1"),) * length, "".join, list)


class Ones(Search):
    """Bit strings; the score is the number of ones."""

    def __init__(self, space, **options):
        super().__init__(None, space, DisWOTOptions(**options))


def search(space, seed, **options):
    stage, archive = Ones(space, **options), []
    while (arch := stage.propose(archive, random.Random(f"{seed} {len(archive)}"))) is not None:
        archive.append(Trial(arch, {"score": arch.count("1")}))
    return archive


def test_evolution_finds_the_optimum_more_often_than_random_search():
    found = {}
    for strategy in ("evolution", "random"):
        runs = [search(bits(12), seed, strategy=strategy, budget=150, population=20) for seed in range(6)]
        found[strategy] = sum(best(archive, DisWOTOptions()) == "1" * 12 for archive in runs)
    assert found["evolution"] >= found["random"] + 3


def test_nothing_is_tried_twice_and_a_small_space_is_tried_whole():
    for strategy in ("evolution", "random", "exhaustive"):
        archive = [trial.candidate for trial in search(bits(5), 0, strategy=strategy, budget=1000)]
        assert sorted(archive) == sorted(set(bits(5)))


def test_the_budget_is_kept():
    assert len(search(bits(10), 0, budget=17)) == 17


def test_z_scores_give_both_terms_the_same_say():
    archive = [Trial("a", {"score": -1.0, "semantic": -1.0, "relation": -0.003}),
               Trial("b", {"score": -1.1, "semantic": -1.1, "relation": -0.001}),
               Trial("c", {"score": -1.2, "semantic": -1.2, "relation": -0.002})]  # fmt: skip
    assert best(archive, DisWOTOptions()) == "a"
    assert fitness(archive, DisWOTOptions(normalise=True)) == pytest.approx([0, 1.2247, -1.2247], abs=1e-3)
    assert best(archive, DisWOTOptions(normalise=True)) == "b"


def test_a_space_where_nothing_is_finite_is_told():
    with pytest.raises(RecipeError, match=r"method\.init=default"):
        best([Trial("a", {"score": float("-inf")})], DisWOTOptions())


def test_a_score_that_overflows_can_be_kept_in_the_archive():
    assert json.loads(json.dumps({"score": float("-inf")})) == {"score": float("-inf")}
