import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from kd_barm.measure import GroupIoU
from kd_barm.method import BARM
from kd_barm.modules import ASPP, BackgroundResidualHead
from kd_barm.protocol import Steps
from kd_barm.segmenter import UNSEEN, IncrementalSegmenter
from kdcore import Model, Outputs, api
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.plugins import PluginManager
from kdcore.recipe import find_recipe, load
from kdcore.testing import effect

SIZE, CLASSES = 16, 4
SHORT = ["train.steps=2", "train.log_every=1", "data.train=40", "data.test=20"]


class Net(nn.Module):
    """A segmenter of stride 4 with batch norm and a 1x1 head."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image))


def samples(count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Images whose colour tells the class of each 8x8 block; the first row of pixels is ignored."""
    mask = torch.randint(CLASSES, (count, 2, 2), generator=torch.Generator().manual_seed(0))
    mask = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    image = colours[mask].movedim(-1, 1).contiguous()
    mask[:, 0] = IGNORE
    return [{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)]


def blocks(train: list | None = None) -> DataModule:
    task = Task("segmentation", ("ground", "red", "green", "blue"), image=(3, SIZE, SIZE))
    return DataModule({"train": samples() if train is None else train, "val": samples()}, task)


def learn(path, data: DataModule | None = None, net: nn.Module | None = None, **options):
    train = {"steps": 1, "batch_size": 4, "log_every": 1}
    method = {"use": "barm", "task": "2-1", "channels": 8, **options}
    return api.distill(None, net or Net(), data or blocks(), method, train=train, run_dir=path)


def terms(path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["terms"] for line in lines if line["stage"] == stage and "terms" in line]


def segmenter(order=(0, 1, 2, 3), **arguments) -> IncrementalSegmenter:
    torch.manual_seed(0)
    head = {"channels": 8, "num_classes": [1, 2], **arguments}
    return IncrementalSegmenter.build(Model(Net()), blocks().sample("train"), "@head:input", order, False, head).eval()


@pytest.mark.parametrize(
    ("task", "classes", "groups"),
    [
        ("2-1", 5, ((1, 2), (3,), (4,))),
        ("15-5", 21, (tuple(range(1, 16)), tuple(range(16, 21)))),
        ("4-1", 5, ((1, 2, 3, 4),)),
    ],
)
def test_a_task_divides_the_classes(task, classes, groups):
    steps = Steps.of(task, classes)
    assert steps.groups == groups
    assert steps.order == tuple(range(classes))
    assert steps.seen(len(groups) - 1) == classes


@pytest.mark.parametrize(("task", "classes", "said"), [("3-2", 5, "4 or 6 classes"), ("5-1", 4, "6 classes")])
def test_a_task_that_does_not_add_up_names_both_numbers(task, classes, said):
    with pytest.raises(RecipeError, match=f"{said}.*the data has {classes}"):
        Steps.of(task, classes)


def test_classes_are_learned_in_the_order_asked_for():
    steps = Steps.of("2-1", 4, [3, 1, 2])
    assert steps.groups == ((3, 1), (2,))
    assert steps.numbers(0, False).tolist() == [0, 2, 0, 1]
    assert steps.numbers(1, False).tolist() == [0, 0, 3, 0]
    assert steps.numbers(1, True).tolist() == [0, 2, 3, 1]
    with pytest.raises(RecipeError, match="class_order"):
        Steps.of("2-1", 4, [0, 1, 2])


def test_protocols_choose_the_images_of_a_step():
    present = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    steps = Steps.of("1-1", 4)
    assert steps.images(present, 0, "overlap") == [0, 2]
    assert steps.images(present, 0, "disjoint") == [0]
    assert steps.images(present, 1, "overlap") == [1]
    assert steps.images(present, 1, "disjoint") == []


