import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

import kdcore
from kd_discovr import functional as f
from kd_discovr import vit
from kd_discovr.method import Discovr, frames_of
from kd_discovr.models import as_model
from kd_discovr.options import DISCOVROptions
from kdcore import PluginManager, Task, api, hookimpl
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError
from kdcore.recipe import load, resolve
from kdcore.runner import Run
from kdcore.testing.conformance import assert_same_students, effect

TINY = {"use": "discovr-vit", "width": 16, "layers": 1, "heads": 2, "patch": 8}
DATA = {"use": "heartbeats", "labelled": False, "train": 24, "val": 24, "test": 16, "frames": 4, "size": 16}
SMALL = {"head_outputs": 12, "head_hidden": 16, "head_bottleneck": 8, "prototypes": 8, "decoder_layers": 1,
         "mask_ratio": 0.5, "local_mask_ratio": 0.5, "image_mask_ratio": 0.5, "local_views": 2}  # fmt: skip
TRAIN = {"steps": 6, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}, "log_every": 1, "save_every": 2}


def recipe(method: Any = None, **changes: Any) -> dict[str, Any]:
    made = {"method": {"use": "discovr", **SMALL, **(method or {})}, "student": TINY, "data": DATA, "train": TRAIN,
            "trackers": []}  # fmt: skip
    return {**made, **{k: {**made.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def stage_of(where: Path, method: Any = None, **changes: Any) -> tuple[Discovr, dict[str, Any]]:
    """The stage, as it is before its first step, and a batch."""
    manager = PluginManager()
    run = Run(resolve(load(recipe(method, **changes)), manager), manager, where)
    torch.manual_seed(0)
    return Discovr(run, run.method.options), run.data.sample("train", 6)


def gradients(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


# -- structure -------------------------------------------------------------------------------------------------------


def test_clusters_reach_video_encoder_decoder_and_prototypes_alone(tmp_path):
    stage, batch = stage_of(tmp_path)
    stage.before_step([batch])
    terms = stage(batch)
    assert set(terms) == {"video", "image", "scd/video", "scd/image"}
    assert not terms["scd/image"].requires_grad
    terms["scd/video"].backward()
    assert gradients(stage.image) == 0
    assert gradients(stage.video.student["head"]) == gradients(stage.video.teacher) == 0
    assert min(map(gradients, (stage.video.student["encoder"], stage.decoder, stage.prototypes))) > 0


def test_each_branch_learns_from_its_own_loss(tmp_path):
    stage, batch = stage_of(tmp_path)
    stage.before_step([batch])
    stage(batch)["image"].backward()
    assert gradients(stage.image.student) > 0
    assert gradients(stage.video) == gradients(stage.image.teacher) == gradients(stage.decoder) == 0
    stage.zero_grad()
    stage(batch)["video"].backward()
    assert gradients(stage.video.student) > 0
    assert gradients(stage.image) == gradients(stage.video.teacher) == gradients(stage.prototypes) == 0


def test_teachers_begin_as_copies_and_follow_once_per_step(tmp_path):
    stage, batch = stage_of(tmp_path, {"ema_momentum": 0.9})
    pairs = [pair for branch in (stage.video, stage.image)
             for pair in zip(branch.teacher.parameters(), branch.student.parameters(), strict=True)]  # fmt: skip
    assert all(torch.equal(slow, fast) and not slow.requires_grad for slow, fast in pairs)
    before = [slow.clone() for slow, _ in pairs]
    with torch.no_grad():
        for _, fast in pairs:
            fast += 1.0
    stage.before_step([dict(batch), dict(batch)])
    for old, (slow, fast) in zip(before, pairs, strict=True):
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * fast)
    stage.progress = kdcore.losses.Progress(step=1)
    stage.before_step([batch])
    for old, (slow, fast) in zip(before, pairs, strict=True):
        torch.testing.assert_close(slow, 0.81 * old + 0.19 * fast)


def test_teachers_stay_in_evaluation_mode(tmp_path):
    stage, _ = stage_of(tmp_path)
    stage.train()
    for branch in (stage.video, stage.image):
        assert not any(module.training for module in branch.teacher.modules())
        assert branch.student["encoder"].training


def test_what_stands_idle_is_not_made(tmp_path):
    alone, batch = stage_of(tmp_path / "alone", {"image_weight": 0, "scd_weight": 0})
    assert alone.image is None
    assert not hasattr(alone, "decoder")
    assert set(alone(batch)) == {"video"}
    without, _ = stage_of(tmp_path / "without", {"scd_weight": 0})
    assert set(without(batch)) == {"video", "image"}
    fixed, _ = stage_of(tmp_path / "fixed", {"image_weight": 0, "scd_weight": 2.0})
    assert set(fixed(batch)) == {"video", "scd/video", "scd/image"}


def test_weights_multiply_their_terms(tmp_path):
    plain, batch = stage_of(tmp_path / "a")
    heavy, _ = stage_of(tmp_path / "b", {"video_weight": 2.0, "image_weight": 3.0, "scd_weight": 5.0})
    for stage in (plain, heavy):
        stage.before_step([batch])
    one, other = plain(batch), heavy(batch)
    for name, factor in (("video", 2), ("image", 3), ("scd/video", 5), ("scd/image", 5)):
        torch.testing.assert_close(other[name], factor * one[name])


def test_terms_are_the_functions_of_the_paper(tmp_path):
    stage, batch = stage_of(tmp_path)
    stage.before_step([batch])
    terms, video, targets = stage(batch), batch["video"], batch["targets"]
    draws = stage._draws(batch["index"], video)
    seen = stage.video.encoder.encode(stage.video.encoder.embed(video)[:, f.tube(torch.tensor([0, 1]), 2, 4)])
    assert seen.shape == (6, 5, 16)  # the masked tokens are gone, the class token is not
    visible = f.visible_positions(draws["local"], 0.5)
    views = []
    for view in range(2):
        tokens = f.take(stage.video.encoder.embed(video), f.tube(visible[view], 2, 4))
        views.append(stage.video.student["head"](stage.video.encoder.encode(tokens)[:, 0]))
    teacher = f.teacher_probabilities(targets["video_logits"], torch.zeros(1, 12), 0.04)
    torch.testing.assert_close(terms["video"], f.dino_ce(torch.stack(views), teacher, 0.1))
    tokens = f.standardise_tokens(stage.image.see(frames_of(video))[1]).unflatten(0, (6, 4))
    torch.testing.assert_close(targets["tokens"], tokens[:, ::2].flatten(1, 2))
    scores = f.prototype_scores(targets["tokens"], stage.prototypes.weight)
    assert torch.equal(targets["clusters"], f.assignments(scores))
    torch.testing.assert_close(stage.prototypes.weight.norm(dim=1), torch.ones(8))


def test_targets_belong_to_the_center_before_the_step(tmp_path):
    stage, batch = stage_of(tmp_path)
    stage.before_step([batch])
    logits = batch["targets"]["image_logits"]
    assert logits.shape == (24, 12)
    torch.testing.assert_close(batch["targets"]["image_probs"], (logits / 0.04).softmax(1))
    assert not stage.image.center.any()
    stage.after_step()
    torch.testing.assert_close(stage.image.center, 0.1 * logits.mean(0, keepdim=True))
    by_probs, batch = stage_of(tmp_path / "probs", {"center_on": "probs"})
    by_probs.before_step([batch])
    by_probs.after_step()
    torch.testing.assert_close(by_probs.video.center, 0.1 * batch["targets"]["video_probs"].mean(0, keepdim=True))


def test_micro_batches_are_clustered_together(tmp_path):
    stage, batch = stage_of(tmp_path)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 6))]
    whole = stage.teach([batch])[0]
    for name in ("clusters", "video_probs", "tokens"):
        torch.testing.assert_close(torch.cat([part[name] for part in stage.teach(parts)]), whole[name])


