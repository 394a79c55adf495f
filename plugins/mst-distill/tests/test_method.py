import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kdcore
from kd_mst_distill.modules import DenseGateNet
from kd_mst_distill.selection import Best, validate
from kdcore import api, hookimpl
from kdcore.data import Task
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError
from kdcore.models import FromColumns
from kdcore.testing.conformance import assert_same_students, effect

SEEDS = (0, 1, 2)
PLAIN = {"use": "mst-distill", "mask_layers": {"teacher": ["fc1", "fc2"], "cross": ["fc1", "fc2"]}, "mask_heads": 2}


def states(run: Any, roles: tuple[str, ...] = ("teacher", "cross", "student")) -> dict[str, torch.Tensor]:
    return {f"{role}.{k}": v.clone() for role in roles for k, v in run.model(role).module.state_dict().items()}


def hooks(run: Any) -> int:
    return sum(len(m._forward_hooks) for role in ("teacher", "cross", "student") for m in run.model(role).modules())


class Watch:
    """What a run looked like at the start of each stage and after each step."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.stages: dict[str, Any] = {}
        self.before = torch.empty(0)
        self.hooks = 0

    @hookimpl
    def kd_stage_started(self, run: Any, stage: Any) -> None:
        self.states[stage.name], self.stages[stage.name] = states(run), stage
        if stage.name == "adapt_masks":
            self.before = validate(run, stage, stage.divergences, len(stage.masks))

    @hookimpl
    def kd_step_finished(self, run: Any, stage: Any) -> None:
        self.hooks += hooks(run)


def gate_use(stage: Any, split: Any) -> torch.Tensor:
    """The mean probability of every specialised teacher."""
    with torch.no_grad():
        logits = stage.student({"one": torch.stack([sample["one"] for sample in split])}).logits
        return stage.losses["routed"].gate(logits).softmax(1).mean(0)


@pytest.fixture(scope="module")
def studies(tmp_path_factory, manager, recipe):
    """For each seed, a run of all stages on the vectors, what was seen of it, and a student on the labels alone."""
    train = {"batch_size": 64, "optimizer": {"name": "adam", "lr": 1e-3}, "schedule": "constant", "log_every": 100,
             "save_every": 10_000}  # fmt: skip
    first, second = ({"epochs": e, "optimizer": {"lr": lr}} for e, lr in ((15, 3e-3), (5, 1e-3)))
    found = []
    for seed in SEEDS:
        where, watch = tmp_path_factory.mktemp(f"seed-{seed}"), Watch()
        shared = {"data": {"use": "clouds", "seed": seed}, "eval": {"on": ["test"]}, "seed": seed}
        stages = {"co_train": {"train": first}, "adapt_masks": {"train": second}}
        ours = recipe(method=PLAIN, train={**train, "epochs": 30}, stages=stages, **shared)
        result = api.run(ours, run_dir=where / "mst", plugins=manager(watch))
        alone = {"method": "supervised", "student": ours["student"], "train": {**train, "epochs": 45}, "trackers": []}
        plain = api.run({**alone, **shared}, run_dir=where / "alone", plugins=manager())
        found.append((result, watch, plain))
    return found


def rows(path: Path, stage: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"][key] for line in lines if line["stage"] == stage and key in line.get("metrics", {})]


def test_masks_bring_the_teachers_nearer_to_the_student(studies):
    for result, watch, _ in studies:
        stage = watch.stages["adapt_masks"]
        names = [f"val/kl-{role}.fc{i}" for role in ("teacher", "cross") for i in (1, 2)]
        assert [f"val/kl-{name}" for name in stage.objectives] == names
        best = rows(result.path, "adapt_masks", "val/kl").index(pytest.approx(stage.best.value.item()))
        after = torch.tensor([rows(result.path, "adapt_masks", name)[best] for name in names])
        assert after.sum() < 0.96 * watch.before.sum()
        assert (after < 1.02 * watch.before).all()


def test_adapting_the_masks_leaves_teachers_and_student_as_they_are(studies):
    for _, watch, _ in studies:
        before, after = watch.states["adapt_masks"], watch.states["distill"]
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(not torch.equal(value, before[name]) for name, value in watch.states["co_train"].items())


def test_distilling_leaves_the_teachers_and_masks_as_they_are(studies):
    for result, watch, _ in studies:
        run = watch.stages["distill"].run
        wanted = watch.states["distill"]
        assert all(torch.equal(v, wanted[name]) for name, v in states(run, ("teacher", "cross")).items())
        saved = load_file(next(result.path.glob("stages/*-adapt_masks/artifact/stage.safetensors")))
        for i, expert in enumerate(watch.stages["distill"].teachers.values()):
            for name, value in expert.module[0].state_dict().items():
                assert torch.equal(value, saved[f"best.kept.{i}.{name}"])


def test_no_hook_remains_after_a_step(studies):
    for _, watch, _ in studies:
        assert watch.hooks == 0
        assert hooks(watch.stages["distill"].run) == 0


def test_all_specialised_teachers_are_used_alike(studies):
    for _, watch, _ in studies:
        stage = watch.stages["distill"]
        use = gate_use(stage.eval(), stage.run.data["test"])
        assert use.min() > 0.15
        assert use.max() < 0.35


def test_student_is_no_worse_than_one_on_the_labels_alone(studies):
    gains = [ours.metrics["test/accuracy"] - plain.metrics["test/accuracy"] for ours, _, plain in studies]
    assert sum(gains) / len(gains) > -0.01


def test_the_student_of_the_lowest_task_loss_and_the_masks_of_the_lowest_divergence_are_kept(studies):
    for result, watch, _ in studies:
        stage = watch.stages["distill"]
        losses = rows(result.path, "distill", "val/task-loss")
        assert len(losses) == 30
        assert stage.best.value == pytest.approx(min(losses))
        (value,) = validate(stage.run, stage, stage.task_loss, 1)
        assert value.item() == pytest.approx(min(losses), rel=1e-5)
        assert watch.stages["adapt_masks"].best.value == pytest.approx(
            min(rows(result.path, "adapt_masks", "val/kl")), rel=1e-6
        )
        assert [row["model"] for row in result.rows] == ["teacher", "cross", "student"]
        assert result.rows[2]["test/accuracy"] == result.metrics["test/accuracy"]


def test_best_keeps_the_state_of_the_lowest_value():
    layer = torch.nn.Linear(2, 2)
    best, wanted = Best([layer]), None
    for value in (3.0, 1.0, float("nan"), 2.0):
        torch.nn.init.normal_(layer.weight)
        wanted = layer.weight.clone() if value == 1.0 else wanted
        best.offer(torch.tensor(value), [layer])
    assert torch.equal(best.kept[0].weight, wanted)
    assert best.value == 1.0


def test_beats_its_ablation(tmp_path):
    """Measured over five seeds: 5 points of accuracy more than without the specialised teachers."""
    assert effect("mst-distill", tmp_path, seeds=(0, 1)) > 0.025


class Interrupt:
    """Asks the process to stop in the middle of a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if (stage.name, step) == (self.stage, 5):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind", ["recipe", "dense"])
