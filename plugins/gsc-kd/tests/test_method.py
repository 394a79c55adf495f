import copy
import json
import statistics

import pytest
import torch
from torch import nn

from kd_gsc_kd.co_train import ROLES, CoTrain
from kd_gsc_kd.method import GSCKD
from kd_gsc_kd.networks import cross_stage_feature
from kdcore import PluginManager, api
from kdcore.errors import DataError, ModelError, RecipeError, RunFolderError
from kdcore.evaluation import prepare
from kdcore.recipe import resolve
from kdcore.runner import Run
from kdcore.stages import Progress

VIT = {"use": "transformers", "config": {
    "model_type": "segformer", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "initializer_range": 0.1,
    "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8, "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0}}  # fmt: skip
CNN = {"use": "demo-segmenter", "width": 4}


def recipe(data: dict | None = None, train: dict | None = None, students: dict | None = None, **options) -> dict:
    """A small recipe with these options of the method."""
    return {
        "method": {"use": "gsc-kd", "region_dim": 8, "ramp": 0, **options},
        "students": {"cnn": CNN, "vit": VIT, **(students or {})},
        "data": {"use": "shapes", "size": 32, "train": 16, "val": 4, "test": 8, **(data or {})},
        "train": {"steps": 2, "batch_size": 4, "log_every": 1, **(train or {})},
        "eval": {"metrics": ["miou"], "on": ["test"]},
    }


def stage_of(path, **options) -> tuple[CoTrain, dict]:
    """A stage that is ready to be trained, in training mode, and a batch."""
    manager = PluginManager()
    run = Run(resolve(recipe(**options), manager, "test"), manager, path)
    torch.manual_seed(0)
    stage = CoTrain(run, run.method.options)
    prepare(run, stage)
    return stage.train(), run.data.sample("train", 4)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def of_part(state, part: str) -> dict:
    return {name: value.clone() for name, value in state.items() if part in name}


def test_both_students_are_saved_measured_and_load_again(tmp_path):
    given = recipe()
    given["students"] = dict(reversed(given["students"].items()))
    result = api.run(given, run_dir=tmp_path / "run")
    assert result.metrics["test/miou"] == result.metrics["test/miou-vit"] != result.metrics["test/miou-cnn"]
    assert [(row["model"], row["test/miou"]) for row in result.rows] == [
        (role, result.metrics[f"test/miou-{role}"]) for role in ROLES
    ]
    assert api.evaluate(tmp_path / "run")["test/miou"] == pytest.approx(result.metrics["test/miou-vit"])
    for role in ROLES:
        _, model = api.load_student(tmp_path / "run", role=role)
        assert not [name for name in model.module.state_dict() if "adapter" in name or "projector" in name]
    with pytest.raises(RunFolderError, match=r"several students .cnn, vit.*students/cnn"):
        api.student_folder(tmp_path / "run")


def test_evaluation_in_training_is_that_of_each_student(tmp_path):
    result = api.run(recipe(), run_dir=tmp_path / "run")
    (last,) = [row["metrics"] for row in rows(tmp_path / "run") if "test/miou" in row.get("metrics", {})][-1:]
    assert {name: last[name] for name in result.metrics} == pytest.approx(result.metrics)


def test_terms_and_who_teaches_are_logged(tmp_path):
    api.run(recipe(), run_dir=tmp_path / "run")
    terms = [row["terms"] for row in rows(tmp_path / "run") if "terms" in row]
    assert [set(t) for t in terms] == [
        {f"{term}/{role}" for term in ("cross-entropy", "hfd", "region", "pixel") for role in ROLES}
    ] * 2
    shares = [row["metrics"] for row in rows(tmp_path / "run") if "cnn-teaches/pixels" in row.get("metrics", {})]
    assert len(shares) == 2
    assert all(0 <= value <= 1 for share in shares for value in share.values())


