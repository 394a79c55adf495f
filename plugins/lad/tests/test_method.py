import json

import pytest
import torch
from torch import nn

from kd_lad.functional import distance, pixel_cross_entropy
from kd_lad.noising import CHANNEL, LabelNoising
from kd_lad.options import LADOptions
from kd_lad.stages import DistilLabels, TrainTeacher
from kd_lad.stem import WEIGHTS, LabelPlane
from kdcore import Model, api
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError, ModelError, RecipeError

CLASSES, SIZE = 3, 16
SHORT = ["train.steps=2", "stages.train_teacher_with_labels.train.steps=2", "train.log_every=1", "data.train=40",
         "data.test=20"]  # fmt: skip
TEACHER, STUDENT = "train_teacher_with_labels", "distil"


class Net(nn.Module):
    """A segmenter of any stride."""

    def __init__(self, stride: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(channels, 8, stride, stride), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image).relu())


class FourChannels(Net):
    """One that reads labels by itself."""

    def __init__(self) -> None:
        super().__init__(channels=4)

    def forward(self, image: torch.Tensor, label_channel: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([image, label_channel], 1))


def net(seed: int = 0, **more: int) -> Net:
    torch.manual_seed(seed)
    return Net(**more)


def blocks(count: int = 8) -> DataModule:
    """Images whose brightness tells the class of each 4x4 block; the first row of pixels has no label."""
    mask = torch.randint(CLASSES, (count, 4, 4), generator=torch.Generator().manual_seed(0))
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = (mask / CLASSES)[:, None].repeat(1, 3, 1, 1)
    mask[:, 0] = IGNORE
    samples = [{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)]
    task = Task("segmentation", num_classes=CLASSES, image=(3, SIZE, SIZE))
    return DataModule({"train": samples, "val": samples}, task)


def rows(path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["terms"] for line in lines if line["stage"] == stage and "terms" in line]


def distill(path, student: nn.Module, teacher: nn.Module | None = None, data: DataModule | None = None, **options):
    train = {"steps": 1, "batch_size": 4, "log_every": 1}
    return api.distill(teacher, student, data or blocks(), "lad", train=train, run_dir=path, **options)


class FakeRun:
    """As much of a run as the stages look at."""

    def __init__(self, student: Model) -> None:
        self.student, self.data, self.seed = student, blocks(), 0


def teacher_stage(**options) -> tuple[TrainTeacher, LADOptions]:
    made = LADOptions(plane_std=0.5, **options)
    model = Model(net(1))
    stage = TrainTeacher(FakeRun(Model(net())), model, LabelPlane(model, 3, 0.5), made, None)
    return stage, made


def student_stage(**options) -> DistilLabels:
    teacher = Model(net(1))
    LabelPlane(teacher, 3, 0.5)
    return DistilLabels(FakeRun(Model(net())), teacher, None, LADOptions(**options), None)


def test_a_run_trains_the_teacher_then_the_student_and_compares_them(tmp_path):
    result = api.run("lad", SHORT, run_dir=tmp_path)
    assert [p.name for p in sorted((tmp_path / "stages").iterdir())] == [f"01-{TEACHER}", f"02-{STUDENT}"]
    assert [set(terms) for terms in rows(tmp_path, TEACHER)] == [{"cross-entropy", "consistency"}] * 2
    assert [set(terms) for terms in rows(tmp_path, STUDENT)] == [{"cross-entropy", "lad"}] * 2
    assert all(value > 0 for stage in (TEACHER, STUDENT) for terms in rows(tmp_path, stage) for value in terms.values())
    assert [row["model"] for row in result.rows] == ["teacher, sees labels", "teacher, empty label channel", "student"]
    assert result.rows[-1]["test/miou"] == result.metrics["test/miou"]


