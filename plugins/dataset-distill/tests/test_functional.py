import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_dataset_distill import augment, functional
from kd_dataset_distill.convnet import ConvNet
from kd_dataset_distill.less import project
from kd_dataset_distill.options import CHANGES, AugmentOptions
from kd_dataset_distill.real import PixelSpace
from kdcore.testing import golden

settings.register_profile("dataset-distill", deadline=None, max_examples=20)
settings.load_profile("dataset-distill")
seeds = st.integers(0, 2**31)
WORKSPACE = Path(__file__).parents[3]
VECTORS = WORKSPACE.parent / "shared" / "golden"


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the folder of golden vectors (../shared/golden) is not there")
def test_golden_vectors():
    cases = list(golden.run(VECTORS, WORKSPACE / "plugins", "dataset-distill"))
    assert len(cases) >= 6
    assert [(c.name, c.error, c.note) for c in cases if not c.passed] == []


@given(seed=seeds, metric=st.sampled_from(["ours", "mse", "cos"]))
def test_gradient_distance_is_zero_at_equality_and_reaches_only_the_synthetic_side(seed, metric):
    real = [rand(seed, 4, 3, 3, 3), rand(seed + 1, 4), rand(seed + 2, 5, 4)]
    assert functional.gradient_distance(real, real, metric).item() == pytest.approx(0, abs=1e-4)
    ours = [rand(seed + 3 + i, *g.shape).requires_grad_() for i, g in enumerate(real)]
    distance = functional.gradient_distance(ours, real, metric)
    assert distance > 0.01
    found = torch.autograd.grad(distance, ours, allow_unused=True)
    assert (found[1] is None) == (metric == "ours")


@given(seed=seeds, factor=st.floats(0.1, 10))
def test_layerwise_distance_ignores_the_size_of_gradients_and_counts_rows(seed, factor):
    real, ours = [rand(seed, 6, 10)], [rand(seed + 1, 6, 10)]
    distance = functional.gradient_distance(ours, real)
    torch.testing.assert_close(functional.gradient_distance([factor * ours[0]], real), distance, rtol=1e-4, atol=1e-4)
    rows = sum(1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(ours[0], real[0], strict=True))
    torch.testing.assert_close(distance, rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(functional.gradient_distance([-real[0]], real), torch.tensor(12.0), rtol=1e-4, atol=0)


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="same parameters"):
        functional.gradient_distance([rand(0, 3, 2)], [rand(0, 2, 3)])
    with pytest.raises(ValueError, match="no metric 'l1'"):
        functional.gradient_distance([rand(0, 3)], [rand(1, 3)], "l1")


@given(seed=seeds)
def test_gradient_matching_is_a_sum_over_classes(seed):
    params = {"w": rand(seed, 3, 5).requires_grad_()}
    real, ours = [rand(seed + i, 7, 5) for i in range(3)], [rand(seed + 9 + i, 2, 5).requires_grad_() for i in range(3)]

    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x) @ p["w"].T

    whole = functional.gradient_matching(forward, params, real, ours, [0, 1, 2])
    parts = [functional.gradient_matching(forward, params, [real[c]], [ours[c]], [c]) for c in range(3)]
    torch.testing.assert_close(whole, sum(parts))
    for images, part in zip(torch.autograd.grad(whole, ours), parts, strict=True):
        assert images.abs().sum() > 0
        assert part > 0
    with pytest.raises(RuntimeError):  # neither the network nor the real side is in the graph
        torch.autograd.grad(functional.gradient_matching(forward, params, real, ours, [0, 1, 2]), real)


@given(seed=seeds)
def test_distribution_distance_is_between_means(seed):
    real, ours = rand(seed, 8, 6).requires_grad_(), rand(seed + 1, 2, 6).requires_grad_()
    distance = functional.distribution_distance([real, real], [ours, ours])
    torch.testing.assert_close(distance, 2 * (real.mean(0) - ours.mean(0)).square().sum())
    distance.backward()
    assert real.grad is None
    shifted = ours.detach() - ours.detach().mean(0) + real.detach().mean(0)
    assert functional.distribution_distance([real], [shifted]) < 1e-8


def test_unroll_is_gradient_descent_and_reaches_rate_and_inputs():
    layer, rate = torch.nn.Linear(4, 3), torch.tensor(0.1, requires_grad=True)
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    batches = [(rand(i, 5, 4).requires_grad_(), torch.tensor([0, 1, 2, 0, 1])) for i in range(3)]

    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))

    final = functional.unroll(forward, params, batches, rate)
    plain = torch.optim.SGD(layer.parameters(), lr=0.1)
    for inputs, labels in batches:
        plain.zero_grad()
        F.cross_entropy(layer(inputs.detach()), labels).backward()
        plain.step()
    torch.testing.assert_close(final["weight"], layer.weight)
    start, target = functional.flat(params), rand(7, 15)
    loss = functional.trajectory_distance(functional.flat(final), start, target)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, [rate, *(x for x, _ in batches)]))
    assert functional.trajectory_distance(start, start, target).item() == pytest.approx(1)
    assert functional.trajectory_distance(target, start, target) == 0