def test_a_step_sees_its_own_classes_and_is_measured_on_all_so_far():
    data = blocks()
    present = torch.stack([torch.bincount(s["mask"][1:].flatten(), minlength=CLASSES) > 0 for s in data["train"]])
    step = Steps.of("2-1", CLASSES, [3, 1, 2]).data(data, present, 1, "overlap", ["val"])
    assert len(step["train"]) == present[:, 2].sum()
    assert all(set(s["mask"].unique().tolist()) <= {IGNORE, 0, 3} for s in step["train"])
    whole = torch.stack([s["mask"] for s in step["val"]])
    truth = torch.stack([s["mask"] for s in data["val"]])
    for theirs, ours in ((0, 0), (3, 1), (1, 2), (2, 3), (IGNORE, IGNORE)):
        assert torch.equal(whole == ours, truth == theirs)
    assert step.task.classes == ("ground", "blue", "red", "green")


def test_the_head_grows_by_a_copy_of_the_first_branch():
    head = BackgroundResidualHead(4, 6, [1, 2])
    (head.branches[0][1].weight.data.fill_(2), head.branches[0][1].running_mean.fill_(3))
    head.grow(1)
    first, new = head.branches
    assert torch.equal(first[0].weight, new[0].weight)
    assert (new[1].weight == 2).all()
    assert (new[1].running_mean == 0).all()
    head.grow(2, copy_statistics=True)
    assert (head.branches[2][1].running_mean == 3).all()
    groups, features = head(torch.rand(1, 4, 5, 5))
    assert [g.shape[1] for g in groups] == [3, 2, 3]
    assert all(f.shape == (1, 6, 5, 5) for f in features)


def test_aspp_keeps_the_size_and_learns_from_a_single_image():
    aspp = ASPP(4, 6, [2, 3]).train()
    found = aspp(torch.rand(1, 4, 7, 5))
    found.sum().backward()
    assert found.shape == (1, 6, 7, 5)
    assert all(p.grad is not None for p in aspp.parameters())


def test_positive_residuals_change_no_prediction_of_the_old_classes():
    net, batch = segmenter(), blocks().sample("train")
    before = net.read(batch).logits
    net.head.grow(1)
    nn.init.zeros_(net.head.classifiers[1].weight)
    net.head.classifiers[1].bias.data = torch.tensor([50.0, 1.0])
    after = net.read(batch).logits
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] == UNSEEN).all()
    assert (after[:, 3] == 1).all()


def test_logits_stand_in_the_order_of_the_data():
    batch = blocks().sample("train")
    plain, moved = segmenter().read(batch).logits, segmenter(order=(0, 3, 1, 2)).read(batch).logits
    assert torch.equal(moved, plain[:, [0, 2, 3, 1]])


def test_a_saved_network_loads_again(tmp_path):
    net, batch = segmenter(rates=[1, 2]), blocks().sample("train")
    net.head.grow(1)
    net.save(tmp_path)
    again = IncrementalSegmenter.load(net.body, tmp_path).eval()
    torch.testing.assert_close(again.read(batch).logits, net.eval().read(batch).logits)
    (tmp_path / "barm.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be read"):
        IncrementalSegmenter.load(net.body, tmp_path)
    with pytest.raises(ModelError, match="not made by barm"):
        IncrementalSegmenter.load(net.body, tmp_path / "elsewhere")


def test_iou_of_groups_by_hand():
    metric = GroupIoU(3, {"miou": range(3), "miou-old": range(2), "miou-new": range(2, 3)}, torch.device("cpu"))
    predicted, labels = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, IGNORE]]])
    logits = nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    metric.update(Outputs(logits), {"mask": labels})
    found = metric.compute()
    assert found["miou-old"] == pytest.approx(0.5, abs=1e-5)
    assert found["miou-new"] == 0
    assert found["miou"] == pytest.approx(1 / 3, abs=1e-5)


def test_run_logs_the_weighted_terms_and_a_row_for_each_step(tmp_path):
    result = api.run("barm", SHORT, run_dir=tmp_path)
    assert [set(t) for t in terms(tmp_path, "step-0")] == [{"bce"}] * 2
    for stage in ("step-1", "step-2"):
        found = terms(tmp_path, stage)
        assert [set(t) for t in found] == [{"pb-bce", "bga-tri", "bga-bce", "bfd", "gkd"}] * 2
        assert found[0]["pb-bce"] > 0
    assert [row["model"] for row in result.rows] == ["step-0", "step-1", "step-2"]
    assert set(result.rows[1]) == {"model", *(f"test/miou{end}" for end in ("", "-old", "-new", "-base", "-added"))}
    last = result.rows[-1]
    assert result.metrics["test/miou-base"] == last["test/miou-base"]
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.metrics["test/miou"] == pytest.approx(last["test/miou"], abs=1e-3) or last["test/miou-new"] == 0
    run, student = api.load_student(tmp_path)
    assert student.module.head.num_classes == [1, 2, 1, 1]
    assert api.evaluate(tmp_path)["test/miou"] == pytest.approx(result.metrics["test/miou"])


