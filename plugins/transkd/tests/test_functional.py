import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_transkd.functional import (
    as_tokens,
    embedding_loss,
    label_weight,
    reduce_labels,
    resize_tokens,
    strided_cross_entropy,
)

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["tokens", "BHWC", "BCHW"])
def test_embeddings_of_every_layout_become_the_same_tokens(layout):
    maps = random(0, 2, 5, 3, 4)
    channels_last = maps.movedim(1, -1)
    given_as = {"tokens": channels_last.flatten(1, 2), "BHWC": channels_last, "BCHW": maps}[layout]
    tokens = as_tokens(given_as, torch.zeros_like(maps))
    assert torch.equal(tokens[1, 2 * 4 + 3], maps[1, :, 2, 3])


def test_embedding_that_is_none_of_its_stage_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 12, 5\], not with \[2, 13, 5\]"):
        as_tokens(torch.zeros(2, 13, 5), torch.zeros(2, 5, 3, 4))


def test_tokens_of_another_grid_are_averaged_to_it():
    tokens = random(0, 2, 8 * 4, 3)
    halved = resize_tokens(tokens, (8, 4), (4, 2))
    expected = F.avg_pool2d(tokens.transpose(1, 2).reshape(2, 3, 8, 4), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(halved, expected)
    assert resize_tokens(tokens, (8, 4), (8, 4)) is tokens


@given(seed=seeds, scale=st.floats(0, 10))
def test_embedding_loss_is_the_weighted_sum_of_mean_squares(seed, scale):
    pairs = [(random(seed + i, 2, n, c), random(seed - i - 1, 2, n, c)) for i, (n, c) in enumerate([(4, 6), (1, 8)])]
    students, teachers = zip(*pairs, strict=True)
    found = embedding_loss(students, teachers, [scale, 0.5])
    torch.testing.assert_close(found, sum(w * (s - t).square().mean() for w, (s, t) in zip([scale, 0.5], pairs,
                                                                                          strict=True)))  # fmt: skip
    assert embedding_loss(students, students, [scale, 0.5]) == 0


def test_embedding_loss_gives_the_teacher_no_gradient():
    student, teacher = (random(i, 2, 3, 4).requires_grad_() for i in range(2))
    embedding_loss([student], [teacher], [1.0]).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_embedding_loss_refuses_what_does_not_pair():
    tokens = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="2 weights"):
        embedding_loss([tokens], [tokens], [1.0, 1.0])
    with pytest.raises(ValueError, match="differ in shape"):
        embedding_loss([tokens], [tokens[:, :2]], [1.0])


def test_labels_are_those_of_the_cells_centres():
    labels = torch.arange(10 * 8).reshape(1, 10, 8)
    assert reduce_labels(labels).tolist() == [[[10, 14], [42, 46], [66, 70]]]  # rows 1, 5, 8; columns 2, 6
    assert reduce_labels(torch.arange(64).reshape(1, 8, 8)).tolist() == [[[18, 22], [50, 54]]]


@given(seed=seeds, weighted=st.booleans())
def test_cross_entropy_against_a_plain_loop(seed, weighted):
    logits = random(seed, 2, 3, 4, 4)
    labels = torch.randint(0, 4, (2, 16, 16), generator=torch.Generator().manual_seed(seed))
    labels[labels == 3] = 255
    weights = torch.tensor([1.0, 5.0, 0.5]) if weighted else None
    total, count = 0.0, 0.0
    for b in range(2):
        for row in range(4):
            for column in range(4):
                label = int(labels[b, 4 * row + 2, 4 * column + 2])
                if label != 255:
                    weight = 1.0 if weights is None else float(weights[label])
                    total -= weight * float(logits[b, :, row, column].log_softmax(0)[label])
                    count += weight
    found = strided_cross_entropy(logits, labels, weights)
    assert found.item() == pytest.approx(total / count, rel=1e-5)
    assert label_weight(reduce_labels(labels), weights).item() == pytest.approx(count)


def test_cross_entropy_without_any_label_is_zero():
    logits = random(0, 2, 3, 4, 4).requires_grad_()
    loss = strided_cross_entropy(logits, torch.full((2, 16, 16), 255), torch.ones(3))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().sum() == 0


def test_logits_of_another_stride_are_resized():
    logits, labels = random(0, 2, 3, 2, 2), torch.randint(0, 3, (2, 16, 16))
    resized = F.interpolate(logits, (4, 4), mode="bilinear")
    torch.testing.assert_close(strided_cross_entropy(logits, labels), strided_cross_entropy(resized, labels))


def test_wrong_class_weights_and_labels_are_refused():
    with pytest.raises(ValueError, match=r"2 class weights.*3 classes"):
        strided_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 8, 8).long(), torch.ones(2))
    with pytest.raises(ValueError, match="labels must be"):
        reduce_labels(torch.zeros(8, 8).long())