def test_interrupted_in_any_stage_it_goes_on_bit_for_bit(tmp_path, manager, kind, request):
    made = request.getfixturevalue(kind)()
    if kind == "recipe":
        for role in (*made["teachers"].values(), made["student"]):
            role["norm"] = True
    whole = api.run(made, run_dir=tmp_path / "whole", plugins=manager())
    for stage in ("co_train", "adapt_masks", "distill"):
        with pytest.raises(Interrupted):
            api.run(made, run_dir=tmp_path / "stopped", plugins=manager(Interrupt(stage)))
    resumed = api.run(made, run_dir=tmp_path / "stopped", plugins=manager())
    assert resumed.metrics == whole.metrics
    assert resumed.rows == whole.rows
    assert_same_students(whole.path, resumed.path)
    journals = [(path / "metrics.jsonl").read_text() for path in (whole.path, resumed.path)]
    assert journals[0] == journals[1]


def test_segmentation_routes_each_image_once(tmp_path, manager, dense):
    watch = Watch()
    result = api.run(dense(), run_dir=tmp_path / "run", plugins=manager(watch))
    stage = watch.stages["distill"]
    assert set(result.metrics) == {"val/miou"}
    assert isinstance(stage.losses["routed"].gate, DenseGateNet)
    assert list(stage.teachers) == ["teacher.conv1", "teacher.conv2", "cross.conv1", "cross.conv2"]
    assert {type(mask).__name__ for mask in watch.stages["adapt_masks"].masks} == {"MaskNet2d"}
    assert watch.hooks == 0


def test_stacked_hooks_leave_the_earlier_masks_of_a_teacher_on(tmp_path, manager, recipe):
    logits = {}
    for stacked in (False, True):
        watch = Watch()
        options = {**PLAIN, "stacked_hooks": stacked}
        api.run(recipe(method=options), run_dir=tmp_path / str(stacked), plugins=manager(watch))
        stage = watch.stages["distill"]
        batch = stage.run.data.sample("val", 32)
        logits[stacked] = {name: expert(batch).logits for name, expert in stage.teachers.items()}
    for name, alone in logits[False].items():
        assert torch.equal(alone, logits[True][name]) == name.endswith("fc1"), name