def test_the_ablation_is_one_stage_of_cross_entropy(tmp_path):
    result = api.run("lad", [*SHORT, "method.kd_weight=0"], run_dir=tmp_path)
    assert [p.name for p in (tmp_path / "stages").iterdir()] == [f"01-{STUDENT}"]
    assert set(rows(tmp_path, STUDENT)[0]) == {"cross-entropy"}
    assert result.rows == []


def test_the_teacher_is_of_the_student_s_kind_unless_the_recipe_names_one(tmp_path):
    from safetensors.torch import load_file

    for name, more, channels in (("own", [], 8), ("named", ["teacher.use=demo-segmenter", "teacher.width=6"], 6)):
        api.run("lad", [*SHORT, *more], run_dir=tmp_path / name)
        (folder,) = (tmp_path / name / "stages").glob(f"*-{TEACHER}/artifact/teacher")
        (plane,) = load_file(folder / WEIGHTS).values()
        assert plane.shape == (channels, 1, 3, 3)


def test_the_teacher_s_loss_is_both_tasks_and_the_symmetric_consistency():
    stage, o = teacher_stage(consistency_weight=2, temperature=3)
    batch = blocks().sample("train", 4)
    channels = [stage.noising(batch, 0, TEACHER, path, 0) for path in (1, 2)]
    assert not torch.equal(*channels)
    one, two = (stage.student({**batch, CHANNEL: c}).logits for c in channels)
    found = stage(batch)
    tasks = sum(pixel_cross_entropy(logits, batch["mask"]) for logits in (one, two))
    torch.testing.assert_close(found["cross-entropy"], tasks)
    apart = distance(one, two, temperature=3) + distance(two, one, temperature=3)
    torch.testing.assert_close(found["consistency"], o.consistency_weight * apart)
    sum(found.values()).backward()
    assert stage.student.module.encoder[0].weight.grad[:, 3].abs().sum() > 0


def test_noise_depends_on_seed_step_and_sample_and_not_on_the_batch():
    noising = LabelNoising(CLASSES, "random", 1.0, 0.1, 1.75)
    batch = blocks().sample("train", 8)
    part = {key: value[3:5] for key, value in batch.items()}
    assert torch.equal(noising(batch, 0, 7)[3:5], noising(part, 0, 7))
    assert not torch.equal(noising(batch, 0, 7), noising(batch, 0, 8))
    assert not torch.equal(noising(batch, 0, 7), noising(batch, 1, 7))
    other = {**batch, "index": batch["index"] + 8}
    assert not torch.equal(noising(batch, 0, 7), noising(other, 0, 7))


@pytest.mark.parametrize(
    ("codes", "while_trained", "while_teaching"),
    [(None, "random", "fixed"), ("random", "random", "random"), ("fixed", "fixed", "fixed")],
)
def test_codes_are_random_for_the_teacher_and_fixed_for_the_student_unless_told(codes, while_trained, while_teaching):
    stages = teacher_stage(codes=codes)[0], student_stage(codes=codes)
    assert [stage.noising.codes for stage in stages] == [while_trained, while_teaching]
    assert [stage.noising.noise_std for stage in stages] == [0.03, 0.02]
    batch = blocks().sample("train", 4)
    codes = [stage.noising(batch, "x")[:, 0, 1:] for stage in stages]
    for name, channel in zip((while_trained, while_teaching), codes, strict=True):
        means = [channel[i][batch["mask"][i, 1:] == 0].mean() for i in range(4)]
        assert (torch.stack(means).std() < 0.05) == (name == "fixed")


def test_the_student_s_logits_do_not_depend_on_the_labels_and_the_teacher_s_do():
    stage = student_stage()
    batch = blocks().sample("train", 4)
    moved = {**batch, "mask": batch["mask"].flip(0)}
    (ours, theirs), (ours_moved, theirs_moved) = stage.outputs(batch), stage.outputs(moved)
    assert torch.equal(ours.logits, ours_moved.logits)
    assert not torch.equal(theirs["teacher"].logits, theirs_moved["teacher"].logits)


