from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lad.functional import distance, fixed_codes, label_channel, pixel_cross_entropy
from kdcore.data import IGNORE
from kdcore.testing import golden

settings.register_profile("plugin", deadline=None, max_examples=15)
settings.load_profile("plugin")

PLUGINS = Path(__file__).parents[2]
FOLDER = PLUGINS.parents[1] / "shared" / "golden"
CLASSES = 5
seeds = st.integers(0, 2**31)


def example(seed: int, batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and a teacher, and labels twice as large, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, CLASSES, size, size, generator=generator) for _ in range(2))
    labels = torch.randint(-1, CLASSES, (batch, 2 * size, 2 * size), generator=generator)
    return student.requires_grad_(), teacher.requires_grad_(), labels.masked_fill(labels < 0, IGNORE)


def draws(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(len(labels), CLASSES + 1, generator=generator),
        torch.randn(len(labels), 1, *labels.shape[1:], generator=generator),
    )


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden vectors are not here: there is no {FOLDER}")
def test_every_function_with_an_adapter_agrees_with_its_golden_vectors():
    cases = list(golden.run(FOLDER, PLUGINS, only="lad"))
    assert {case.name.split("-")[1] for case in cases} == set(golden.adapters("lad", PLUGINS))
    assert [case for case in cases if not case.passed] == []


@given(seed=seeds)
def test_pixels_of_a_class_in_an_image_share_a_value_and_ignored_ones_have_their_own(seed):
    labels = example(seed)[2]
    channel = label_channel(labels, *draws(labels, seed), noise_std=0, scale=1.75)
    assert channel.shape == (2, 1, 16, 16)
    for image, truth in zip(channel[:, 0], labels, strict=True):
        values = [image[truth == label].unique() for label in truth.unique()]
        assert all(len(v) == 1 for v in values)
        assert len(torch.cat(values).unique()) == len(values)


@given(seed=seeds)
def test_noise_has_the_deviation_asked_for(seed):
    labels = torch.randint(CLASSES, (1, 64, 64), generator=torch.Generator().manual_seed(seed))
    codes, noise = draws(labels, seed)
    clean, noisy = (label_channel(labels, codes, noise, noise_std=std, scale=100) for std in (0, 0.03))
    assert (noisy - clean).std() == pytest.approx(3, rel=0.1)


def test_fixed_codes_are_those_of_the_original_script_for_21_classes_and_keep_their_range():
    torch.testing.assert_close(fixed_codes(21), (torch.arange(22) - 11) / 10)
    for classes in (2, 5, 150):
        codes = fixed_codes(classes)
        assert (len(codes), codes[0], codes[-1]) == (classes + 1, pytest.approx(-1.1), pytest.approx(1.0))
        torch.testing.assert_close(codes.diff(), torch.full((classes,), 2.1 / classes))


@pytest.mark.parametrize(
    ("labels", "codes", "noise", "message"),
    [
        (torch.zeros(2, 4), torch.rand(2, 6), torch.rand(2, 1, 4, 4), r"labels \[B, H, W\]"),
        (torch.zeros(2, 4, 4), torch.rand(3, 6), torch.rand(2, 1, 4, 4), "codes"),
        (torch.zeros(2, 4, 4), torch.rand(2, 6), torch.rand(2, 4, 4), "noise"),
        (torch.full((2, 4, 4), 5), torch.rand(2, 6), torch.rand(2, 1, 4, 4), "label 5; the classes are 0 to 4"),
        (torch.full((2, 4, 4), -1), torch.rand(2, 6), torch.rand(2, 1, 4, 4), "label -1; the classes are 0 to 4"),
    ],
)
def test_a_channel_that_cannot_be_made_says_why(labels, codes, noise, message):
    with pytest.raises(ValueError, match=message):
        label_channel(labels, codes, noise, noise_std=0.1, scale=1)


@given(seed=seeds)
def test_distances_against_their_definitions(seed):
    student, teacher, _ = example(seed)
    t, p = (x.flatten(2) / 4 for x in (teacher.detach(), student))
    divergence = (t.softmax(2) * (t.log_softmax(2) - p.log_softmax(2))).sum()
    torch.testing.assert_close(distance(student, teacher), 16 * divergence / (2 * CLASSES))
    per_pixel = (t.softmax(1) * (t.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(distance(student, teacher, "kl"), per_pixel)
    rows = [x.movedim(1, -1).flatten(0, 2).softmax(1) for x in (student, teacher)]
    inter, intra = (
        1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*r, strict=True)]).mean()
        for r in (rows, [x.T for x in rows])
    )
    torch.testing.assert_close(distance(student, teacher, "dist"), inter + intra, rtol=1e-3, atol=1e-4)


@given(seed=seeds, kind=st.sampled_from(["cwd", "kl", "dist"]))
def test_the_distance_vanishes_between_equals_only_and_trains_the_student_only(seed, kind):
    student, teacher, _ = example(seed)
    assert distance(student, student, kind).item() == pytest.approx(0, abs=1e-5)
    value = distance(student, teacher, kind)
    value.backward()
    assert value > 0.01
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("align_corners", [True, False])
def test_a_teacher_of_another_stride_is_resized(align_corners):
    student, teacher, _ = example(0)
    small = teacher[..., ::2, ::2]
    large = F.interpolate(small, (8, 8), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(distance(student, small, align_corners=align_corners), distance(student, large))


def test_distances_that_cannot_be_had_say_why():
    student, teacher, _ = example(0)
    with pytest.raises(ValueError, match="'cwd', 'kl' or 'dist', not 'mse'"):
        distance(student, teacher, "mse")
    with pytest.raises(ValueError, match="score maps"):
        distance(student.mean((2, 3)), teacher.mean((2, 3)))
    with pytest.raises(ValueError, match="one shape"):
        distance(student, teacher[:, :3])


@pytest.mark.parametrize("align_corners", [True, False])
def test_cross_entropy_is_the_mean_over_pixels_that_count(align_corners):
    logits, _, labels = example(0)
    large = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=align_corners)
    wanted = F.cross_entropy(large, labels, ignore_index=IGNORE)
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, align_corners=align_corners), wanted)
    assert pixel_cross_entropy(logits, torch.full_like(labels, IGNORE)) == 0
