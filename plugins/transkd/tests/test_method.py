import json

import pytest
import torch
from torch import nn

from kd_transkd.losses import StridedCrossEntropy, TransKD
from kd_transkd.options import TransKDLossOptions
from kd_transkd.taps import find_embeddings
from kdcore import Model, Outputs, api
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.losses import count_samples
from kdcore.models import FromColumns
from kdcore.testing import effect

CLASSES, SIZE = 3, 32
SHORT = ["train.steps=2", "train.log_every=1", "teachers.teacher.train.steps=2", "data.train=40", "data.test=20"]


class Stage(nn.Module):
    """Patches, and a block that mixes their channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(channels_in, channels, stride, stride)
        self.block = nn.Conv2d(channels, channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        embedded = self.patch_embeddings(features)
        return embedded + self.block(embedded).relu()


class Pyramid(nn.Module):
    """Stages of strides 4, 8, 16 and so on, and logits from the first."""

    def __init__(self, *widths: int, stride: int = 4) -> None:
        super().__init__()
        ins = (3, *widths)
        strides = (stride, *[2] * (len(widths) - 1))
        self.stages = nn.ModuleList(Stage(i, o, s) for i, o, s in zip(ins[:-1], widths, strides, strict=True))
        self.head = nn.Conv2d(widths[0] + widths[-1], CLASSES, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = [image]
        for stage in self.stages:
            found.append(stage(found[-1]))
        context = found[-1].mean((2, 3), keepdim=True).expand(-1, -1, *found[1].shape[2:])
        return self.head(torch.cat([found[1], context], 1))


def model(*widths: int, stride: int = 4, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = Pyramid(*widths, stride=stride)
    return Model(net, stages=[f"stages.{i}" for i in range(len(widths))])


def student(**more: int) -> Model:
    return model(4, 6, 8, 8, **more)


def teacher(**more: int) -> Model:
    return model(6, 8, 10, 12, seed=1, **more).freeze()


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(count, 3, SIZE, SIZE, generator=generator),
        "mask": torch.randint(CLASSES, (count, SIZE, SIZE), generator=generator),
        "index": torch.arange(count),
    }


def bound(ours: Model, theirs: Model, **options) -> TransKD:
    torch.manual_seed(2)
    loss = TransKD(TransKDLossOptions(**options))
    loss.bind(ours, theirs)
    return loss


def values(loss: TransKD, ours: Model, theirs: Model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return loss(ours(inputs), theirs(inputs), inputs)


def data(count: int = 4, kind: str = "segmentation") -> DataModule:
    inputs = batch(count)
    samples = [{"image": i, "mask": m} for i, m in zip(inputs["image"], inputs["mask"], strict=True)]
    return DataModule({"train": samples}, Task(kind, num_classes=CLASSES, image=(3, SIZE, SIZE)))


def distill(path, ours: Model, theirs: Model, **options) -> dict[str, float]:
    api.distill(theirs, ours, data(), "transkd", train={"steps": 1, "batch_size": 4}, run_dir=path, **options)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return next(row["terms"] for row in rows if "terms" in row)


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_run_of_each_variant_logs_its_terms(variant, tmp_path):
    api.run("transkd", [*SHORT, f"method.variant={variant}", "method.gl_heads=2"], run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row["terms"] for row in rows if row.get("stage") == "distill" and "terms" in row]
    assert [set(terms) for terms in found] == [{"cross-entropy", "transkd/hcl", "transkd/embed"}] * 2
    assert all(value > 0 for terms in found for value in terms.values())


def test_ablation_is_cross_entropy_alone(tmp_path):
    terms = distill(tmp_path, student(), teacher(), hcl_weight=0, embed=0)
    assert set(terms) == {"cross-entropy"}


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_gradient_reaches_student_and_added_modules_and_no_teacher(variant):
    ours, theirs = student(), teacher()
    loss = bound(ours, theirs, variant=variant)
    sum(values(loss, ours, theirs, batch()).values()).backward()
    embeddings = [p.grad for stage in ours.module.stages for p in stage.patch_embeddings.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in embeddings)
    assert all(p.grad is not None for p in loss.parameters())
    assert all(p.grad is None for p in theirs.parameters())


def test_variants_add_their_modules_and_nothing_else():
    found = {}
    for variant in ("base", "gl", "ea"):
        ours, theirs = student(), teacher()
        loss = bound(ours, theirs, variant=variant)
        values(loss, ours, theirs, batch())
        found[variant] = {name for name, _ in loss.alignments.named_children() if loss.alignments[name].mixer}
        assisted = {name for name, _ in loss.alignments.named_children() if loss.alignments[name].assistant}
        assert assisted == ({"0", "1", "2", "3"} if variant == "ea" else set())
    assert found == {"base": set(), "gl": {"3"}, "ea": set()}


@pytest.mark.parametrize(("embed", "weights"), [(5, (0.1, 0.1, 0.5, 1.0)), (1, (1, 0, 0, 0)), (4, (0, 0, 0, 1))])
def test_embeddings_are_weighted_by_stage(embed, weights):
    ours, theirs, inputs = student(), teacher(), batch()
    loss = bound(ours, theirs, embed=embed, hcl_weight=0)
    found = values(loss, ours, theirs, inputs)
    expected = 0.0
    for i, weight in enumerate(weights):
        if weight:
            mine, target = (
                m(inputs).features[f"stages.{i}.patch_embeddings"].flatten(2).transpose(1, 2) for m in (ours, theirs)
            )
            expected += weight * (loss.alignments[str(i)].project(mine) - target).square().mean()
    assert set(found) == {"embed"}
    torch.testing.assert_close(found["embed"], expected)
    assert set(loss.alignments) == {str(i) for i, weight in enumerate(weights) if weight}


def test_assistant_reads_the_image_and_the_students_maps():
    ours, theirs, inputs = student(), teacher(), batch()
    loss = bound(ours, theirs, variant="ea", hcl_weight=0)
    before = values(loss, ours, theirs, inputs)["embed"]
    outputs = [m(inputs) for m in (ours, theirs)]
    moved = loss(*outputs, {**inputs, "image": inputs["image"].flip(-1)})["embed"]
    assert moved != before
    for i in range(4):
        outputs[0].features[f"stages.{i}"] = outputs[0].features[f"stages.{i}"] + 1
        now = loss(*outputs, inputs)["embed"]
        assert (now != before) == (i < 3)  # nothing reads the last one
        outputs[0] = ours(inputs)
    with pytest.raises(DataError, match="no `image`"):
        loss(*outputs, {"mask": inputs["mask"], "index": inputs["index"]})


@pytest.mark.parametrize("variant", ["base", "ea"])
@pytest.mark.parametrize("strides", [(4, 2), (2, 4)])
def test_stages_of_other_grids_are_resized(variant, strides):
    ours, theirs = student(stride=strides[0]), teacher(stride=strides[1])
    loss = bound(ours, theirs, variant=variant)
    found = values(loss, ours, theirs, batch())
    sum(found.values()).backward()
    assert all(value > 0 for value in found.values())


def test_terms_of_parts_combine_to_those_of_the_whole():
    ours, theirs, inputs = student(), teacher(), batch(5)
    inputs["mask"][0, :24] = IGNORE
    loss = bound(ours, theirs)
    values(loss, ours, theirs, inputs)
    loss.eval()  # batch norm is what cannot be equal
    entropy = StridedCrossEntropy([1.0, 3.0, 0.2])
    assert loss.count(inputs) == count_samples(inputs) == 5

    def terms(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = ours(part)
        return {**loss(outputs, theirs(part), part), "ce": entropy(outputs, Outputs(), part)}

    whole, parts = terms(inputs), []
    for rows in (slice(0, 2), slice(2, 5)):
        part = {key: value[rows] for key, value in inputs.items()}
        share = {"hcl": loss.count(part) / 5, "embed": loss.count(part) / 5}
        share["ce"] = entropy.count(part) / entropy.count(inputs)
        parts.append({name: value * share[name] for name, value in terms(part).items()})
    torch.testing.assert_close({name: parts[0][name] + parts[1][name] for name in whole}, whole)


def test_training_draws_features_and_embeddings_to_the_teachers():
    ours, theirs, inputs = student(), teacher(), batch(16)
    loss = bound(ours, theirs)
    first = values(loss, ours, theirs, inputs)
    optimizer = torch.optim.AdamW([*ours.parameters(), *loss.parameters()], lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(values(loss, ours, theirs, inputs).values()).backward()
        optimizer.step()
    last = values(loss, ours, theirs, inputs)
    assert all(last[name] < 0.5 * first[name] for name in first)


def test_patch_embeddings_of_segformer_and_pvt_are_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
    stages = [f"segformer.stages.{i}" for i in range(4)]
    net = Model(transformers.SegformerForSemanticSegmentation(config), stages=stages)
    assert find_embeddings(net, "student", stages) == [f"{stage}.patch_embeddings" for stage in stages]
    timm = pytest.importorskip("timm")
    net = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 1, 1))
    names = [f"stages.{i}" for i in range(4)]
    pvt = Model(net, stages=names)
    embeds = find_embeddings(pvt, "student", names)
    assert embeds == ["patch_embed", *(f"stages.{i}.downsample" for i in (1, 2, 3))]
    ours, theirs = student(), pvt.freeze()
    loss = bound(ours, theirs)
    found = values(loss, ours, theirs, batch())
    assert all(value > 0 for value in found.values())


def test_other_models_name_their_taps():
    ours, theirs, inputs = student(), teacher(), batch()
    automatic = values(bound(ours, theirs), ours, theirs, inputs)
    plain = Model(ours.module)
    named = bound(plain, theirs, student_stages=["stages.?"], student_embeds=["stages.?.patch_embeddings"])
    torch.testing.assert_close(values(named, plain, theirs, inputs), automatic)


@pytest.mark.parametrize(
    ("ours", "options", "message"),
    [
        (model(4, 6, 8), {}, "pairs 4 stages, but @all of the student are 3"),
        (student(), {"teacher_stages": ["stages.0", "stages.1"]}, "of the teacher are 2.*teacher_stages"),
        (student(), {"student_embeds": ["stages.*.patch_embeddings", "stages.0.block"]}, "embeds.*are 5"),
        (student(), {"student_stages": ["stages.?.block"]}, "no patch embedding.*student_embeds"),
        (student(), {"student_stages": ["layers.?"]}, "matches no module"),
        (Model(Pyramid(4, 6, 8, 8)), {}, "names no stages"),
    ],
)
def test_wrong_taps_are_refused(ours, options, message):
    with pytest.raises(ModelError, match=message):
        bound(ours, teacher(), **options)


def test_teacher_in_columns_is_refused():
    with pytest.raises(ModelError, match="live teacher"):
        TransKD().bind(student(), FromColumns({"logits": "teacher_logits"}))


def test_activations_that_are_no_maps_or_embeddings_are_refused():
    ours, theirs, inputs = student(), teacher(), batch()
    outputs = [m(inputs) for m in (ours, theirs)]
    loss = bound(ours, theirs)
    outputs = [m(inputs) for m in (ours, theirs)]
    outputs[0].features["stages.2"] = outputs[0].features["stages.2"].flatten(2)
    with pytest.raises(ModelError, match=r"student's 'stages.2'.*student_stages"):
        loss(*outputs, inputs)
    swapped = bound(ours, theirs, student_embeds=[f"stages.{i}.patch_embeddings" for i in (1, 0, 2, 3)])
    with pytest.raises(ModelError, match="grid of its stage"):
        values(swapped, ours, theirs, inputs)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    with pytest.raises(ModelError, match="gl_heads=3 does not divide the width 8"):
        distill(tmp_path, student(), teacher(), variant="gl", gl_heads=3)


def test_class_weights_count_the_classes(tmp_path):
    with pytest.raises(RecipeError, match=r"class_weights: 2 weights.*3 classes"):
        distill(tmp_path, student(), teacher(), class_weights=[1, 2])
    weighted = distill(tmp_path / "a", student(), teacher(), class_weights=[1, 9, 0], hcl_weight=0, embed=0)
    plain = distill(tmp_path / "b", student(), teacher(), hcl_weight=0, embed=0)
    assert weighted["cross-entropy"] != plain["cross-entropy"]


def test_data_without_pixel_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="segmentation"):
        api.distill(teacher(), student(), data(kind="unlabelled"), "transkd", train={"steps": 1}, run_dir=tmp_path)


def test_masks_beyond_the_classes_are_refused(tmp_path):
    wrong = data()
    wrong.splits["train"][1]["mask"][0, 0] = CLASSES
    with pytest.raises(DataError, match="sample 1: mask 3, but the 3 classes"):
        api.distill(teacher(), student(), wrong, "transkd", train={"steps": 1}, run_dir=tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variant=large", "variant"),
        ("embed=6", "embed"),
        ("embed_weights=[1,1,1]", "embed_weights"),
        ("embed_weights=[1,1,1,-1]", "embed_weights"),
        ("class_weights=[-1]", "class_weights"),
        ("mid_channel=8", "mid_channel.*mid_channels"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("transkd", [f"method.{override}"])


def test_distilled_students_beat_students_of_the_labels_alone(tmp_path):
    assert effect("transkd", tmp_path, seeds=(0, 1, 2)) > 0.02  # measured: 0.044