def test_the_student_is_given_no_targets():
    seen: list[set[str]] = []

    def call(module: nn.Module, batch: dict) -> torch.Tensor:
        seen.append(set(batch))
        return module(batch["image"])

    teacher = Model(net(1))
    LabelPlane(teacher, 3, 0.5)
    stage = DistilLabels(FakeRun(Model(net(), call)), teacher, None, LADOptions(), None)
    stage(blocks().sample("train", 2))
    assert seen == [{"image", "index"}]


def test_gradient_reaches_the_student_and_no_teacher():
    stage = student_stage()
    sum(stage(blocks().sample("train", 4)).values()).backward()
    assert all(p.grad is not None for p in stage.student.parameters())
    (teacher,) = stage.teachers.values()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert "teachers" not in "".join(stage.state_dict())


def test_weights_enter_the_terms():
    batch = blocks().sample("train", 4)
    plain, weighted = (student_stage(kd_weight=w)(batch)["lad"] for w in (1, 3))
    torch.testing.assert_close(3 * plain, weighted)


@pytest.mark.parametrize("kind", ["cwd", "kl"])
def test_terms_of_parts_combine_to_those_of_the_whole(kind):
    stage, batch = student_stage(distance=kind), blocks().sample("train", 8)
    batch["mask"][0, :10] = IGNORE
    whole, sums = stage(batch), {}
    for rows_ in (slice(0, 3), slice(3, 8)):
        part = {key: value[rows_] for key, value in batch.items()}
        for name, value in stage(part).items():
            sums[name] = sums.get(name, 0) + value * stage.counts(part)[name] / stage.counts(batch)[name]
    torch.testing.assert_close(sums, whole)


@pytest.mark.parametrize("kind", ["kl", "dist"])
def test_other_distances_train(kind, tmp_path):
    distill(tmp_path, net(), distance=kind)
    assert all(terms > 0 for stage in (TEACHER, STUDENT) for terms in rows(tmp_path, stage)[0].values())


def test_what_was_handed_over_as_a_teacher_stays_as_it_is(tmp_path):
    teacher = net(1)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    distill(tmp_path, net(), teacher)
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)


def test_a_student_with_a_channel_of_zeros_learns_the_same_and_is_saved_without_it(tmp_path):
    students = {name: net() for name in ("rgb", "zero_channel")}
    for name, student in students.items():
        distill(tmp_path / name, student, net(1), student_input=name)
        assert student.encoder[0].weight.shape == (8, 3, 4, 4)
    torch.testing.assert_close(*(dict(s.state_dict()) for s in students.values()))
    result = api.run("lad", [*SHORT, "method.student_input=zero_channel"], run_dir=tmp_path / "run")
    loaded = api.load_student(tmp_path / "run")[1].eval()
    batch = {"image": torch.rand(2, 3, 32, 32)}
    torch.testing.assert_close(loaded(batch).logits, result.student.eval()(batch).logits)


def test_auxiliary_heads_read_the_tapped_maps_and_are_left_out_of_the_student(tmp_path):
    options = ["method.aux_tap='@1'", "method.teacher_aux_tap=stage3", "method.aux_weight_teacher=0.1"]
    api.run("lad", [*SHORT, *options], run_dir=tmp_path)
    for stage in (TEACHER, STUDENT):
        assert all(terms["auxiliary"] > 0 for terms in rows(tmp_path, stage))
    loaded = api.load_student(tmp_path)[1].module.state_dict()
    assert not any("aux" in key for key in loaded)


def test_a_model_s_own_auxiliary_head_is_trained(tmp_path):
    class WithHead(Net):
        def forward(self, image: torch.Tensor) -> dict:
            logits = super().forward(image)
            return {"logits": logits, "extras": {"aux_logits": logits}}

    torch.manual_seed(0)
    distill(tmp_path, WithHead())
    for stage, count in ((TEACHER, 2), (STUDENT, 1)):
        (terms,) = rows(tmp_path, stage)
        assert terms["auxiliary"] == pytest.approx(0.4 * terms["cross-entropy"]), count


