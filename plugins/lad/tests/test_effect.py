import json

import pytest
import torch
from torch import nn

from kdcore import api
from kdcore.data import DataModule, Task
from kdcore.testing import effect

TEACHER, STUDENT = "train_teacher_with_labels", "distil"


def rows(path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["terms"] for line in lines if line["stage"] == stage and "terms" in line]


def scenes(seed: int, count: int = 48) -> DataModule:
    """Scenes of coloured rectangles under heavy noise, 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    mask = torch.zeros(count, 32, 32, dtype=torch.long)
    for image in mask:
        for label in torch.randint(1, 5, (4,), generator=generator):
            y, x = torch.randint(0, 20, (2,), generator=generator).tolist()
            image[y : y + 12, x : x + 12] = label
    noise = 2 * torch.randn(count, 3, 32, 32, generator=generator)
    image = colours[mask].movedim(-1, 1) + noise
    samples = [{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)]
    return DataModule({"train": samples[:32], "val": samples[32:]}, Task("segmentation", num_classes=5))


def trained_teacher(path, seed: int, steps: int, **options):
    """The teacher's stage alone: its score with labels in sight, without, and its consistency."""
    torch.manual_seed(seed)
    widths, dilations = (3, 16, 16, 16), (1, 2, 4)
    layers = [
        nn.Sequential(nn.Conv2d(i, o, 3, padding=d, dilation=d), nn.BatchNorm2d(o), nn.ReLU())
        for i, o, d in zip(widths[:-1], widths[1:], dilations, strict=True)
    ]
    student = nn.Sequential(*layers, nn.Conv2d(16, 5, 1))
    train = {"steps": steps, "batch_size": 8, "log_every": 5, "optimizer": {"name": "adam", "lr": 5e-3}}
    result = api.distill(
        None, student, scenes(seed), "lad", train=train, run_dir=path, plane_std=0.1, seed=seed, **options
    )
    return [row["val/miou"] for row in result.rows[:2]], rows(path, TEACHER)


def test_labels_in_fixed_codes_are_looked_up_and_those_in_random_codes_are_not(tmp_path):
    scores = {}
    for codes in ("fixed", "random"):
        scores[codes] = trained_teacher(tmp_path / codes, 0, 60, codes=codes, consistency_weight=0)[0]
    assert scores["fixed"][0] > scores["fixed"][1] + 0.1
    assert scores["random"][0] < scores["fixed"][0] - 0.1


def test_consistency_draws_the_two_paths_together(tmp_path):
    apart = {}
    for weight in (1e-6, 5):
        _, terms = trained_teacher(tmp_path / str(weight), 0, 60, consistency_weight=weight)
        apart[weight] = sum(t["consistency"] for t in terms[-3:]) / weight
    assert apart[1e-6] > 2 * apart[5] > 0


def test_paper_recipe_runs_on_a_local_copy_with_a_tiny_network(tmp_path):
    pytest.importorskip("kd_smp")
    pytest.importorskip("kd_datasets")
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    lines = ["image,mask"]
    for i in range(8):
        image, mask = (
            torch.randint(0, high, (48, 64, c), generator=generator).byte() for high, c in ((255, 3), (21, 1))
        )
        mask[:4] = 255
        Image.fromarray(image.numpy()).save(tmp_path / f"{i}.jpg")
        Image.fromarray(mask[..., 0].numpy()).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.jpg,{i}.png")
    (tmp_path / "pictures.csv").write_text("\n".join(lines) + "\n")
    api.run("lad/paper", [
        f"data.path={tmp_path / 'pictures.csv'}", "data.splits.train='train[:6]'", "data.splits.val='train[6:]'",
        "data.size=64", "student.pretrained=false", "student.settings.decoder_channels=16", "train.steps=2",
        "train.batch_size=3", "train.workers=0", "train.log_every=1",
    ], run_dir=tmp_path / "run")  # fmt: skip
    for stage, term in ((TEACHER, "consistency"), (STUDENT, "lad")):
        assert all(set(terms) == {"cross-entropy", "auxiliary", term} for terms in rows(tmp_path / "run", stage))


def test_distilled_students_beat_students_of_the_labels_alone(tmp_path):
    assert effect("lad", tmp_path, seeds=(0, 1, 2)) > 0.02  # measured: 0.036