def test_masks_depend_on_seed_step_and_sample_alone(tmp_path):
    stage, batch = stage_of(tmp_path)
    video, index = batch["video"], batch["index"]
    whole = stage._draws(index, video)
    assert [list(whole[k].shape) for k in ("local", "global", "image")] == [[2, 6, 4], [6, 4], [2, 24, 4]]
    part = stage._draws(index[2:4], video[2:4])
    assert torch.equal(part["local"], whole["local"][:, 2:4])
    assert torch.equal(part["image"], whole["image"][:, 8:16])
    stage.progress = kdcore.losses.Progress(step=1)
    assert not torch.equal(stage._draws(index, video)["global"], whole["global"])


def test_code_options_pair_other_tokens_and_scale_the_image_loss(tmp_path):
    plain, batch = stage_of(tmp_path / "a")
    code, _ = stage_of(tmp_path / "b", {"token_alignment": "code", "image_loss_scale": "code"})
    for stage in (plain, code):
        stage.before_step([batch])
    one, other = plain(batch), code(batch)
    torch.testing.assert_close(other["image"], one["image"] * 256 / (8 * 4))
    assert not torch.isclose(other["scd/video"], one["scd/video"])
    assert other["video"] == one["video"]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_run_saves_the_teacher_or_the_student(tmp_path):
    for keep in ("teacher", "student"):
        run = api.run(recipe({"keep": keep}), run_dir=tmp_path / keep)
        assert run.metrics == {}
        prefix = f"video.{keep}.encoder."
        kept = {k.removeprefix(prefix): v for k, v in trained(run.path).items() if k.startswith(prefix)}
        saved = load_file(run.path / "student" / "model.safetensors")
        assert saved.keys() == kept.keys()
        assert all(torch.equal(saved[k], kept[k]) for k in saved)
    slow, fast = (load_file(tmp_path / k / "student" / "model.safetensors") for k in ("teacher", "student"))
    assert not torch.allclose(slow["norm.weight"], fast["norm.weight"])