@pytest.mark.parametrize(
    ("tap", "message"),
    [("layer9", "layer9.*matches no module"), ("encoder.*", "aux_tap: .*matches 3 modules.*one map")],
)
def test_taps_that_name_no_single_map_are_told(tap, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        distill(tmp_path, net(), aux_tap=tap)


def test_a_trained_teacher_is_taken_from_its_checkpoint_and_not_trained_again(tmp_path):
    first = api.run("lad", SHORT, run_dir=tmp_path / "first")
    (folder,) = (tmp_path / "first" / "stages").glob(f"*-{TEACHER}/artifact/teacher")
    given = ["teacher.use=demo-segmenter", f"teacher.checkpoint={folder}"]
    again = api.run("lad", [*SHORT, *given, "method.train_teacher=false"], run_dir=tmp_path / "again")
    assert [p.name for p in (tmp_path / "again" / "stages").iterdir()] == [f"01-{STUDENT}"]
    assert again.rows[:2] == first.rows[:2]
    more = api.run("lad", [*SHORT, *given], run_dir=tmp_path / "more")  # trained further, from where it was
    assert rows(tmp_path / "more", TEACHER)[0]["cross-entropy"] < rows(tmp_path / "first", TEACHER)[0]["cross-entropy"]
    assert len(more.rows) == 3


def test_a_teacher_that_reads_labels_by_itself_is_taken_as_it_is(tmp_path):
    torch.manual_seed(1)
    distill(tmp_path / "trained", net(), FourChannels(), train_teacher=False)
    assert [p.name for p in (tmp_path / "trained" / "stages").iterdir()] == [f"01-{STUDENT}"]
    distill(tmp_path / "untrained", net(), FourChannels())
    assert (tmp_path / "untrained" / "stages" / f"01-{TEACHER}" / "artifact" / "teacher").is_dir()


def test_a_teacher_that_reads_no_labels_has_to_be_trained(tmp_path):
    with pytest.raises(ModelError, match=r"train_teacher is false.*label_channel"):
        distill(tmp_path / "python", net(), net(1), train_teacher=False)
    run = api.run("lad", [*SHORT, "method.kd_weight=0"], run_dir=tmp_path / "plain")
    given = ["teacher.use=demo-segmenter", f"teacher.checkpoint={run.path}", "method.train_teacher=false"]
    with pytest.raises(ModelError, match=rf"teachers.teacher.checkpoint.*{WEIGHTS}.*{TEACHER}"):
        api.run("lad", [*SHORT, *given], run_dir=tmp_path / "checkpoint")


@pytest.mark.parametrize("stride", [2, 8])
def test_a_teacher_of_another_stride_distils(stride, tmp_path):
    distill(tmp_path, net(), net(1, stride=stride))
    assert min(rows(tmp_path, STUDENT)[0].values()) > 0


def test_labels_that_are_no_class_are_told_with_the_sample(tmp_path):
    data = blocks()
    data["train"][2]["mask"][5, 5] = CLASSES
    with pytest.raises(DataError, match="sample 2: mask 3, but the 3 classes"):
        distill(tmp_path, net(), data=data)


def test_other_tasks_and_missing_masks_are_refused(tmp_path):
    samples = [{"image": torch.rand(3, SIZE, SIZE), "label": 1}] * 4
    for kind, message in (("classification", "segmentation"), ("segmentation", "no mask")):
        data = DataModule({"train": samples}, Task(kind, num_classes=CLASSES))
        with pytest.raises(DataError, match=message):
            distill(tmp_path / kind, net(), data=data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codes=gaussian", "codes"),
        ("distance=mse", "distance"),
        ("temperature=0", "temperature"),
        ("kd_weight=-1", "kd_weight"),
        ("student_input=labels", "student_input"),
        ("consistency=1", "consistency.*consistency_weight"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("lad", [f"method.{override}"])