def test_fewer_layers_make_fewer_teachers(tmp_path, manager, recipe):
    watch = Watch()
    options = {**PLAIN, "mask_layer_num": 1, "routing": "weighted", "lb_mode": "cv"}
    api.run(recipe(method=options), run_dir=tmp_path / "run", plugins=manager(watch))
    assert list(watch.stages["distill"].teachers) == ["teacher.fc1", "cross.fc1"]


def test_terms_and_stages_are_those_of_the_paper(tmp_path, manager, recipe):
    run = api.run(recipe(), run_dir=tmp_path / "run", plugins=manager())
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    terms = {stage: set() for stage in ("co_train", "adapt_masks", "distill")}
    for line in lines:
        terms[line["stage"]] |= set(line.get("terms", ()))
    roles = ("teacher", "cross", "student")
    assert terms["co_train"] == {f"{kind}/{role}" for kind, role in itertools.product(("task", "mutual"), roles)}
    assert terms["adapt_masks"] == {"teacher.fc1", "teacher.fc2", "cross.fc1", "cross.fc2"}
    assert terms["distill"] == {"task", "routed/kl", "routed/lb"}
    assert "arXiv:2507.07015" in (run.path / "README.md").read_text()


@pytest.mark.parametrize(("given", "steps"), [({}, [3, 3, 6]), ({"co_train_epochs": 3, "adapt_epochs": 2}, [9, 6, 6])])
def test_first_two_stages_have_one_epoch_unless_told(tmp_path, manager, recipe, given, steps):
    made = recipe(method={**PLAIN, **given}, stages={})
    made["train"] = {**made["train"], "epochs": 2}
    del made["train"]["steps"]
    watch = Watch()
    api.run(made, run_dir=tmp_path / "run", plugins=manager(watch))
    assert [(name, stage.total_steps) for name, stage in watch.stages.items()] == [
        *zip(("co_train", "adapt_masks", "distill"), steps, strict=True)
    ]


def test_the_loss_alone_routes_among_any_teachers(tmp_path, manager, recipe):
    base = recipe()
    made = {
        "method": "distill",
        "losses": ["cross-entropy", {"use": "routed-kd", "k": 2, "routing": "hard"}],
        "teachers": {role: {**spec, "train": {"steps": 4}} for role, spec in base["teachers"].items()},
        **{key: base[key] for key in ("student", "data", "train", "eval", "trackers")},
    }
    run = api.run(made, run_dir=tmp_path / "run", plugins=manager())
    assert set(run.metrics) == {"val/accuracy"}
    made["losses"][1]["k"] = 3
    with pytest.raises(ModelError, match="with k=3 needs at least 3 teachers; there are 2: teacher, cross"):
        api.run(made, run_dir=tmp_path / "wrong", plugins=manager())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.k=5", "k=5 teachers per sample, but mask_layer_num=2 makes only 4 specialised teachers"),
        ("method.routing=soft", "method.routing: .*'hard' or 'weighted'"),
        ("method.lb_mode=l2", "method.lb_mode: .*'kl' or 'cv'"),
        ("method.temperature=0", "method.temperature: .*greater than 0"),
        ("method.kl_decay=0", "method.kl_decay: .*greater than 0"),
        ("method.mask_layers.aux=[fc1]", "method.mask_layers.aux: unknown key; valid keys: cross, teacher"),
        ("method.mask_layers.cross=[]", "method.mask_layers.cross: .*at least 1"),
        ("method.mask_layer=1", "method.mask_layer: unknown key; did you mean .*mask_layer"),
        ("stages.co_training.train.epochs=1", "no such stage; did you mean 'co_train'"),
        ("student.inputs=[series, series]", "names a sensor twice"),
    ],
)
def test_wrong_options_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("mst-distill", [change])


