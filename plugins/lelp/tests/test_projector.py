import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from kd_lelp.functional import (
    as_class_logits,
    class_logits,
    grouped_log_probs,
    lelp,
    pseudo_subclass_targets,
)
from kd_lelp.projector import SubclassProjector, project_out, random_directions, row_space_basis

settings.register_profile("plugin", deadline=None, max_examples=20)
settings.load_profile("plugin")

BLOBS, DIM, SUBCLASSES = 8, 20, 4
seeds = st.integers(0, 2**31)


def train(net: nn.Module, steps: int, loss_of_output, inputs: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of_output(net(inputs)).backward()
        optimizer.step()
    return net.eval()


class Task:
    """Eight blobs, the binary label is the parity of the blob; a trained teacher 20-64-32-2."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        centres = 1.5 * torch.randn(BLOBS, DIM)
        self.blob = torch.randint(BLOBS, (800,))
        self.x = centres[self.blob] + 0.7 * torch.randn(800, DIM)
        self.y = self.blob % 2
        self.body = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 2)
        teacher = nn.Sequential(self.body, self.head)
        train(teacher, 200, lambda logits: F.cross_entropy(logits, self.y[:400]), self.x[:400])
        with torch.no_grad():
            self.embedding = self.body(self.x)
            self.logits = self.head(self.embedding)
        assert (self.logits.argmax(1) == self.y)[:400].all()

    def fit(self, **options) -> SubclassProjector:
        options = {"num_subclasses": SUBCLASSES} | options
        half = self.embedding[:400], self.logits[:400], self.y[:400]
        return SubclassProjector.fit(*half, self.head.weight, **options)


@pytest.fixture(scope="module", params=range(4))
def task(request) -> Task:
    return Task(request.param)


@pytest.fixture(scope="module")
def one_task() -> Task:
    return Task(0)


@given(seed=seeds, classes=st.integers(1, 5), size=st.integers(1, 5), tau=st.floats(0.3, 5), beta=st.floats(0.1, 5))
def test_targets_split_the_class_probabilities(seed, classes, size, tau, beta):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(7, classes, generator=generator)
    subclasses = torch.randn(7, max(classes, 2), size, generator=generator)
    targets = pseudo_subclass_targets(logits, subclasses, tau=tau, beta=beta).unflatten(1, (-1, size))
    expected = (as_class_logits(logits) / tau).softmax(1)
    torch.testing.assert_close(targets.sum(2), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(targets / expected.unsqueeze(2), (subclasses / beta).softmax(2), atol=1e-5, rtol=1e-4)


def test_single_output_head_means_the_sigmoid():
    logits = torch.tensor([[-2.0], [0.5]])
    torch.testing.assert_close(as_class_logits(logits).softmax(1)[:, 1:], logits.sigmoid())


def test_projected_targets_sum_to_the_teacher(task):
    targets = task.fit()(task.embedding, task.logits, tau=2.0)
    sums = targets.unflatten(1, (2, SUBCLASSES)).sum(2)
    torch.testing.assert_close(sums, (task.logits / 2.0).softmax(1), atol=1e-6, rtol=0)
    assert not targets.requires_grad


def test_subclasses_find_the_hidden_blobs(task):
    """Mean over the classes of the mutual information with the blobs, on data not fitted on."""
    generator = torch.Generator().manual_seed(0)
    assigned = task.fit()(task.embedding, task.logits).unflatten(1, (2, SUBCLASSES)).argmax(2)
    found, shuffled = [], []
    for label in range(2):
        members = (task.y == label).nonzero()[:, 0]
        members = members[members >= 400]
        guess, truth = assigned[members, label], task.blob[members]
        order = torch.randperm(len(guess), generator=generator)
        found.append(normalized_mutual_info_score(truth, guess))
        shuffled.append(normalized_mutual_info_score(truth, guess[order]))
    assert sum(found) / 2 > 0.3
    assert sum(shuffled) / 2 < 0.05


def test_rotation_evens_out_the_deviations(task):
    spread = {}
    for rotation in ("none", "random"):
        projections = task.fit(rotation=rotation).subclass_logits(task.embedding)
        spread[rotation] = 1.0
        for label in range(2):
            deviation = projections[task.y == label, label].std(0)
            spread[rotation] *= (deviation.max() / deviation.min()).item()
    assert spread["random"] < spread["none"]


def test_head_reads_nothing_of_the_directions(task):
    projector = task.fit()
    hidden = project_out(task.embedding, row_space_basis(task.head.weight).float())
    torch.testing.assert_close(projector.subclass_logits(hidden), projector.subclass_logits(task.embedding))
    assert (hidden @ task.head.weight.T).abs().max() < 1e-4
    assert (projector.directions @ task.head.weight.T).abs().max() < 1e-4
    assert hidden.norm() > 0.1 * task.embedding.norm()
    without = task.fit(null_space=False)
    assert (without.directions @ task.head.weight.T).abs().max() > 0.1


def test_one_subclass_is_plain_distillation(one_task):
    tau = 2.0
    targets = one_task.fit(num_subclasses=1)(one_task.embedding, one_task.logits, tau=tau)
    teacher = (one_task.logits / tau).softmax(1)
    torch.testing.assert_close(targets, teacher, atol=1e-6, rtol=1e-5)
    student = torch.randn(800, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = lelp(student, targets, num_classes=2, tau=tau)
    entropy = -(teacher * teacher.log()).sum(1).mean()
    plain = tau**2 * F.kl_div((student / tau).log_softmax(1), teacher, reduction="batchmean")
    torch.testing.assert_close(loss, plain + tau**2 * entropy)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, plain)))


def probe_accuracy(task: Task, outputs: int, targets: Tensor, init: int) -> float:
    """How well a least-squares classifier reads the hidden blob off the layer below the student's head."""
    torch.manual_seed(init)
    body = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    student = nn.Sequential(body, nn.Linear(8, outputs))
    train(student, 300, lambda logits: lelp(logits, targets[:200], num_classes=2), task.x[:200])
    with torch.no_grad():
        hidden = body(task.x).numpy()
    probe = RidgeClassifier(alpha=1e-3, solver="svd").fit(hidden[:400], task.blob[:400])
    return probe.score(hidden[400:], task.blob[400:])


def test_student_learns_the_hidden_structure():
    gains = []
    for seed in range(3):
        task = Task(seed)
        targets, plain = task.fit()(task.embedding, task.logits), task.logits.softmax(1)
        for init in (100, 101):
            gains.append(probe_accuracy(task, 2 * SUBCLASSES, targets, init) - probe_accuracy(task, 2, plain, init))
    assert sum(gains) / len(gains) > 0.03


@pytest.mark.parametrize("directions", ["pca", "random", "kmeans"])
@pytest.mark.parametrize("scale", ["class_std", "per_direction", "none"])
def test_directions_and_scales(one_task, directions, scale):
    projector = one_task.fit(directions=directions, scale=scale)
    found = projector.directions
    torch.testing.assert_close(found.norm(dim=2), torch.ones(2, SUBCLASSES))
    if directions != "kmeans":
        torch.testing.assert_close(found @ found.mT, torch.eye(SUBCLASSES).expand(2, -1, -1), atol=1e-5, rtol=0)
    projections = projector.subclass_logits(one_task.embedding[:400])
    for label in range(2):
        own = projections[one_task.y[:400] == label, label]
        torch.testing.assert_close(own.mean(0), torch.zeros(SUBCLASSES), atol=1e-4, rtol=0)
        squares = own.square().mean(0)
        if scale == "class_std":
            torch.testing.assert_close(squares.mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
            assert (projector.scale[label] == projector.scale[label, 0]).all()
            assert squares.max() > 1.1
        elif scale == "per_direction":
            torch.testing.assert_close(squares, torch.ones(SUBCLASSES), atol=1e-3, rtol=0)
        else:
            assert (projector.scale == 1).all()


def test_principal_directions_have_the_largest_variance(one_task):
    pca, random = (
        one_task.fit(directions=kind, scale="none").subclass_logits(one_task.embedding) for kind in ("pca", "random")
    )
    for label in range(2):
        members = one_task.y == label
        assert pca[members, label].var(0).sum() > 2 * random[members, label].var(0).sum()


def test_cluster_directions_point_at_the_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(6, 10, generator=generator)
    cluster = torch.arange(120) % 6
    embedding = centres[cluster] + 0.1 * torch.randn(120, 10, generator=generator)
    logits = F.one_hot(cluster // 3, 2).float()
    options = {"num_subclasses": 3, "null_space": False, "directions": "kmeans"}
    projector = SubclassProjector.fit(embedding, logits, None, None, **options)
    for index, centre in enumerate(centres):
        towards = centre - projector.mean[index // 3]
        assert F.cosine_similarity(projector.directions[index // 3], towards[None]).max() > 0.99


def test_same_seed_same_targets_and_a_saved_projector_gives_them_too(one_task):
    first, again, other = (one_task.fit(seed=seed, max_fit_samples=300) for seed in (3, 3, 4))
    expected = first(one_task.embedding, one_task.logits)
    assert torch.equal(again(one_task.embedding, one_task.logits), expected)
    assert not torch.allclose(other(one_task.embedding, one_task.logits), expected, atol=1e-2)
    restored = SubclassProjector(2, 32, SUBCLASSES)
    restored.load_state_dict(first.state_dict())
    assert torch.equal(restored(one_task.embedding, one_task.logits), expected)
    assert not list(first.parameters())


def test_fit_uses_at_most_the_given_number_of_samples(one_task):
    projector = one_task.fit(max_fit_samples=40, seed=5)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(5))[:40]
    hidden = project_out(one_task.embedding[rows], row_space_basis(one_task.head.weight).float())
    torch.testing.assert_close(projector.mean[0], hidden[one_task.y[rows] == 0].mean(0), atol=1e-4, rtol=1e-4)


def test_class_source(one_task):
    embedding, logits, weight = one_task.embedding, one_task.logits, one_task.head.weight
    wrong = 1 - logits.argmax(1)

    def mean(labels, **options):
        return SubclassProjector.fit(embedding, logits, labels, weight, **options).mean

    by_teacher = mean(None)
    torch.testing.assert_close(mean(wrong), by_teacher.flip(0))
    torch.testing.assert_close(mean(wrong, class_source="teacher"), by_teacher)
    torch.testing.assert_close(mean(torch.full_like(wrong, -100)), by_teacher)


def test_small_class_is_padded_and_the_log_says_so(one_task, caplog):
    labels = torch.zeros(400, dtype=torch.long)
    labels[:3] = 1
    with caplog.at_level(logging.WARNING):
        projector = SubclassProjector.fit(one_task.embedding[:400], one_task.logits[:400], labels, one_task.head.weight)
    assert "class 1: 3 samples give only 2 of 4 directions" in caplog.text
    assert "class 0" not in caplog.text
    found = projector.directions[1]
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-5, rtol=0)
    assert (found @ one_task.head.weight.T).abs().max() < 1e-4


@pytest.mark.parametrize("directions", ["pca", "kmeans"])
@pytest.mark.parametrize("scale", ["class_std", "per_direction"])
def test_classes_without_spread_or_samples_give_finite_targets(directions, scale):
    embedding = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    embedding[10:20] = embedding[10]
    labels = torch.arange(30) // 10
    labels[20:] = 0
    head = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    options = {"num_subclasses": 2, "directions": directions, "scale": scale}
    projector = SubclassProjector.fit(embedding, embedding @ head.T, labels, head, **options)
    assert projector(embedding, embedding @ head.T).isfinite().all()
    assert projector.subclass_logits(embedding).abs().max() < 100


def test_null_space_too_small_for_all_subclasses(caplog):
    embedding = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    head = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        projector = SubclassProjector.fit(embedding, embedding @ head.T, None, head, num_subclasses=4)
    assert projector.num_subclasses == 2
    assert projector(embedding, embedding @ head.T).shape == (50, 6)
    assert "2 dimensions are left for 4 subclasses" in caplog.text


def test_trivial_null_space_is_skipped(caplog):
    embedding = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        projector = SubclassProjector.fit(embedding, embedding @ head.T, None, head, num_subclasses=2)
    assert "skipped" in caplog.text
    torch.testing.assert_close(projector.mean[0], embedding[(embedding @ head.T).argmax(1) == 0].mean(0))


def test_single_output_head_is_projected_out(one_task):
    weight = one_task.head.weight[1:] - one_task.head.weight[:1]
    logits = one_task.logits[:, 1:] - one_task.logits[:, :1]
    projector = SubclassProjector.fit(one_task.embedding, logits, None, weight)
    assert projector(one_task.embedding, logits).shape == (800, 8)
    assert (projector.directions @ weight.T).abs().max() < 1e-4


@given(seed=seeds, count=st.integers(0, 3), avoid=st.integers(0, 3))
def test_random_directions_are_orthonormal_and_avoid_what_they_should(seed, count, avoid):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(avoid, 6, generator=generator, dtype=torch.float64)
    found = random_directions(count, matrix, generator)
    torch.testing.assert_close(found @ found.T, torch.eye(count, dtype=torch.float64))
    assert not (found @ matrix.T).abs().gt(1e-9).any()


def test_row_space_basis_has_the_rank_of_the_matrix():
    matrix = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    basis = row_space_basis(torch.cat([matrix, matrix.sum(0, keepdim=True)]))
    assert basis.shape == (2, 6)
    assert project_out(matrix.double(), basis).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_under_autocast(one_task, dtype):
    projector = one_task.fit()
    embedding, logits = one_task.embedding.to(dtype), one_task.logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = projector(embedding, logits)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, projector(embedding.float(), logits.float()))


@given(seed=seeds, size=st.integers(1, 4))
def test_class_probability_is_the_sum_over_its_subclasses(seed, size):
    logits = 3 * torch.randn(7, 3 * size, generator=torch.Generator().manual_seed(seed))
    summed = logits.softmax(1).unflatten(1, (3, size)).sum(2)
    torch.testing.assert_close(grouped_log_probs(logits, 3).exp(), summed)
    torch.testing.assert_close(class_logits(logits, 3).softmax(1), summed)


def test_grouped_prediction_differs_from_the_largest_subclass():
    logits = torch.tensor([[1.0, 1.0, 1.2, -9.0]])
    assert class_logits(logits, 2).argmax() == 0
    assert logits.argmax() // 2 == 1


@given(seed=seeds, tau=st.floats(0.5, 5), alpha=st.floats(0, 1))
def test_loss_matches_its_formula_and_reaches_only_the_student(seed, tau, alpha):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(7, 6, generator=generator).requires_grad_() for _ in range(2))
    targets = teacher.softmax(1)
    labels = torch.randint(3, (7,), generator=generator)
    loss = lelp(student, targets, num_classes=3, tau=tau, alpha=alpha, labels=labels)
    grouped = student.softmax(1).unflatten(1, (3, 2)).sum(2)
    hard = -grouped.gather(1, labels[:, None]).log().mean()
    soft = -(targets * (student / tau).softmax(1).log()).sum(1).mean()
    torch.testing.assert_close(loss, alpha * hard + (1 - alpha) * tau**2 * soft, rtol=1e-4, atol=1e-5)
    values = lelp(student, targets, num_classes=3, tau=tau, alpha=alpha, labels=labels, reduction="none")
    torch.testing.assert_close(values.mean(), loss)
    order = torch.randperm(7, generator=generator)
    shuffled = lelp(student[order], targets[order], num_classes=3, tau=tau, alpha=alpha, labels=labels[order])
    torch.testing.assert_close(shuffled, loss)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@given(seed=seeds)
def test_loss_is_smallest_at_the_targets(seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(7, 6, generator=generator).softmax(1)
    best = targets.log().requires_grad_()
    loss = lelp(best, targets, num_classes=3)
    loss.backward()
    assert best.grad.abs().max() < 1e-6
    assert lelp(best + torch.randn(7, 6, generator=generator), targets, num_classes=3) > loss


@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_large_student_logits_stay_finite(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    student = (1e4 * torch.randn(7, 6, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randn(7, 6, generator=generator).softmax(1)
    loss = lelp(student, targets, num_classes=3, alpha=0.5, labels=torch.zeros(7, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "ica"}, "directions must be one of"),
        ({"rotation": "some"}, "rotation must be one of"),
        ({"num_subclasses": 0}, "must be positive"),
        ({"max_fit_samples": 0}, "must be positive"),
    ],
)
def test_wrong_fit_options_get_a_clear_sentence(one_task, options, message):
    with pytest.raises(ValueError, match=message):
        one_task.fit(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(9, 5), torch.zeros(8, 2), None, torch.ones(2, 5)), r"must be \[N, D\]"),
        ((torch.zeros(9, 5), torch.zeros(9, 2), None, None), "switch it off"),
        ((torch.zeros(9, 5), torch.zeros(9, 2), None, torch.ones(2, 4)), "head's weight"),
        ((torch.zeros(9, 5), torch.zeros(9, 2), torch.full((9,), 2), torch.ones(2, 5)), "label 2 does not fit"),
        ((torch.zeros(9, 5), torch.zeros(9, 2), torch.zeros(8), torch.ones(2, 5)), "labels must be"),
    ],
)
def test_wrong_fit_arguments_get_a_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubclassProjector.fit(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, p: lelp(z, p[:, :4], num_classes=3), "differ in shape"),
        (lambda z, p: lelp(z, p, num_classes=4), "same number for each"),
        (lambda z, p: lelp(z, p, num_classes=3, tau=0), "tau must be positive"),
        (lambda z, p: lelp(z, p, num_classes=3, alpha=0.5), "pass labels"),
        (lambda z, p: lelp(z, p, num_classes=3, reduction="sum"), "unknown reduction"),
        (lambda z, p: pseudo_subclass_targets(z, z), "subclass logits"),
        (lambda z, p: pseudo_subclass_targets(z, z[..., None], beta=0), "must be positive"),
        (lambda z, p: as_class_logits(z[0]), "class logits must be"),
        (lambda z, p: SubclassProjector(2, 5, 3)(z, z), "was fitted on embeddings"),
    ],
)
def test_wrong_arguments_get_a_clear_sentence(call, message):
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        call(logits, logits.softmax(1))
