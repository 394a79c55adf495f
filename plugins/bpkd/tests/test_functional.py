import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_bpkd import functional
from kd_bpkd.functional import body_loss, bpkd, channel_wise_kl, edge_loss, edge_mask, masked_pixel_kl, valid_mask

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

CLASSES, SIZE, STRIDE = 5, 64, 4
seeds = st.integers(0, 2**31)


def scenes(count: int, generator: torch.Generator) -> Tensor:
    """Labels ``[count, 64, 64]``: two to four discs or rectangles on a background of class 0."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for image in labels:
        for _ in range(int(torch.randint(2, 5, (), generator=generator))):
            (row, column), (height, width) = torch.randint(8, 56, (2, 2), generator=generator) / torch.tensor(
                [[1], [3]]
            )
            inside = ((rows - row).abs() < height) & ((columns - column).abs() < width)
            if torch.rand((), generator=generator) < 0.5:
                inside = (rows - row) ** 2 + (columns - column) ** 2 < height**2
            image[inside] = int(torch.randint(1, CLASSES, (), generator=generator))
    return labels


def teacher_for(labels: Tensor) -> Tensor:
    """Logits a good teacher gives: six times the share of each class in a cell."""
    return 6 * F.avg_pool2d(F.one_hot(labels, CLASSES).movedim(-1, 1).float(), STRIDE)


def example(seed: int, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits at stride 4, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = scenes(count, generator)
    teacher = teacher_for(labels)
    teacher = (teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).requires_grad_()
    return torch.randn(teacher.shape, generator=generator).requires_grad_(), teacher, labels


def test_edge_mask_against_a_plain_loop():
    labels = scenes(1, torch.Generator().manual_seed(0))
    labels[0, 20:26, 30:44] = 255
    mask = edge_mask(labels, CLASSES, (SIZE, SIZE), width=5)
    expected = torch.zeros_like(mask)
    for row in range(SIZE):
        for column in range(SIZE):
            window = labels[0, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            present = window.unique().tolist()
            if len(present) > 1 and 255 not in present:
                expected[0, present, row, column] = 1
    torch.testing.assert_close(mask, expected)


def test_edge_belongs_to_the_two_classes_it_separates():
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    labels[:, :, 30:] = 2
    mask = edge_mask(labels, CLASSES, (SIZE, SIZE))
    band = torch.zeros(SIZE)
    band[27:33] = 1
    for label in (0, 2):
        assert torch.equal(mask[0, label], band.expand(SIZE, SIZE))
    assert not mask[0, [1, 3, 4]].any()


def test_edge_mask_is_pooled_after_the_morphology():
    labels = scenes(2, torch.Generator().manual_seed(1))
    full = edge_mask(labels, CLASSES, (SIZE, SIZE))
    torch.testing.assert_close(edge_mask(labels, CLASSES, (16, 16)), F.avg_pool2d(full, 4))
    uneven = edge_mask(labels, CLASSES, (20, 13))
    assert uneven.shape == (2, CLASSES, 20, 13)
    assert ((uneven >= 0) & (uneven <= 1)).all()


def test_void_makes_no_edges_and_no_valid_cells():
    labels = torch.ones(1, SIZE, SIZE, dtype=torch.long)
    labels[:, 10:41] = 255
    assert not edge_mask(labels, CLASSES, (16, 16)).any()
    valid = valid_mask(labels, (16, 16))
    assert valid.shape == (1, 1, 16, 16)
    assert valid[0, 0, :, 0].tolist() == [True] * 3 + [False] * 7 + [True] * 6
    assert not edge_mask(labels.where(labels == 1, 3), CLASSES, (16, 16), ignore_index=3).any()


def test_edge_mask_in_chunks_of_classes(monkeypatch):
    labels = scenes(2, torch.Generator().manual_seed(2))
    whole = edge_mask(labels, CLASSES, (16, 16))
    monkeypatch.setattr(functional, "_CHUNK_ELEMENTS", 2 * labels.numel())
    assert torch.equal(edge_mask(labels, CLASSES, (16, 16)), whole)


@given(seed=seeds, label=st.integers(0, CLASSES - 1))
def test_image_of_one_class_has_no_edge_loss(seed, label):
    student, teacher, labels = example(seed)
    labels = torch.full_like(labels, label)
    assert not edge_mask(labels, CLASSES, (16, 16)).any()
    assert bpkd(student, teacher, labels)["edge"] == 0


@given(seed=seeds)
def test_edge_loss_sees_only_edges_and_body_loss_sees_the_rest(seed):
    student, teacher, labels = example(seed)
    reference = bpkd(student, teacher, labels)
    edge = edge_mask(labels, CLASSES, (16, 16))
    inside = (edge == 0).all(dim=1, keepdim=True)
    moved = bpkd(student + inside * torch.randn_like(student), teacher, labels)
    assert (moved["edge"] - reference["edge"]).abs() < 1e-6
    assert (moved["body"] - reference["body"]).abs() > 1e-4
    position = tuple((edge > 0.2).nonzero()[0].tolist())
    changed = student.detach().clone()
    changed[position] += 3
    assert (bpkd(changed, teacher, labels)["edge"] - reference["edge"]).abs() > 1e-6


@given(
    seed=seeds,
    temperature=st.floats(0.5, 8),
    edge_norm=st.sampled_from(["per_class", "total"]),
    pre_mask=st.booleans(),
    post_mask=st.booleans(),
)
def test_losses_are_zero_at_equality_and_positive_elsewhere(seed, **options):
    student, teacher, labels = example(seed)
    for term in ("edge", "body"):
        assert bpkd(teacher, teacher, labels, **options)[term].abs() < 1e-6
        assert bpkd(student, teacher, labels, **options)[term] > 1e-3


def test_body_loss_compares_shapes_and_not_levels():
    _, teacher, labels = example(0)
    shifted = teacher + torch.arange(CLASSES).view(-1, 1, 1)
    edgeless = bpkd(shifted, teacher, torch.zeros_like(labels))
    assert edgeless["body"].abs() < 1e-6
    assert bpkd(shifted, teacher, labels)["body"] > 1e-3


@given(seed=seeds)
def test_only_the_student_gets_a_gradient(seed):
    student, teacher, labels = example(seed)
    sum(bpkd(student, teacher, labels).values()).backward()
    coarse = teacher[:, :, ::2, ::2]
    sum(bpkd(student, coarse, labels, pre_mask=False, post_mask=False).values()).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@given(seed=seeds)
def test_order_of_the_batch_does_not_matter(seed):
    student, teacher, labels = example(seed, count=3)
    order = [2, 0, 1]
    for edge_norm in ("per_class", "total"):
        reference = bpkd(student, teacher, labels, edge_norm=edge_norm)
        torch.testing.assert_close(bpkd(student[order], teacher[order], labels[order], edge_norm=edge_norm), reference)


@given(seed=seeds, post_mask=st.booleans())
def test_void_cells_do_not_count(seed, post_mask):
    student, teacher, labels = example(seed)
    labels[:, 16:48] = 255
    changed = student.detach().clone()
    changed[:, :, 4:12] += 5 * torch.randn_like(changed[:, :, 4:12])
    reference = bpkd(student, teacher, labels, post_mask=post_mask)
    torch.testing.assert_close(bpkd(changed, teacher, labels, post_mask=post_mask), reference)


@pytest.mark.parametrize("post_mask", [True, False])
def test_image_without_labels_gives_zero(post_mask):
    student, teacher, labels = example(0)
    terms = bpkd(student, teacher, torch.full_like(labels, 255), post_mask=post_mask)
    sum(terms.values()).backward()
    assert terms["edge"] == 0
    assert terms["body"].abs() < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_edge_loss_by_hand():
    """Two classes, four cells; class 0 has edges in two cells, class 1 in one."""
    student, teacher = torch.randn(2, 1, 2, 1, 4, generator=torch.Generator().manual_seed(0))
    edge = torch.tensor([[[[0.5, 1.0, 0.0, 0.0]], [[0.25, 0.0, 0.0, 0.0]]]])

    def phi(mask: Tensor) -> Tensor:
        p, q = (teacher * mask / 2).softmax(1), (student * mask / 2).softmax(1)
        return 4 * (p * (p / q).log()).sum(1)[0, 0]

    cells = phi(edge)
    assert cells[2:].abs().max() < 1e-6
    per_class = torch.stack([0.5 * cells[0] + cells[1], 0.25 * cells[0]])
    options = {"alpha": [2.0, 3.0], "temperature": 2.0}
    expected = 2 * per_class[0] / 2 + 3 * per_class[1] / 1
    torch.testing.assert_close(edge_loss(student, teacher, edge, **options), expected)
    total = edge_loss(student, teacher, edge, edge_norm="total", **options)
    torch.testing.assert_close(total, (2 * per_class[0] + 3 * per_class[1]) / 3)
    bare = phi(torch.ones_like(edge))
    unmasked = edge_loss(student, teacher, edge, pre_mask=False, alpha=2.0, temperature=2.0)
    torch.testing.assert_close(unmasked, 0.5 * bare[0] + bare[1] + 2 * 0.25 * bare[0])
    valid = torch.tensor([[[[True, True, True, False]]]])
    plain = edge_loss(student, teacher, edge, valid, post_mask=False, temperature=2.0)
    torch.testing.assert_close(plain, cells[:3].mean())
    torch.testing.assert_close(
        masked_pixel_kl(student, teacher, temperature=2.0), bare.view(1, 1, 1, 4), rtol=1e-4, atol=1e-6
    )


def test_body_loss_by_hand():
    student, teacher, labels = example(0)
    body = 1 - edge_mask(labels, CLASSES, (16, 16))
    p, q = ((logits * body / 2).flatten(2).softmax(-1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum() / (2 * CLASSES)
    torch.testing.assert_close(body_loss(student, teacher, 1 - body, temperature=2.0), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(channel_wise_kl(student, teacher, body, temperature=2.0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("align_corners", [True, False])
def test_teacher_of_another_stride_is_resized(align_corners):
    student, teacher, labels = example(0)
    coarse = teacher[:, :, ::2, ::2]
    resized = F.interpolate(coarse, size=(16, 16), mode="bilinear", align_corners=align_corners)
    expected = bpkd(student, resized, labels)
    torch.testing.assert_close(bpkd(student, coarse, labels, align_corners=align_corners), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, labels = example(0)
    student, teacher = (100 * student.detach()).to(dtype).requires_grad_(), (100 * teacher.detach()).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = bpkd(student, teacher, labels)
    sum(terms.values()).backward()
    torch.testing.assert_close(terms, bpkd(student.float(), teacher.float(), labels))
    assert student.grad.isfinite().all()


@given(seed=seeds, size=st.sampled_from([1e2, 1e4]))
def test_large_logits_stay_finite(seed, size):
    student, teacher, labels = example(seed)
    student = (size * student.detach()).requires_grad_()
    terms = bpkd(student, size * teacher, labels)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "odd"),
        ({"temperature": 0}, "positive"),
        ({"edge_norm": "per_image"}, "edge_norm"),
        ({"alpha": [1.0, 2.0]}, "one per class"),
    ],
)
def test_wrong_options_get_a_clear_sentence(options, message):
    student, teacher, labels = example(0)
    with pytest.raises(ValueError, match=message):
        bpkd(student, teacher, labels, **options)


def test_wrong_shapes_get_a_clear_sentence():
    student, teacher, labels = example(0)
    with pytest.raises(ValueError, match="same classes"):
        bpkd(student, teacher[:, :4], labels)
    with pytest.raises(ValueError, match="labels must be"):
        bpkd(student, teacher, labels[0])


def train_student(seed: int, images: Tensor, noisy: Tensor, labels: Tensor, weight: float) -> nn.Module:
    """Cross-entropy on the noisy labels, distillation at the contours of the true ones."""
    torch.manual_seed(seed)
    widths, strides = (3, 12, 12, 12), (2, 2, 1)
    blocks = [
        nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
        for i, o, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    net = nn.Sequential(*blocks, nn.Conv2d(12, CLASSES, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    teacher = teacher_for(labels)
    for _ in range(60):
        batch = torch.randint(len(images), (8,))
        logits = net(images[batch])
        loss = F.cross_entropy(F.interpolate(logits, scale_factor=STRIDE, mode="bilinear"), noisy[batch])
        if weight:
            loss = loss + weight * sum(bpkd(logits, teacher[batch], labels[batch]).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    return net.eval()


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Distance to the teacher at the contours, and accuracy within the band around them."""
    logits = net(images)
    distance = bpkd(logits, teacher_for(labels), labels)["edge"].item()
    band = edge_mask(labels, CLASSES, (SIZE, SIZE)).any(dim=1)
    predicted = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear").argmax(1)
    return distance, (predicted == labels)[band].float().mean().item()


def test_student_follows_the_teacher_at_contours_in_spite_of_noisy_labels():
    accuracies = {0.0: [], 1.0: []}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        labels = scenes(64, generator)
        palette = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
        images = palette[labels].movedim(-1, 1) + 0.5 * torch.randn(64, 3, SIZE, SIZE, generator=generator)
        relabelled = torch.rand(labels.shape, generator=generator) < 0.3
        noisy = labels.where(~relabelled, torch.randint(CLASSES, labels.shape, generator=generator))
        distances = {}
        for weight, seen in accuracies.items():
            net = train_student(seed, images[:48], noisy[:48], labels[:48], weight)
            distances[weight], accuracy = evaluate(net, images[48:], labels[48:])
            seen.append(accuracy)
        assert distances[0.0] > 2 * distances[1.0]
    assert sum(accuracies[1.0]) >= sum(accuracies[0.0]) - 3 * 0.01