def test_minibatches_come_from_the_last_chunk_and_cover_everything():
    found = functional.minibatches(10, 4, torch.Generator().manual_seed(3))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    first = [next(found) for _ in range(3)]
    assert torch.equal(torch.cat(first[::-1]), order)
    assert [len(rows) for rows in first] == [2, 4, 4]
    assert sorted(torch.cat([next(found) for _ in range(3)]).tolist()) == list(range(10))


@given(seed=seeds, tau=st.floats(0.2, 5))
def test_weights_of_texts_sum_to_one_and_are_how_gradient_reaches_the_generator(seed, tau):
    losses, params = rand(seed, 6).requires_grad_(), [rand(seed + 1, 4).requires_grad_()]
    weights = functional.generation_weights(losses, tau)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert weights.argmax() == losses.argmin()
    inputs = rand(seed + 2, 6, 4)
    found = functional.weighted_gradient((inputs @ params[0]).square(), weights, params)
    by_hand = (weights[:, None] * 2 * (inputs @ params[0])[:, None] * inputs).sum(0)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(found.sum(), losses)[0].abs().sum() > 0
    equal = functional.weighted_gradient((inputs @ params[0]).square(), torch.full((6,), 1 / 6), params)
    assert not torch.autograd.grad(equal.sum() + 0 * losses.sum(), losses)[0].any()


def test_generation_loss_does_not_depend_on_padding_unless_asked():
    logits, labels = rand(0, 2, 5, 7), torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))
    labels[1, 3:] = -100
    wide, padded = torch.cat([logits, rand(1, 2, 3, 7)], 1), F.pad(labels, (0, 3), value=-100)
    own = functional.generation_loss(logits, labels)
    torch.testing.assert_close(functional.generation_loss(wide, padded), own)
    torch.testing.assert_close(own[1], F.cross_entropy(logits[1, :3], labels[1, :3]))
    assert (functional.generation_loss(wide, padded, padded=True) < own).all()


@given(seed=seeds)
def test_herding_comes_nearer_to_the_mean_than_chance(seed):
    points = rand(seed, 60, 8)
    chosen = functional.herding(points, 5)
    assert len(set(chosen.tolist())) == 5
    chance = [points[torch.randperm(60)[:5]].mean(0) - points.mean(0) for _ in range(20)]
    assert (points[chosen].mean(0) - points.mean(0)).norm() < sum(gap.norm() for gap in chance) / 20
    assert sorted(functional.herding(points[:6], 6).tolist()) == list(range(6))


def test_k_centers_takes_one_sample_of_each_cluster():
    centres = 10 * rand(0, 4, 5)
    points = (centres[torch.arange(40) % 4] + 0.1 * rand(1, 40, 5)).float()
    assert sorted(i % 4 for i in functional.k_centers(points, 4, 0).tolist()) == [0, 1, 2, 3]
    alike = torch.zeros(6, 3)
    assert len(set(functional.k_centers(alike, 4, 0).tolist())) == 4
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="of 6 samples cannot be chosen"):
            functional.k_centers(alike, wrong)


def test_influence_is_the_best_subtask_and_weights_are_brought_to_one():
    train, target = F.normalize(rand(0, 2, 5, 6), dim=2), F.normalize(rand(1, 2, 4, 6), dim=2)
    tasks = torch.tensor([0, 1, 1, 0])
    scores = functional.influence(train, target, [1.0, 3.0], tasks)
    both = 0.25 * train[0] @ target[0].T + 0.75 * train[1] @ target[1].T
    by_hand = torch.stack([both[:, [0, 3]].mean(1), both[:, [1, 2]].mean(1)]).amax(0)
    torch.testing.assert_close(scores, by_hand)