def test_student_loads_without_this_project(tmp_path):
    run = api.run(recipe(), run_dir=tmp_path / "run")
    again, loaded = api.load_student(run.path)
    batch = again.data.sample("val", 3)
    with torch.no_grad():
        expected = run.student.eval()(batch).embedding
        assert torch.equal(loaded.eval()(batch).embedding, expected)
        assert torch.equal(vit.load(run.path / "student")(batch["video"])["embedding"], expected)
    assert expected.shape == (3, 16)


def test_probes_are_the_metrics_of_the_result(tmp_path):
    run = api.run(recipe({"probes": ["knn", "linear"], "probe_neighbours": 3}), run_dir=tmp_path / "run")
    assert next(iter(run.metrics)) == "val/knn-accuracy"
    assert {"val/knn-f1", "val/knn-balanced-accuracy", "val/linear-f1"} < set(run.metrics)
    assert all(0 <= value <= 1 for value in run.metrics.values())
    assert json.loads((run.path / "run.json").read_text())["metrics"] == run.metrics


class Killed(BaseException):
    """Ends the run where it stands, as a kill would."""


class Kill:
    """Ends the process's run at a step, by a signal or at once."""

    def __init__(self, step: int, signalled: bool) -> None:
        self.step, self.signalled = step, signalled

    @hookimpl
    def kd_step_finished(self, step: int) -> None:
        if step == self.step:
            if not self.signalled:
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("stages/01-discovr/artifact/stage.safetensors")))


def test_killed_in_the_middle_of_clustering_it_goes_on_bit_for_bit(tmp_path):
    made = recipe({"prototype_grad_from_image": True, "soft_targets": True, "center_on": "probs"})
    whole = api.run(made, run_dir=tmp_path / "whole").path
    for step, signalled, error in ((3, False, Killed), (5, True, Interrupted)):
        manager = PluginManager()
        manager.register(Kill(step, signalled), name="kill")
        with pytest.raises(error):
            api.run(made, run_dir=tmp_path / "killed", plugins=manager)
    resumed = api.run(made, run_dir=tmp_path / "killed").path
    assert_same_students(whole, resumed)
    one, other = trained(whole), trained(resumed)
    assert {"video.center", "image.center", "prototypes.weight"} < set(one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()


def test_accumulated_micro_batches_give_the_same_student(tmp_path):
    runs = [api.run(recipe({"prototype_grad_from_image": False}, train={"grad_accumulation": parts}),
                    run_dir=tmp_path / str(parts)).path for parts in (1, 4)]  # fmt: skip
    assert_same_students(*runs, tolerance=1e-5)


def test_half_precision_keeps_clusters_finite(tmp_path):
    run = api.run(recipe(train={"precision": "bf16", "steps": 2}), run_dir=tmp_path / "run")
    state = trained(run.path)
    assert all(value.isfinite().all() for value in state.values())
    assert state["prototypes.weight"].dtype == torch.float32


def test_modules_handed_over_in_python(tmp_path):
    samples = [{"video": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(12)]
    student = as_model(vit.VideoViT(width=16, layers=1, heads=2, patch=8))
    before = student.module.projection.weight.clone()
    given(tmp_path / "run", samples, student)
    assert not torch.equal(student.module.projection.weight, before)


def test_videomae_body_is_trained_and_saved_in_its_own_format(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=32)  # fmt: skip
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "published")
    student = {"use": "videomae", "model": str(tmp_path / "published")}
    made = {**recipe({"local_views": 1}), "student": student}
    run = api.run(made, run_dir=tmp_path / "run")
    again, loaded = api.load_student(run.path)
    batch = again.data.sample("val", 3)
    body = transformers.VideoMAEModel.from_pretrained(run.path / "student")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch).embedding, run.student.eval()(batch).embedding)
        tokens = body(batch["video"]).last_hidden_state
    assert tokens.shape == (3, 8, 16)
    first, last = (load_file(p / "model.safetensors") for p in (tmp_path / "published", run.path / "student"))
    assert not torch.equal(*(next(v for k, v in s.items() if "projection.weight" in k) for s in (first, last)))