def test_ablation_trains_on_the_labels_of_each_step_alone(tmp_path):
    api.run("barm", [*SHORT, *(f"{k}={v}" for k, v in BARM.ablation.items())], run_dir=tmp_path)
    assert [set(t) for stage in ("step-1", "step-2") for t in terms(tmp_path, stage)] == [{"pb-bce"}] * 4


def test_colours_are_learned_step_by_step_and_kept(tmp_path):
    options = {"lr_old": 1e-3, "lr_backbone": 1e-2}
    train = {"steps": 60, "batch_size": 6, "optimizer": {"name": "adamw", "lr": 1e-2}}
    scores = {}
    for name, more in (("method", {}), ("ablation", {k.removeprefix("method."): v for k, v in BARM.ablation.items()})):
        more = {k: None if v == "null" else v for k, v in more.items()}
        torch.manual_seed(0)
        result = api.distill(None, Net(), blocks(), {"use": "barm", "task": "2-1", "channels": 16}, train=train,
                             run_dir=tmp_path / name, **options, **more)  # fmt: skip
        scores[name] = result.metrics
    assert scores["method"]["val/miou-base"] >= scores["ablation"]["val/miou-base"] + 0.2
    assert scores["method"]["val/miou-added"] > 0.5


def test_given_modules_come_back_when_a_finished_run_is_opened(tmp_path):
    result = learn(tmp_path)
    train = {"steps": 1, "batch_size": 4, "log_every": 1}
    again = api.distill(
        None, Net(), blocks(), {"use": "barm", "task": "2-1", "channels": 8}, train=train, run_dir=tmp_path, resume=True
    )
    batch = blocks().sample("val")
    torch.testing.assert_close(again.student.eval()(batch).logits, result.student.eval()(batch).logits)


