import json
from pathlib import Path

import datasets
import pytest
import torch
from dataset_distill_toy import Interrupt, manager, prototypes, recipe
from safetensors.torch import load_file
from torch import nn

import kdcore
from kd_dataset_distill.artifact import find_data
from kd_dataset_distill.convnet import load
from kd_dataset_distill.options import DCOptions, MTTOptions
from kdcore.errors import Interrupted
from kdcore.testing.conformance import assert_same_students, effect

MTT = {
    "use": "mtt",
    "num_experts": 2,
    "train_epochs": 6,
    "batch_expert": 64,
    "lr_expert": 0.02,
    "syn_steps": 6,
    "expert_epochs": 2,
    "max_start_epoch": 4,
    "lr_img": 50,
    "lr_lr": 1e-4,
    "augment": {"strategy": "none"},
}
PLAIN = {"strategy": "none"}


def terms(path: Path, stage: str = "distil") -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["terms"]["match"] for row in rows if row["stage"] == stage and "terms" in row]


@pytest.fixture(scope="module")
def chance(tmp_path_factory) -> float:
    """Accuracy with one random real image of each class, over five draws."""
    found = []
    for seed in range(5):
        made = {**recipe(use="dm", iterations=0, augment=PLAIN), "seed": seed}
        where = tmp_path_factory.mktemp("chance") / "run"
        found.append(kdcore.run(made, run_dir=where, plugins=manager()).metrics["test/accuracy"])
    return sum(found) / 5


@pytest.mark.parametrize(
    "method",
    [
        {"use": "dm", "iterations": 200, "lr_img": 1, "batch_real": 64, "augment": PLAIN},
        {"use": "dc", "iterations": 100, "lr_img": 0.5, "batch_real": 64, "init": "real"},
        {"use": "dc", "iterations": 100, "lr_img": 0.5, "batch_real": 64, "init": "noise"},
    ],
    ids=["dm", "dc", "dc-noise"],
)
def test_learned_images_beat_random_ones(run, chance, method):
    assert run(recipe(**method)).metrics["test/accuracy"] > chance + 0.15


def test_trajectories_are_matched_better_and_better_and_the_rate_is_learned(run, chance):
    made = recipe(**MTT, iterations=150)
    made["train"]["log_every"] = 1
    result = run(made)
    losses = terms(result.path)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert result.metrics["test/accuracy"] > chance + 0.1
    (stage,) = result.path.glob("stages/*-distil/artifact/stage.safetensors")
    rate = load_file(stage)["rate"].item()
    assert rate > 0
    assert rate != pytest.approx(0.02)


def test_recorded_trajectories_are_copies_that_end_where_the_expert_did(run):
    result = run(recipe(**MTT, iterations=1))
    state = load_file(next(result.path.glob("stages/*-expert-0/artifact/stage.safetensors")))
    trajectory = state["recorder.trajectory"]
    assert trajectory.shape[0] == 7
    moved = (trajectory[1:] - trajectory[:-1]).norm(dim=1)
    assert (moved > 0).all()
    last = torch.cat(
        [state[f"student.module.{name}"].flatten() for name, _ in load(result.path / "student").named_parameters()]
    )
    torch.testing.assert_close(trajectory[-1], last)
    other = load_file(next(result.path.glob("stages/*-expert-1/artifact/stage.safetensors")))["recorder.trajectory"]
    assert not torch.equal(other[0], trajectory[0])


@pytest.mark.parametrize(
    ("method", "stage", "step"),
    [
        (
            {"use": "dc", "ipc": 2, "iterations": 3, "outer": 3, "inner": 2, "batch_real": 16, "init": "real"},
            "distil",
            5,
        ),
        (
            {"use": "dsa", "ipc": 2, "iterations": 2, "outer": 4, "inner": 2, "batch_real": 16, "batch_train": 3},
            "distil",
            6,
        ),
        ({"use": "dm", "iterations": 6, "batch_real": 16}, "distil", 4),
        ({**MTT, "iterations": 5, "ipc": 2, "batch_syn": 3}, "distil", 3),
        ({**MTT, "iterations": 2, "num_experts": 1}, "expert-0", 20),
    ],
    ids=["dc", "dsa", "dm", "mtt", "expert"],
)
def test_stopped_in_the_middle_of_the_loop_it_ends_bit_for_bit_the_same(run, method, stage, step):
    made = recipe(**method)
    made["train"].update(steps=5, save_every=2)
    whole = run(made, "whole")
    with pytest.raises(Interrupted):
        run(made, "stopped", Interrupt(stage, step))
    resumed = run(made, "stopped")
    assert_same_students(whole.path, resumed.path)
    ours, theirs = (datasets.load_from_disk(str(find_data(r.path))).with_format("torch")[:] for r in (whole, resumed))
    assert torch.equal(ours["image"], theirs["image"])
    assert resumed.metrics == whole.metrics
    assert (whole.path / "metrics.jsonl").read_text() == (resumed.path / "metrics.jsonl").read_text()