# -- the paper's effect ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstarts(tmp_path_factory):
    """The folder of the quickstart and its ablation, two seeds of each, and the gain."""
    where = tmp_path_factory.mktemp("effect")
    return where, effect("discovr", where, seeds=(0, 1))


def test_beats_the_video_branch_alone(quickstarts):
    """Measured over eight seeds: 3.3 points of accuracy by nearest neighbours; 6.6 over these two."""
    assert quickstarts[1] > 0.016


def test_learns_more_than_an_untrained_encoder_knows(quickstarts, tmp_path):
    untrained = api.run("discovr", ["train.steps=1"], run_dir=tmp_path / "untrained").metrics
    trained_metrics = json.loads((quickstarts[0] / "method-0" / "run.json").read_text())["metrics"]
    for name in ("test/knn-accuracy", "test/linear-accuracy"):
        assert trained_metrics[name] > untrained[name] + 0.03


def test_clusters_belong_to_their_places_and_nothing_collapses(quickstarts):
    run, _ = api.load_student(quickstarts[0] / "method-0")
    stage = Discovr(run, run.method.options)
    load_model(stage, next((quickstarts[0] / "method-0").glob("stages/01-discovr/artifact/stage.safetensors")))
    batch = run.data.sample("train", 16)
    with torch.no_grad():
        targets = stage.teach([batch])[0]
        tokens, draw = stage.video.encoder.embed(batch["video"]), stage._draws(batch["index"], batch["video"])["global"]
        paired = stage._cluster_loss(tokens, draw, targets).student
        order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))
        shuffled = stage._cluster_loss(tokens, draw, {**targets, "clusters": targets["clusters"][:, order]}).student
    assert paired < 0.9 * shuffled
    for name in ("video_probs", "image_probs"):
        mean = targets[name].mean(0)
        assert -(mean * mean.log()).sum() > 0.5 * math.log(len(mean))
    assert targets["clusters"].unique().numel() > 0.75 * len(stage.prototypes.weight)


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.mask_ratio=1", "method.mask_ratio: .*less than 1"),
        ("method.prototypes=1", "method.prototypes: .*greater than or equal to 2"),
        ("method.sinkhorn_eps=0", "method.sinkhorn_eps: .*greater than or equal to 0.02"),
        ("method.token_alignment=none", "method.token_alignment: .*'aligned' or 'code'"),
        ("method.probes=[svm]", "method.probes.*'knn' or 'linear'"),
        ("method.ema=0.9", "method.ema: unknown key.*ema_momentum"),
        ("student.heads=5", "width 64 cannot be divided into 5 heads"),
        ("student.channels=1", "mean has 3 entries for 1 channels"),
        ("stages.discover.train.epochs=1", "no such stage.*discovr"),
        ("method.video_weight=0 method.scd_weight=0", "nothing would train the video encoder"),
    ],
)
def test_wrong_options_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("discovr", change.split())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"frames": 5}}, ModelError, "clips of 5 frames cannot be divided into tubelets of 2.*such as 6"),
        ({"data": {"frames": 2}, "student": {"tubelet": 4}}, ModelError, "clips of 2 frames .*such as 4"),
        ({"data": {"size": 20}}, ModelError, "frames of 20x20 pixels cannot be divided into patches of side 8"),
        ({"student": {"channels": 1, "mean": [0.5], "std": [0.5]}}, ModelError, "have 3 channels.*reads 1"),
        ({"student": {"use": "demo-cnn"}}, RecipeError, "unknown key"),
        ({"data": {"labelled": True}}, DataError, "poses a task of kind 'classification'.*'unlabelled'"),
        ({"method": {"probes": ["knn"], "probe_query": "vall"}}, DataError, "no split 'vall'"),
        ({"method": {"decoder_width": 10, "decoder_heads": 3}}, ModelError, "method.decoder_heads"),
        ({"student": {"checkpoint": "/nowhere"}}, ModelError, "checkpoint /nowhere cannot be loaded"),
    ],
)
def test_what_does_not_fit_gets_a_clear_sentence(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        api.run(recipe(**changes), run_dir=tmp_path / "run")


def test_more_prototypes_than_tokens_give_a_warning(tmp_path, caplog):
    stage, batch = stage_of(tmp_path, {"prototypes": 65})
    with caplog.at_level(logging.WARNING), torch.no_grad():
        stage.prepare(batch)
    assert "65 prototypes for the 64 tokens of a batch" in caplog.text
    caplog.clear()
    enough, batch = stage_of(tmp_path, {"prototypes": 64})
    with caplog.at_level(logging.WARNING), torch.no_grad():
        enough.prepare(batch)
    assert not caplog.text


def given(where: Path, samples: list[Any], student: Any = None, **options: Any) -> None:
    torch.manual_seed(0)
    student = student or as_model(vit.VideoViT(width=16, layers=1, heads=2, patch=8))
    kdcore.distill(None, student, {"train": samples}, "discovr", task=Task("unlabelled"), run_dir=where,
                   train=TRAIN, **{**SMALL, **options})  # fmt: skip


def test_batch_without_video_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"reads `video` \[B, T, C, H, W\], but the batch has: image, index"):
        given(tmp_path / "run", [{"image": torch.rand(3, 16, 16)} for _ in range(8)])


