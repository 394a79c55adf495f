import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdcore
from kd_classic import methods, options
from kdcore import Model
from kdcore.losses import Progress
from kdcore.testing import effect

STEPS = ["train.steps=4", "train.log_every=1", "teacher.train.steps=2"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def terms_of(folder, stage):
    return {name for row in rows(folder) if row["stage"] == stage for name in row.get("terms", {})}


def test_fitnets_trains_hints_and_task_together(tmp_path):
    result = kdcore.run("fitnets", STEPS, run_dir=tmp_path / "run")
    assert [path.name for path in sorted((result.path / "stages").iterdir())] == ["01-teacher", "02-distill"]
    assert terms_of(result.path, "distill") == {"cross-entropy", "fitnets"}


def test_fitnets_in_the_papers_form_trains_hints_first_and_kd_then(tmp_path):
    more = ["method.joint=false", "stages.hint.train.steps=3"]
    result = kdcore.run("fitnets", [*STEPS, *more], run_dir=tmp_path / "run")
    assert [path.name for path in sorted((result.path / "stages").iterdir())] == ["01-teacher", "02-hint", "03-distill"]
    assert terms_of(result.path, "hint") == {"fitnets"}
    assert terms_of(result.path, "distill") == {"cross-entropy", "kd"}
    assert max(row["step"] for row in rows(result.path) if row["stage"] == "hint") == 3


def joint(method, chosen):
    """The stage of a method with two linear models."""
    torch.manual_seed(0)
    run = SimpleNamespace(student=Model(nn.Linear(4, 3)), teacher=Model(nn.Linear(4, 3)))
    return method(chosen).joint_stage(run)


def test_the_weight_of_dkd_rises_to_its_full_value_over_twenty_epochs():
    batch = {"image": torch.randn(8, 4), "label": torch.arange(8) % 3, "index": torch.arange(8)}
    stage = joint(methods.DKD, options.DKDMethodOptions(weight=3))
    whole = joint(methods.DKD, options.DKDMethodOptions(weight=3, warmup=0))(batch)
    for epochs_done, factor in ((0, 1 / 20), (4, 5 / 20), (19, 1.0), (100, 1.0)):
        stage.progress = Progress(step=epochs_done * 10, epoch=epochs_done)
        terms = stage(batch)
        torch.testing.assert_close(terms["dkd"], factor * whole["dkd"])
        assert terms["cross-entropy"] == whole["cross-entropy"]


def test_kd_without_cross_entropy_needs_no_labels():
    stage = joint(methods.KD, options.KDMethodOptions(ce_weight=0))
    assert set(stage({"image": torch.randn(8, 4), "index": torch.arange(8)})) == {"kd"}


SEEDS = (0, 1)  # the first two of the three in the README's table, to save time
MARGIN = 0.05  # accuracy: half of the smallest difference there


@pytest.mark.parametrize("method", ["kd", "fitnets", "at", "dkd", "dist"])
def test_the_method_beats_the_student_alone(method, tmp_path):
    assert effect(method, tmp_path, SEEDS) > MARGIN