def test_each_objective_sends_gradient_to_its_student_and_its_modules_alone(tmp_path):
    stage, batch = stage_of(tmp_path)
    for role, other in (ROLES, ROLES[::-1]):
        stage.zero_grad()
        sum(stage(batch, role).values()).backward()
        touched = {name for name, p in stage.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any(name.startswith(f"adapters.{role}") for name in touched)
        assert any(name.startswith(f"projectors.{role}") for name in touched)
        assert not [name for name in touched if f".{other}." in name]


def test_optimizers_divide_all_parameters_among_the_students(tmp_path):
    sgd = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
    stage, _ = stage_of(tmp_path, cnn={"optimizer": sgd}, vit={"lr_factors": {"decode_head.*": 10}})
    optimizers = stage.optimizers(stage.run.recipe.train)
    assert [type(optimizers[role]).__name__ for role in ROLES] == ["SGD", "AdamW"]
    owned = {role: {id(p) for group in optimizers[role].param_groups for p in group["params"]} for role in ROLES}
    for name, parameter in stage.named_parameters():
        assert [id(parameter) in owned[role] for role in ROLES] == [f".{role}." in name for role in ROLES], name
    rates = {id(p): group["lr"] for group in optimizers["vit"].param_groups for p in group["params"]}
    for name, parameter in stage.students["vit"].module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-2 if name.startswith("decode_head") else 1e-3)


def test_patterns_that_fit_nothing_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"method.vit.lr_factors: 'head.\*' fits no parameter"):
        api.run(recipe(vit={"lr_factors": {"head.*": 10}}), run_dir=tmp_path)


def test_running_statistics_move_in_the_own_step_only(tmp_path):
    stage, batch = stage_of(tmp_path)
    before = copy.deepcopy(stage.state_dict())
    stage(batch, "vit")
    for name, value in of_part(stage.state_dict(), "models.cnn").items():
        assert torch.equal(value, before[name]), name
    stage(batch, "cnn")
    moved = of_part(stage.state_dict(), "models.cnn.module.stage2.0.bn1.num_batches_tracked")
    assert list(moved.values()) == [torch.tensor(1)]