def test_probes_without_labels_are_refused_before_training(tmp_path):
    samples = [{"video": torch.rand(4, 3, 16, 16)} for _ in range(8)]
    with pytest.raises(DataError, match="asks for labels, but the clips of the split 'train' have none"):
        given(tmp_path / "run", samples, probes=["knn"], probe_query="train")


def test_probes_of_one_label_are_refused_before_training(tmp_path):
    samples = [{"video": torch.rand(4, 3, 16, 16), "label": 1} for _ in range(8)]
    with pytest.raises(DataError, match="all clips of the split 'train' have the same label"):
        given(tmp_path / "run", samples, probes=["linear"], probe_query="train")


def test_damaged_videomae_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=32)  # fmt: skip
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").write_bytes(b"damaged")
    for student in ({"model": str(tmp_path / "published")}, {"checkpoint": str(tmp_path / "published")}):
        with pytest.raises(ModelError, match=r"the VideoMAE model .*published' cannot be had"):
            api.run({**recipe(), "student": {"use": "videomae", **student}}, run_dir=tmp_path / "run")


def test_student_that_is_no_video_encoder_is_refused(tmp_path):
    samples = [{"video": torch.rand(4, 3, 16, 16)} for _ in range(8)]
    with pytest.raises(ModelError, match="masks the tokens of a video encoder, which a Linear is not"):
        given(tmp_path / "run", samples, torch.nn.Linear(2, 2))


def test_defaults_are_those_of_the_paper():
    o = DISCOVROptions()
    assert (o.prototypes, o.head_outputs, o.local_views, o.mask_ratio) == (3000, 16384, 4, 0.9)
    assert (o.sinkhorn_eps, o.sinkhorn_iterations, o.scd_temperature) == (0.05, 10, 0.1)
    assert (o.ema_momentum, o.center_momentum, o.student_temperature) == (0.996, 0.9, 0.1)
    assert (o.teacher_temperature_start, o.teacher_temperature, o.teacher_temperature_epochs) == (0.04, 0.07, 30)