def test_both_teachers_are_needed(recipe, manager):
    with pytest.raises(RecipeError, match=r"needs a teacher with the role 'cross'.*names: teacher"):
        api.plan(recipe(teachers={"teacher": "mlp"}), plugins=manager())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"use": "clouds", "train": ["one"]}}, DataError,
         r"the role 'teacher' \(MLP\) reads 'two', which .* split 'train' do not have; they have: one, label"),
        ({"data": {"use": "clouds", "val": ["two"]}}, DataError,
         "the role 'teacher' .*reads 'one', which the samples of split 'val' do not have; they have: two, label"),
        ({"student": {"use": "mlp", "inputs": ["two"], "by_name": True},
          "data": {"use": "clouds", "train": ["one"]},
          "teachers": {"teacher": {"use": "mlp", "inputs": ["one"]}, "cross": {"use": "mlp", "inputs": ["one"]}}},
         DataError, r"the role 'student' \(NamedMLP\) reads 'two', which .*'train' do not have; they have: one, label"),
        ({"method": {**PLAIN, "mask_layers": {"cross": ["fc9"]}}}, ModelError,
         "method.mask_layers.cross: 'fc9' matches no module of MLP; did you mean 'fc[123]'"),
        ({"method": {**PLAIN, "mask_layer_num": 3}}, ModelError,
         "method.mask_layers.teacher: method.mask_layer_num is 3, but these are only 2 layers of MLP: fc1, fc2"),
        ({"method": {**PLAIN, "mask_heads": 9}}, ModelError,
         "method.mask_layers.teacher: layer 'fc1' has 16 channels, which are too few for 9 heads"),
        ({"teachers": {"teacher": {"use": "mlp", "classes": 7}, "cross": {"use": "mlp", "inputs": ["two"]}}},
         ModelError, "teacher has 7 classes, student has 6"),
        ({"student": {"use": "mlp", "inputs": ["label"]}}, ModelError,
         r"the role 'student' \(MLP\) cannot take the samples of split 'train': .*dtype"),
        ({"data": {"use": "clouds", "kind": "multilabel"}}, DataError, "this is a 'multilabel' task"),
    ],
    ids=["missing in train", "missing in val", "missing by name", "no such layer", "too few layers", "too many heads",
         "classes", "wrong type", "task"],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_is_trained(tmp_path, manager, recipe, changes, error, message):
    with pytest.raises(error, match=message):
        api.run(recipe(**changes), run_dir=tmp_path / "run", plugins=manager())
    assert not list(tmp_path.glob("run/stages/*"))


def test_logits_of_another_size_are_refused(tmp_path, manager, dense):
    made = dense(student={"use": "fcn", "inputs": ["depth"], "stride": 2})
    with pytest.raises(ModelError, match=r"teacher's have \[2, 3, 8, 8\], the student's \[2, 3, 4, 4\]"):
        api.run(made, run_dir=tmp_path / "run", plugins=manager())


def test_modules_from_python_are_called_by_the_names_of_their_forward(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(wide, 8), torch.nn.Linear(8, 3)

        def run(self, *views: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(torch.cat(views, 1)).relu())

    class Both(Net):
        def forward(self, phone: torch.Tensor, watch: torch.Tensor) -> torch.Tensor:
            return self.run(phone, watch)

    class Phone(Net):
        def forward(self, phone: torch.Tensor) -> torch.Tensor:
            return self.run(phone)

    class Watch(Net):
        def forward(self, watch: torch.Tensor) -> torch.Tensor:
            return self.run(watch)

    torch.manual_seed(0)
    data = [(torch.randn(4), torch.randn(4), torch.tensor(i % 3)) for i in range(32)]
    options = {"mask_layers": {"teacher": ["fc1"], "cross": ["fc1"]}, "mask_layer_num": 1, "run_dir": tmp_path / "run",
               "task": Task("classification", num_classes=3), "train": {"steps": 2, "batch_size": 8}}  # fmt: skip
    teachers = {"teacher": Both(8), "cross": Phone(4)}
    keys = ("phone", "watch", "label")
    result = kdcore.distill(teachers, Watch(4), (data, data), "mst-distill", keys=keys, **options)
    assert set(result.metrics) == {"val/accuracy"}
    for wrong in (("phone", "clock", "label"), ("accel", "watch", "label")):
        with pytest.raises(DataError, match=f"they have: {', '.join(wrong)}"):
            kdcore.distill(teachers, Watch(4), (data, data), "mst-distill", keys=wrong,
                           **{**options, "run_dir": tmp_path / wrong[0] / wrong[1]})  # fmt: skip
    columns = FromColumns({"logits": "phone"})
    with pytest.raises(ModelError, match="hooks its layers: it needs a live model, not columns"):
        kdcore.distill({**teachers, "cross": columns}, Watch(4), (data, data), "mst-distill", keys=keys,
                       **{**options, "run_dir": tmp_path / "columns"})  # fmt: skip
    with pytest.raises(DataError, match="needs a split 'val'"):
        kdcore.distill(teachers, Watch(4), data, "mst-distill", keys=keys, **{**options, "run_dir": tmp_path / "val"})