def test_dropping_the_most_influential_hurts_more_than_dropping_at_random():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(10, generator=generator)
    x, goal = torch.randn(300, 10, generator=generator), torch.randn(100, 10, generator=generator)
    y, wanted = (x @ truth > 0).float(), (goal @ truth > 0).float()
    y[:150] = 1 - y[:150]  # half of the labels work against the target
    weight = 0.1 * torch.randn(10, generator=generator)

    def gradients(inputs: Tensor, labels: Tensor) -> Tensor:
        return ((inputs @ weight).sigmoid() - labels)[:, None] * inputs

    features = functional.adam_direction(gradients(x, y), torch.zeros(10), 0.01 * torch.ones(10))
    scores = functional.influence(F.normalize(features)[None], F.normalize(gradients(goal, wanted))[None], [1.0],
                                  torch.zeros(100))  # fmt: skip

    def loss_without(dropped: Tensor) -> float:
        kept = torch.ones(300, dtype=torch.bool)
        kept[dropped] = False
        w = weight.clone().requires_grad_()
        for _ in range(50):
            loss = F.binary_cross_entropy_with_logits(x[kept] @ w, y[kept])
            w = (w - 0.5 * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
        return F.binary_cross_entropy_with_logits(goal @ w, wanted).item()

    best = loss_without(scores.topk(30).indices)
    chance = [loss_without(torch.randperm(300, generator=generator)[:30]) for _ in range(5)]
    assert best > max(chance)


def test_projection_keeps_angles_and_does_not_depend_on_the_blocks(monkeypatch):
    vectors = rand(0, 4, 3000)
    found = project(vectors, 1500, seed=1)
    assert found.shape == (4, 1500)
    torch.testing.assert_close(F.cosine_similarity(found[0], found[1], dim=0),
                               F.cosine_similarity(vectors[0], vectors[1], dim=0), atol=0.1, rtol=0)  # fmt: skip
    torch.testing.assert_close(
        found[2] + found[3], project(vectors[2:3] + vectors[3:], 1500, seed=1)[0], rtol=1e-3, atol=1e-3
    )
    assert project(vectors, 3000, seed=1) is vectors


@pytest.mark.parametrize("name", CHANGES)
def test_changes_keep_shape_pass_gradient_and_are_the_same_on_both_sides(name):
    images = rand(0, 5, 3, 12, 10).requires_grad_()
    change = augment.draw(AugmentOptions(strategy=name), torch.Generator().manual_seed(1))
    changed = change(images)
    assert changed.shape == images.shape
    assert torch.autograd.grad(changed.square().sum(), images)[0].isfinite().all()
    for i in range(5):
        torch.testing.assert_close(changed[i : i + 1], change(images[i : i + 1]))
    single = augment.draw(AugmentOptions(strategy=name), torch.Generator().manual_seed(1), 5)
    assert single.numbers.shape == (5, 3)
    single(images).sum().backward()
    assert images.grad.abs().sum() > 0


def numbers(*values: float) -> Tensor:
    return torch.tensor([values])


def test_changes_do_what_their_names_say():
    images, o = rand(0, 1, 2, 8, 8), AugmentOptions(cutout=0.5, crop_pad=0.25, scale=1.0)
    torch.testing.assert_close(augment.flip(images, numbers(0.2, 0, 0), o), images.flip(3))
    torch.testing.assert_close(augment.flip(images, numbers(0.8, 0, 0), o), images)
    torch.testing.assert_close(augment.scale(images, numbers(0.3, 0.9, 0), o), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(augment.rotate(images, numbers(0.5, 0, 0), o), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(augment.crop(images, numbers(0.5, 0.5, 0), o), images)
    moved = augment.crop(images, numbers(0.99, 0.5, 0), o)  # by two rows
    torch.testing.assert_close(moved[:, :, :6], images[:, :, 2:])
    assert not moved[:, :, 6:].any()
    assert (augment.cutout(images, numbers(0.5, 0.5, 0), o) == 0).sum() == 2 * 16
    plain = AugmentOptions(brightness=0, contrast=1)
    torch.testing.assert_close(augment.color(images, numbers(0.5, 0.5, 0), plain), images, atol=1e-5, rtol=1e-5)


def test_flat_and_unflat_are_inverse():
    params = {"a": rand(0, 2, 3), "b": rand(1, 4)}
    again = functional.unflat(functional.flat(params), params)
    assert all(torch.equal(again[name], value) for name, value in params.items())


@pytest.mark.parametrize("zca", [False, True])
def test_pixel_space_and_back(zca):
    images = (
        torch.rand(50, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.2])[:, None, None]
    )
    space = PixelSpace(images, zca)
    pixels = space(images)
    torch.testing.assert_close(space.inverse(pixels), images, atol=1e-4, rtol=1e-4)
    if not zca:
        torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
        return
    torch.testing.assert_close(pixels.flatten(1).mean(0), torch.zeros(50), atol=1e-4, rtol=0)
    spread = torch.linalg.eigvalsh(images.flatten(1).T.cov().double())
    expected = (spread / (spread + 0.1)).sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(pixels.flatten(1).T.cov().double()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("channels", "side", "depth", "width"), [(1, 28, 3, 6 * 16), (3, 32, 3, 6 * 16), (2, 8, 2, 6 * 4)]
)
def test_convnet_gives_the_flattened_features(channels, side, depth, width):
    net = ConvNet(channels, (side, side), 4, width=6, depth=depth)
    out = net(rand(0, 2, channels, side, side))
    assert out["embedding"].shape == (2, width)
    assert out["logits"].shape == (2, 4)
    torch.testing.assert_close(net.classifier(out["embedding"]), out["logits"])


def test_convnet_standardises_images_and_names_its_norms():
    plain, scaled = (ConvNet(1, (8, 8), 3, 4, 2, norm, 0.5, std) for norm, std in (("none", 1.0), ("none", 0.25)))
    scaled.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(scaled(images)["logits"], plain((images - 0.5) / 0.25 + 0.5)["logits"])
    kinds = {
        norm: {type(m).__name__ for m in ConvNet(1, (8, 8), 3, 4, 2, norm).modules()} for norm in ("instance", "batch")
    }
    assert "GroupNorm" in kinds["instance"]
    assert "BatchNorm2d" in kinds["batch"]
    with pytest.raises(ValueError, match="too small for 4 blocks"):
        ConvNet(3, (8, 8), 3, depth=4)
    assert math.isfinite(plain(images)["logits"].sum().item())