def test_batch_norms_stand_still_after_the_first_step(tmp_path):
    for freeze in (True, False):
        result = learn(tmp_path / str(freeze), freeze_bn=freeze)
        norms = [m for m in result.student.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [bool(m.weight.requires_grad) for m in norms] == [not freeze] * len(norms)
        assert bool((result.student.module.head.branches[1][1].running_mean == 0).all()) == freeze


def test_the_first_step_ends_with_its_best_weights(tmp_path, monkeypatch):
    scores = iter([0.1, 0.7, 0.3, 0.2])
    states = []

    def compute(self):
        value = next(scores, 0.0)
        return dict.fromkeys(self.groups, value)

    monkeypatch.setattr(GroupIoU, "compute", compute)
    monkeypatch.setattr("kd_barm.method.FirstStep.after_step", lambda self: states.append(weights(self.net)))
    monkeypatch.setattr("kd_barm.method.report", lambda run, stage, on: states.append(weights(stage.net)) or {})
    train = {"steps": 4, "batch_size": 4, "eval_every": 1}
    method = {"use": "barm", "task": "3-1", "channels": 8}
    api.distill(None, Net(), blocks(), method, train=train, run_dir=tmp_path)
    assert torch.equal(states[4], states[1])
    assert not torch.equal(states[4], states[3])


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=15", "task"),
        ("task=0-1", "task"),
        ("protocol=both", "protocol"),
        ("pseudo_thresh=2", "pseudo_thresh"),
        ("w_tri=-1", "w_tri"),
        ("background=shared", "residuals"),
        ("aspp_rates=[]", "aspp_rates"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("barm", [f"method.{override}"])


def test_data_that_do_not_fit_get_a_clear_sentence(tmp_path):
    def broken(**change):
        rows = samples()
        rows[3] = {**rows[3], **change}
        return blocks(rows)

    wrong = samples()[3]["mask"].clone()
    wrong[5, 5] = 9
    with pytest.raises(DataError, match=r"sample 3.*holds 9.*0 to 3"):
        learn(tmp_path, broken(mask=wrong))
    with pytest.raises(DataError, match=r"sample 3.*\[16, 15\].*\[3, 16, 16\]"):
        learn(tmp_path, broken(mask=samples()[3]["mask"][:, 1:]))
    with pytest.raises(DataError, match="no `mask`"):
        learn(tmp_path, blocks([{"image": s["image"]} for s in samples()]))
    few = [{**s, "mask": s["mask"].where(s["mask"] != 3, 0)} for s in samples()]
    with pytest.raises(DataError, match=r"step 1 .*\(blue\)"):
        learn(tmp_path, blocks(few))
    rows = DataModule({"train": [(torch.rand(3, 8, 8), 1)] * 4}, Task("classification", num_classes=4))
    with pytest.raises(DataError, match="learns to segment"):
        learn(tmp_path, rows)
    with pytest.raises(RecipeError, match=r"3 or 5 classes.*the data has 4"):
        learn(tmp_path / "classes", task="2-2")


def test_maps_that_do_not_fit_get_a_clear_sentence(tmp_path):
    with pytest.raises(ModelError, match="matches no module"):
        learn(tmp_path, features="layer9")
    with pytest.raises(ModelError, match=r"matches 3 modules"):
        learn(tmp_path / "several", features="encoder.*")
    net = nn.Sequential(nn.Flatten(2), nn.Linear(SIZE * SIZE, 4))
    with pytest.raises(ModelError, match=r"not a map"):
        learn(tmp_path / "flat", features="0", net=net)
    with pytest.raises(RecipeError, match=r"stages.step-9"):
        api.run("barm", [*SHORT, "stages.step-9.train.steps=1"], run_dir=tmp_path / "other" / "named")


def paper(**student) -> dict[str, Any]:
    """The paper's recipe with generated shapes and another backbone, cut to a step a stage."""
    recipe = load(find_recipe("barm/paper", PluginManager())[0])
    recipe["data"] = {"use": "shapes", "size": 64, "train": 12, "test": 8, "val": 8}
    recipe["method"].update(task="3-1", channels=8)
    recipe["students"]["student"].update(pretrained=False, **student)
    recipe["train"].update(steps=1, batch_size=2, workers=0, precision="fp32")
    return {**recipe, "stages": {}}


def test_paper_recipe_runs_with_a_small_backbone_on_generated_shapes(tmp_path):
    result = api.run(paper(model="resnet10t"), run_dir=tmp_path)
    run, student = api.load_student(tmp_path)
    batch = run.data.sample("val")
    torch.testing.assert_close(student.eval()(batch).logits, result.student.eval()(batch).logits)
    assert student(batch).logits.shape == (2, 5, 4, 4)


def test_a_segmenter_of_transformers_learns_in_steps(tmp_path):
    pytest.importorskip("kd_transformers")
    config = {"model_type": "segformer", "depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4,
              "decoder_hidden_size": 8}  # fmt: skip
    student = {"use": "transformers", "config": config}
    recipe = {"method": {"use": "barm", "task": "3-1", "channels": 8}, "student": student,
              "data": {"use": "shapes", "train": 12, "test": 8, "val": 8},
              "train": {"steps": 1, "batch_size": 4}}  # fmt: skip
    result = api.run(recipe, run_dir=tmp_path)
    _, student = api.load_student(tmp_path)
    batch = api.load_student(tmp_path)[0].data.sample("val")
    torch.testing.assert_close(student.eval()(batch).logits, result.student.eval()(batch).logits)


@pytest.mark.parametrize(("name", "message"), [("resnet9000", "no model 'resnet9000'"), ("vgg11", "output_stride")])
def test_a_backbone_that_cannot_be_had_gets_a_clear_sentence(tmp_path, name, message):
    with pytest.raises(ModelError, match=message):
        api.run(paper(model=name), run_dir=tmp_path)


def test_students_that_keep_their_classes_beat_fine_tuned_ones(tmp_path):
    assert effect("barm", tmp_path, seeds=(0, 1, 2)) > 0.1  # measured: 0.153