def test_hfd_alone_brings_low_features_nearer_and_leaves_the_other_net_alone(tmp_path):
    stage, batch = stage_of(tmp_path, weights={"region": 0, "pixel": 0})
    vit = stage.students["vit"]
    before = copy.deepcopy(vit.state_dict())
    optimizer = torch.optim.Adam([p for _, p in stage.trained("cnn")], lr=1e-2)
    distances = []
    for _ in range(50):
        term = stage(batch, "cnn")["hfd/cnn"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        distances.append(term.item() / 0.5)
    assert distances[0] - distances[-1] > 0.1
    torch.testing.assert_close(vit.state_dict(), before, rtol=0, atol=0)


def test_crossing_is_the_other_nets_stage_on_the_adapted_map(tmp_path):
    stage, batch = stage_of(tmp_path, weights={"region": 0, "pixel": 0})
    stage.eval()
    cnn, vit = (stage.students[role](batch) for role in ROLES)
    adapted = stage.adapters["cnn"](cnn.features["stage1"])
    adapted = nn.functional.interpolate(adapted, vit.features["segformer.stages.0"].shape[-2:], mode="bilinear")
    crossed = cross_stage_feature(stage.places["vit"].crossing, adapted)
    torch.testing.assert_close(crossed, stage.students["vit"].module.segformer.stages[1](adapted))
    expected = 1 - nn.functional.cosine_similarity(crossed, vit.features["segformer.stages.1"], dim=1).mean()
    torch.testing.assert_close(stage(batch, "cnn")["hfd/cnn"], 0.5 * expected)


def test_mutual_learning_is_the_divergence_of_all_pixels(tmp_path):
    stage, batch = stage_of(tmp_path, hfd=False, weights={"region": 0}, selection="none")
    assert not stage.adapters
    assert not stage.projectors
    assert not stage.places
    stage.eval()
    logits = {role: stage.students[role](batch).logits for role in ROLES}
    terms = stage(batch, "vit")
    assert set(terms) == {"cross-entropy/vit", "pixel/vit"}
    divergence = nn.functional.kl_div(logits["vit"].log_softmax(1), logits["cnn"].softmax(1), reduction="none")
    torch.testing.assert_close(terms["pixel/vit"], divergence.sum(1).mean())


def test_only_the_right_teach_under_reliable_only(tmp_path):
    stage, batch = stage_of(tmp_path, hfd="off", weights={"region": 0}, reliable_only=True, selection="none")
    stage.eval()(batch, "vit")
    right = stage.students["cnn"](batch).logits.argmax(1) == batch["mask"][:, 2::4, 2::4]
    assert stage.shares["cnn-teaches/pixels"] == pytest.approx(right.float().mean().item())


def test_weights_rise_over_the_ramp(tmp_path):
    stage, batch = stage_of(tmp_path, ramp=0.5)
    found = []
    for fraction in (0.0, 0.25, 0.5, 0.9):
        stage.progress = Progress(fraction=fraction)
        found.append(stage.eval()(batch, "cnn")["pixel/cnn"].item())
    assert found[0] == 0
    assert found[1:] == pytest.approx([found[3] / 2, found[3], found[3]])


def test_ablation_is_each_student_alone(tmp_path):
    off = {"hfd": "off", "weights": {"region": 0, "pixel": 0}}
    states = []
    for name, width in (("one", 4), ("two", 8)):  # of the cnn: the vit is the same whoever learns beside it
        api.run(recipe(students={"cnn": {**CNN, "width": width}}, **off), run_dir=tmp_path / name)
        states.append(api.load_student(tmp_path / name, role="vit")[1].state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_pixels_without_labels_and_grids_finer_than_the_maps_are_fine(tmp_path):
    stage, batch = stage_of(tmp_path, region_grid=64)
    batch["mask"] = batch["mask"].masked_fill(torch.rand(batch["mask"].shape) < 0.9, -100)
    batch["mask"][0] = -100
    for role in ROLES:
        assert all(value.isfinite() for value in stage(batch, role).values())
    batch["mask"][:] = -100
    terms = stage(batch, "cnn")
    assert terms["cross-entropy/cnn"] == terms["region/cnn"] == terms["pixel/cnn"] == 0


def test_other_students_and_tasks_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"students\.third"):
        api.run(recipe(students={"third": CNN}), run_dir=tmp_path / "a")
    classify = recipe(students={key: {"use": "demo-cnn"} for key in ROLES}) | {"data": {"use": "digits"}}
    with pytest.raises(DataError, match="kind 'classification'"):
        api.run(classify | {"eval": {"metrics": ["accuracy"]}}, run_dir=tmp_path / "b")
    with pytest.raises(RecipeError, match="role 'vit'"):
        api.run(recipe() | {"students": {"cnn": CNN}}, run_dir=tmp_path / "c")


def test_stages_without_maps_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"method.vit.stages"):
        api.run(recipe(hfd="direct", vit={"stages": ["segformer.stages.0.patch_embeddings", "segformer.stages.3"]}),
                run_dir=tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hfd=sideways", "hfd"),
        ("region_grid=0", "region_grid"),
        ("weights.hdf=1", r"hdf.*hfd"),
        ("selection=worse", "selection"),
        ("temperature=0", "temperature"),
        ("cnn.optimizer.name=sdg", "sdg|optimizer"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("gsc-kd", [f"method.{override}"])


def test_students_that_cooperate_beat_the_same_alone(tmp_path):
    """Mean over seeds of the mIoU, measured: of both students 0.029 more, of the ViT 0.065 more."""
    gains = {role: [] for role in ROLES}
    for seed in range(3):
        shared = [f"seed={seed}", "train.log_every=1000"]
        alone = [f"{key}={value}" for key, value in GSCKD.ablation.items()]
        together, apart = (
            api.run("gsc-kd", [*shared, *more], run_dir=tmp_path / f"{len(more)}-{seed}").metrics
            for more in ([], alone)
        )
        for role, gain in gains.items():
            gain.append(together[f"test/miou-{role}"] - apart[f"test/miou-{role}"])
    means = {role: statistics.mean(gain) for role, gain in gains.items()}
    assert means["vit"] > 0.03
    assert statistics.mean(means.values()) > 0.01
