import json
import os
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.process import FlowMatching
from kd_diffusers.train import mean_distance
from kd_hierarchical_prune import surgery
from kd_hierarchical_prune.blocks import find_blocks
from kd_hierarchical_prune.distill import PruneDistill
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kdcore import Component, PluginManager, api, hookimpl
from kdcore.errors import Interrupted, ModelError, RecipeError
from kdcore.recipe import TrainOptions
from kdcore.testing.conformance import assert_same_students, effect, run_cut

WIDTH, CLASSES, BLOCKS = 32, 4, 12


class Residual(nn.Module):
    """One residual block of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Velocity(nn.Module):
    """Twelve residual blocks from a noised point of the plane, its level and its component to a velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(2 + 1 + CLASSES, WIDTH)
        self.layers = nn.ModuleList(Residual() for _ in range(BLOCKS))
        self.leave = nn.Linear(WIDTH, 2)

    def forward(self, point: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        x = self.enter(torch.cat([point, sigma[:, None], nn.functional.one_hot(label, CLASSES)], dim=1))
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def predict(module: Any, batch: dict[str, Any]) -> Tensor:
    return module(batch["noised"].flatten(1), batch["timestep"] / 1000, batch["label"])[:, :, None, None]


def velocity(options: Any, task: Any) -> Denoiser:
    return Denoiser(Velocity(), FlowMatching(diffusers.FlowMatchEulerDiscreteScheduler()), predict=predict)


class Plugin:
    """Registers the network as a teacher, and interrupts after so many trials."""

    def __init__(self, trials: int | None = None) -> None:
        self.trials = trials

    @hookimpl
    def kd_register_teachers(self) -> list[Component]:
        return [Component("teacher", "velocity", velocity, summary="a residual MLP", tags=("diffusion",))]

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if (stage.name, step) == ("contribution", self.trials):
            os.kill(os.getpid(), signal.SIGINT)


def manager(**options: Any) -> PluginManager:
    made = PluginManager()
    made.register(Plugin(**options), name="velocity")
    return made


def recipe(**method: Any) -> dict[str, Any]:
    options = {"target_ratio": 0.76, "eligible_blocks": "all", "blocks": ["layers"], "train_teacher": True}
    options |= {"samples": 0, "calibration_samples": 64}
    return {
        "method": {"use": "hierarchical-prune", **options, **method},
        "teacher": "velocity",
        "data": {"use": "mixture-2d", "train": 256, "val": 64},
        "train": {"steps": 200, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 2e-3}, "log_every": 100},
        "stages": {"teacher": {"train": {"steps": 400}}},
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of the small network, and its final student."""
    return api.run(recipe(), run_dir=tmp_path_factory.mktemp("mlp") / "run", plugins=manager())


def cut_of(path: Path) -> dict[str, Any]:
    return json.loads(next(path.glob("stages/*-cut/artifact/cut.json")).read_text())


def test_distillation_repairs_what_the_cut_broke(done):
    rows = {row["model"]: row for row in done.rows}
    before, after = rows["cut"]["val/output-distance"], rows["student"]["val/output-distance"]
    assert rows["teacher"]["val/output-distance"] == 0 < before
    assert after <= 0.3 * before
    assert done.metrics["val/output-distance"] == after
    assert json.loads((done.path / "run.json").read_text())["higher_is_better"] is False


def test_three_blocks_and_their_parameters_are_gone(done):
    rows, cut = {row["model"]: row for row in done.rows}, cut_of(done.path)
    assert len(cut["cut"]) == 3
    assert rows["student"]["parameters"] == rows["teacher"]["parameters"] - cut["removed"]
    assert cut["removed"] == 3 * sum(p.numel() for p in Residual().parameters())
    assert rows["student"]["size_bytes"] < rows["teacher"]["size_bytes"]
    assert len(done.student.module.layers) == BLOCKS - 3


def test_what_comes_before_the_first_cut_is_bit_identical(done):
    (saved,) = done.path.glob("stages/*-teacher/artifact/stage.safetensors")
    from safetensors.torch import load_file

    teacher = {k.removeprefix("student.module."): v for k, v in load_file(saved).items()}
    student = dict(done.student.module.named_parameters())
    gone = [block for block, _ in cut_of(done.path)["cut"]]
    kept = [i for i in range(BLOCKS) if i not in gone]
    weight = "layers.{}.net.1.weight"
    changed = {
        old: not torch.equal(student[weight.format(new)], teacher[weight.format(old)]) for new, old in enumerate(kept)
    }
    assert changed == {i: i > min(gone) for i in kept}
    assert torch.equal(student["enter.weight"], teacher["enter.weight"])
    assert not torch.equal(student["leave.weight"], teacher["leave.weight"])


def test_the_least_important_blocks_are_the_least_missed(done):
    ranking = json.loads(next(done.path.glob("stages/*-cut/artifact/ranking.json")).read_text())
    order = [int(key.partition("\t")[0]) for key in ranking]
    assert sorted(order) == list(range(BLOCKS))
    assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
    run = api.Run(api.resolve(recipe(), manager(), "test"), manager(), done.path)
    (saved,) = done.path.glob("stages/*-teacher/artifact/stage.safetensors")
    from safetensors.torch import load_file

    teacher = velocity(None, None)
    teacher.module.load_state_dict({k.removeprefix("student.module."): v for k, v in load_file(saved).items()})
    least, most = (
        mean_distance(run, surgery.cut(teacher, [(i, None) for i in some], ["layers"]).model, teacher, "val", 64)
        for some in (order[:3], order[-3:])
    )
    assert least < most


def test_features_of_removed_and_frozen_blocks_are_not_compared():
    teacher = velocity(None, None)
    blocks = find_blocks(teacher.module, ["layers"])
    found = surgery.cut(teacher, [(5, None), (8, None)], ["layers"])
    surgery.freeze(found, pwp=True)
    stage = PruneDistill(found, teacher, blocks, HierarchicalPruneOptions(), 0)
    assert stage.watched == [6, 7, 9, 10, 11]
    batch = {"latents": torch.randn(4, 2, 1, 1), "label": torch.arange(4), "index": torch.arange(4)}
    terms = stage(batch)
    assert set(terms) == {"out", "feat"}
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    stage.close()


def test_killed_in_the_middle_of_the_analysis_it_goes_on_with_the_next_block(done, tmp_path):
    with pytest.raises(Interrupted, match="after 5 trials"):
        api.run(recipe(), run_dir=tmp_path / "run", plugins=manager(trials=5))
    archive = tmp_path / "run" / "stages" / "02-contribution" / "archive.jsonl"
    first = archive.read_text()
    assert first.count("\n") == 5
    resumed = api.run(recipe(), run_dir=tmp_path / "run", plugins=manager())
    assert archive.read_text().startswith(first)
    assert archive.read_text().count("\n") == BLOCKS + 1
    assert resumed.metrics == done.metrics
    assert_same_students(done.path, resumed.path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"cut_blocks": "3,99"}, r"method.cut_blocks: there is no block 99; the model has 12, 0 to 11"),
        ({"cut_blocks": "layer.3"}, r"no block 'layer.3'; did you mean 'layers.3'"),
        ({"cut_blocks": "3:attention"}, r"block 3 \(layers.3\) has no component 'attention'"),
        ({"cut_blocks": "5-5"}, "half-open"),
        ({"cut_blocks": "0-12"}, "every block would be removed"),
        ({"eligible_blocks": "second_half"}, "did you mean 'second-half'"),
        ({"eligible_blocks": "11,12"}, "no block 12"),
        ({"target_ratio": 0.05}, "every block would be removed; name fewer, or raise target_ratio"),
        ({"target_ratio": 0.2, "eligible_blocks": "9-12"}, "let more blocks be pruned"),
        ({"target_ratio": 1.0}, "1 keeps every parameter"),
        ({"target_ratio": 0.0}, "greater than 0"),
        ({"metric": "nowhere:score"}, "method.metric: 'nowhere:score' belongs to no installed plugin"),
        ({"metric": "kd_diffusers.nowhere:score"}, "method.metric: 'kd_diffusers.nowhere:score' cannot be loaded"),
        ({"train_blocks": "40"}, "method.train_blocks: there is no block 40"),
        ({"kd_streams": ["img", "img"]}, "named twice"),
    ],
)
def test_wrong_options_get_a_clear_sentence(method, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        api.run(
            recipe(train_teacher=False, calibration_samples=8, **method), run_dir=tmp_path / "run", plugins=manager()
        )


@pytest.mark.parametrize(
    ("method", "message"),
    [({"blocks": []}, "no ordered list of blocks"), ({"blocks": ["layer"]}, "did you mean 'layers'")],
)
def test_a_model_without_the_list_of_blocks_is_refused(method, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        api.run(recipe(**method), run_dir=tmp_path / "run", plugins=manager())


def test_a_teacher_that_is_no_denoiser_is_refused(tmp_path):
    made = {**recipe(), "teacher": {"use": "demo-cnn"}, "data": "digits"}
    with pytest.raises(ModelError, match=r"teachers.teacher is no denoiser"):
        api.run(made, run_dir=tmp_path / "run", plugins=manager())


def short(**method: Any) -> dict[str, Any]:
    made = recipe(train_teacher=False, calibration_samples=8, **method)
    return {**made, "train": {**made["train"], "steps": 2}, "stages": {}}


def test_an_empty_cut_prunes_nothing(tmp_path):
    run = api.run(short(cut_blocks=""), run_dir=tmp_path / "run", plugins=manager())
    assert run.metrics["val/output-distance"] == 0
    assert not list(run.path.glob("stages/*-distill"))


def score(run: Any, model: Denoiser) -> float:
    """A metric of one's own: the size of the weights."""
    return sum(float(layer.net[1].weight.abs().sum()) for layer in model.module.layers)


def test_a_metric_of_ones_own_decides(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kd_diffusers.my_metric", sys.modules[__name__])
    method = {"metric": "kd_diffusers.my_metric:score", "position_weight": False, "l_out": 0.0, "l_feat": 0.0}
    run = api.run(short(**method), run_dir=tmp_path / "run", plugins=manager())
    teacher = json.loads(next(run.path.glob("stages/*-cut/artifact/ranking.json")).read_text())
    chosen = sorted(block for block, _ in cut_of(run.path)["cut"])
    assert chosen == sorted(int(key.partition("\t")[0]) for key in list(teacher)[:3])


class Rates:
    """Keeps the learning rates that the stage `distill` gives its parameters."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if stage.name == "distill":
            groups = stage.optimizers(TrainOptions(optimizer={"lr": 1.0}))["loss"].param_groups
            self.seen = sorted(group["lr"] for group in groups)


@pytest.mark.parametrize(("threshold", "several"), [(0.1, True), (0.9, False)])
def test_inverse_guidance_gives_each_block_its_own_rate_above_the_threshold(threshold, several, tmp_path):
    plugins, rates = manager(), Rates()
    plugins.register(rates, name="rates")
    method = {"cut_blocks": "2,4,6,8", "sgd_mode": "inverse", "sgd_threshold": threshold}
    api.run(short(**method), run_dir=tmp_path / "run", plugins=plugins)
    assert max(rates.seen) == 1.0
    assert (len(rates.seen) > 1) == several
    assert all(0 <= rate <= 1 for rate in rates.seen)


def test_quantised_student_of_the_quickstart_reloads(tmp_path):
    pytest.importorskip("bitsandbytes")
    steps = ["train.steps=2", "stages.teacher.train.steps=2", "method.quantize=nf4", "method.samples=2",
             "method.sampling_steps=2", "method.granularity=component"]  # fmt: skip
    run = api.run("hierarchical-prune", steps, run_dir=tmp_path / "run")
    rows = {row["model"]: row for row in run.rows}
    assert rows["student, nf4"]["size_bytes"] < 0.4 * rows["student"]["size_bytes"]
    assert rows["student, nf4"]["parameters"] == rows["student"]["parameters"]
    assert list(run.path.glob("stages/*-measure/artifact/samples.png"))
    _, loaded = api.load_student(run.path)
    batch = run.student.noised(api.load_student(run.path)[0].data.sample("val"))
    with torch.no_grad():
        found = [m.eval()(batch).extras["prediction"] for m in (run.student, loaded)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_the_student_of_the_quickstart_is_plain_diffusers(tmp_path):
    run = run_cut("hierarchical-prune", tmp_path / "run")
    plain = diffusers.SD3Transformer2DModel.from_pretrained(run.path / "student")
    assert plain.config.num_layers == 6
    batch = run.student.noised(api.load_student(run.path)[0].data.sample("val"))
    with torch.no_grad():
        torch.testing.assert_close(run.student.like(plain).eval()(batch).extras["prediction"],
                                   run.student.eval()(batch).extras["prediction"], atol=1e-5, rtol=1e-5)  # fmt: skip


def test_method_beats_its_ablation(tmp_path):
    assert effect("hierarchical-prune", tmp_path, seeds=(0, 1)) > 0.005