def test_the_network_is_trained_between_steps_and_fresh_for_each_iteration(run):
    made = recipe(use="dc", iterations=2, outer=2, inner=3, batch_real=16, init="real", lr_net=0.1)
    made["train"].update(steps=2)
    trained = run(made, "trained")
    made["method"]["lr_net"] = 1e-9
    still = run(made, "still")
    first, second = (
        load_file(next(r.path.glob("stages/*-distil/artifact/stage.safetensors"))) for r in (trained, still)
    )
    key = "held.model.module.classifier.weight"
    assert not torch.equal(first[key], second[key])
    assert first["velocity"].norm() > 0
    assert not torch.equal(first["pixels"], second["pixels"])


def test_loops_follow_the_published_table():
    assert [DCOptions(ipc=n).loops for n in (1, 7, 10, 20, 50, 200)] == [
        (1, 1), (10, 50), (10, 50), (20, 25), (50, 10), (50, 10)]  # fmt: skip
    assert DCOptions(ipc=10, outer=2).loops == (2, 50)
    assert MTTOptions().max_start_epoch == 25


def test_batch_norms_are_calibrated_in_dc_and_see_all_classes_in_dm(run):
    for use in ("dc", "dm"):
        made = recipe(use=use, iterations=2, batch_real=16)
        made["student"]["norm"] = "batch"
        made["train"].update(steps=2, batch_size=4)
        assert run(made, use).metrics


def test_another_recipe_names_the_data_set(tmp_path):
    small = kdcore.run("dm", ["method.iterations=2", "method.eval_networks=1", "method.baselines=[]", "train.steps=2"],
                       run_dir=tmp_path / "small")  # fmt: skip
    recipe = {"method": "supervised", "student": {"use": "demo-cnn", "width": 4},
              "data": {"use": "distilled", "path": str(small.path)}, "train": {"steps": 3, "batch_size": 10},
              "eval": {"on": ["val", "test"]}}  # fmt: skip
    result = kdcore.run(recipe, run_dir=tmp_path / "other")
    assert set(result.metrics) == {"val/accuracy", "test/accuracy"}
    data = kdcore.load_student(result.path)[0].data
    assert data.size("train") == 10
    assert data.labels("train").tolist() == list(range(10))
    assert data["train"][0]["image"].shape == (1, 8, 8)
    assert (small.path / "stages" / "02-data" / "artifact" / "images.png").stat().st_size > 100


def test_soft_labels_are_the_teachers_logits_on_the_small_set(run):
    made = recipe(use="dm", iterations=2, soft_labels=True, temperature=2, baselines=["random"])
    made["teacher"] = {"use": "dd-convnet", "width": 4, "depth": 2, "train": {"steps": 5}}
    made["train"].update(steps=3)
    result = run(made)
    rows = datasets.load_from_disk(str(find_data(result.path))).with_format("torch")[:]
    teacher = load(result.path / "stages" / "01-teacher" / "artifact" / "teacher")
    with torch.no_grad():
        torch.testing.assert_close(rows["teacher_logits"], teacher(rows["image"])["logits"], rtol=1e-4, atol=1e-4)
    found = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert all("kl" in row["terms"] for row in found if row["stage"].startswith(("distilled", "random")))


def test_several_architectures_and_all_data_stand_in_the_table(run):
    made = recipe(use="dm", iterations=2, baselines=["random", "herding", "k-centers"], full=1, eval_networks=2)
    made["students"] = {"student": made.pop("student"), "other": {"use": "demo-cnn", "width": 4}}
    made["train"].update(steps=2)
    result = run(made)
    names = [
        f"{role} on {name}"
        for role in ("student", "other")
        for name in ("distilled", "random", "herding", "k-centers", "all")
    ]
    assert [row["model"] for row in result.rows] == names
    assert {row["samples"] for row in result.rows} == {4, 800}
    assert all(row["networks"] == 2 and row["test/accuracy std"] >= 0 for row in result.rows)
    assert (result.path / "students" / "other").is_dir()


def test_whitened_networks_take_ordinary_images(run):
    result = run(recipe(**MTT, iterations=3, zca=True, baselines=["random"]))
    _, loaded = kdcore.load_student(result.path, plugins=manager())
    batch = prototypes().sample("test", 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(batch).logits, result.student.eval()(batch).logits)
        assert not torch.allclose(loaded(batch).logits, load(result.path / "student")(batch["image"])["logits"])


def test_modules_from_python_are_drawn_afresh(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))
    before = net[1].weight.clone()
    train = {"steps": 3, "batch_size": 4}
    result = kdcore.distill(
        None,
        net,
        prototypes(),
        "dc",
        iterations=2,
        ipc=1,
        eval_networks=1,
        baselines=[],
        train=train,
        eval={"on": ["test"]},
        run_dir=tmp_path / "run",
    )
    assert result.metrics
    assert not torch.equal(net[1].weight, before)


def test_quickstart_beats_random_real_images(tmp_path):
    assert effect("dm", tmp_path, seeds=(0, 1)) > 0.09
