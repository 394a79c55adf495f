import pytest
import torch

from kd_demo.heartbeats import heartbeats
from kd_demo.options import HeartbeatsOptions


def made(**changes):
    return heartbeats(HeartbeatsOptions(**{"train": 60, "val": 6, "test": 6, **changes}))


def test_clips_are_grey_and_lie_between_0_and_1():
    batch = made().sample("train", 60)
    video = batch["video"]
    assert video.shape == (60, 8, 3, 32, 32)
    assert torch.equal(video[:, :, 0], video[:, :, 2])
    assert video.min() >= 0
    assert video.max() <= 1
    assert batch["label"].unique().tolist() == [0, 1, 2, 3]


def test_a_clip_depends_on_seed_split_and_index_alone():
    few, many = made(train=5)["train"].columns["video"], made()["train"].columns["video"]
    torch.testing.assert_close(few, many[:5])
    assert not torch.allclose(many[:6], made()["val"].columns["video"])
    assert not torch.allclose(few, made(train=5, seed=1)["train"].columns["video"])


def test_walls_differ_in_thickness_and_rates_in_beats():
    data = made(train=200, noise=0.0)["train"]
    video, label = data.columns["video"][:, :, 0], data.columns["label"]
    bright = (video > 0.6).float().mean((1, 2, 3))
    assert bright[label % 2 == 1].mean() > 1.3 * bright[label % 2 == 0].mean()
    area = (video < 0.2).float().mean((2, 3))
    power = torch.fft.rfft(area - area.mean(1, keepdim=True), dim=1).abs()
    beats = power.argmax(1)
    assert torch.equal(beats, 1 + label // 2)


@pytest.mark.parametrize(("labelled", "kind"), [(True, "classification"), (False, "unlabelled")])
def test_labels_are_a_task_only_if_asked_for(labelled, kind):
    data = made(labelled=labelled)
    assert data.task.kind == kind
    assert data.labels("val").shape == (6,)


def test_noise_is_speckle_around_the_same_picture():
    plain, noisy = (made(train=20, noise=noise)["train"].columns["video"] for noise in (0.0, 0.3))
    assert (plain - noisy).abs().mean() > 0.02
    assert (plain.mean() - noisy.mean()).abs() < 0.02
