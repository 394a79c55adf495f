"""What a stranger may hand over: pickles in the place of weights and data, paths that lead elsewhere, code that comes
with models, recipes that would like to be programs, and texts made for the terminal or the browser of who reads them.
"""

from __future__ import annotations

import contextlib
import html.parser
import http.server
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import kdcore
from kd_cli import pages, tables
from kd_cli.main import app
from kdcore import folder
from kdcore.card import model_card
from kdcore.data import Task
from kdcore.errors import KDError, RecipeError, RunFailed, RunFolderError, UserError
from kdcore.hookspecs import hookimpl
from kdcore.leaderboard import Standing
from kdcore.plugins import PluginManager
from kdcore.reading import load
from kdcore.recipe import find_recipe, resolve
from kdcore.text import render

CLASSES = Task("classification", num_classes=3, image=(3, 32, 32), classes=("a", "b", "c"))
TEXTS = Task("classification", num_classes=3, classes=("a", "b", "c"))
HOSTILE = "x|`y` <script>alert(1)</script> [red]z[/] [/] \x1b[2J\x1b]0;owned\x07\x9b1m $\\frac$\n| forged | row |"
"""Markup of the terminal, of Rich, Markdown, HTML and mathematics, and a row that is none."""

SHOWN = re.compile(r"\x1b\[([0-9;]*[mKA]|\?25[hl])|\r")
"""What colours text in a terminal and redraws progress, which our own output may."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# -- pickles ------------------------------------------------------------------------------------------------------


class Marker:
    """When it is unpickled, a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


def _saved(write: Callable[[io.BytesIO], object]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


class Trap:
    """The same pickle in every wrapping that loaders know.

    Args:
        mark: the file that appears if one of them is loaded.
    """

    def __init__(self, mark: Path) -> None:
        self.mark, value = mark, Marker(mark)
        array = np.array([value, value], dtype=object)
        self.forms: dict[str, bytes] = {
            "pickle": pickle.dumps({"state_dict": value, "weight": value}, protocol=2),
            "torch": _saved(lambda out: torch.save({"state_dict": {"weight": value}}, out)),
            "old torch": _saved(lambda out: torch.save({"w": value}, out, _use_new_zipfile_serialization=False)),
            "npy": _saved(lambda out: np.save(out, array, allow_pickle=True)),
            "npz": _saved(lambda out: np.savez(out, allow_pickle=True, logits=array)),
        }

    def check(self, path: Path, call: Callable[[], Any], names: str | None) -> None:
        """Put each form in a file's place and read it: it is refused, by a message that holds `names`; if there is
        nothing that would have to read the file (`None`), it may also go unnoticed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for form, content in self.forms.items():
            path.write_bytes(content)
            with contextlib.suppress(KDError) if names is None else pytest.raises((UserError, RunFailed)) as caught:
                call()
            assert not self.mark.exists(), f"{path} was unpickled ({form})"
            if names is not None:
                assert names in str(caught.value), form
                assert "Traceback" not in str(caught.value)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path / "unpickled")


def build(kind: Any, name: str, task: Task | None = None, /, **options: Any) -> Any:
    """A component, as a recipe would have it."""
    component = PluginManager().get(kind, name)
    made = (component.load_options() or (lambda **_: None))(**options)
    return component.load_target()(*([made] if task is None else [made, task]))


def test_the_trap_springs_where_pickles_are_loaded(trap: Trap, tmp_path: Path) -> None:
    readers: dict[str, Callable[[Path], Any]] = {
        "pickle": lambda path: pickle.loads(path.read_bytes()),
        "torch": lambda path: torch.load(path, weights_only=False),
        "old torch": lambda path: torch.load(path, weights_only=False),
        "npy": lambda path: np.load(path, allow_pickle=True),
        "npz": lambda path: np.load(path, allow_pickle=True)["logits"],
    }
    for form, read in readers.items():
        (tmp_path / "file").write_bytes(trap.forms[form])
        read(tmp_path / "file")
        assert trap.mark.exists(), form
        trap.mark.unlink()


RECIPE: dict[str, Any] = {
    "method": "kd",
    "teacher": {"use": "demo-cnn", "width": 4, "train": {"steps": 2}},
    "student": {"use": "demo-cnn", "width": 4},
    "data": "digits",
    "train": {"batch_size": 32, "steps": 6, "save_every": 2},
    "trackers": [],
}


class Interrupts:
    """Asks the run to end at a step of the student's training."""

    @hookimpl
    def kd_step_finished(self, run: Any, stage: Any, step: int) -> None:
        if stage.name != "teacher" and step == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trained teacher and a checkpoint of its student."""
    path, manager = tmp_path_factory.mktemp("interrupted") / "run", PluginManager()
    manager.register(Interrupts())
    with pytest.raises(kdcore.errors.Interrupted):
        kdcore.run(RECIPE, run_dir=path, plugins=manager)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a student and a comparison."""
    path = tmp_path_factory.mktemp("finished") / "run"
    recipe = {key: value for key, value in RECIPE.items() if key != "teacher"}
    kdcore.run({**recipe, "method": "supervised"}, run_dir=path)
    return path


@pytest.fixture
def mine(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "done"))


def sign(where: Path) -> None:
    """Write the digests of a folder's files anew, as who changed them would."""
    manifest = json.loads((where / folder.MANIFEST).read_text())
    files = [p for p in where.rglob("*") if p.is_file() and p.name != folder.MANIFEST]
    manifest["files"] = {str(p.relative_to(where)): folder._digest(p) for p in files}
    manifest.pop("digest")
    (where / folder.MANIFEST).write_text(json.dumps(folder._sealed(manifest)))


def resume(where: Path, root: Path) -> None:
    """Go on with a run, one folder of which was signed anew."""
    sign(where)
    copy = Path(shutil.copytree(root, root.with_name("copy"), dirs_exist_ok=False))
    try:
        kdcore.run(RECIPE, run_dir=copy)
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_pickle_in_a_checkpoint_is_refused_by_name(mine: Path, trap: Trap, name: str) -> None:
    (checkpoint, *_) = mine.glob("stages/*-distill/checkpoints/step-00000003")
    trap.check(checkpoint / name, lambda: resume(checkpoint, mine), "step-00000003")


def test_a_pickle_beside_the_files_of_a_checkpoint_is_not_loaded(mine: Path, trap: Trap) -> None:
    (checkpoint, *_) = mine.glob("stages/*-distill/checkpoints/step-00000003")
    for name in ("scaler.pt", "sampler.bin", "dl_state_dict.bin", "custom_checkpoint_0.pkl"):
        (checkpoint / name).write_bytes(trap.forms["torch"])
    with contextlib.suppress(KDError):
        resume(checkpoint, mine)
    assert not trap.mark.exists()
    for name in ("scaler.pt", "custom_checkpoint_0.pkl", "model.safetensors"):
        (checkpoint / name).unlink()  # without it Accelerate would look for the weights in torch's format
    trap.check(checkpoint / "pytorch_model.bin", lambda: resume(checkpoint, mine), "step-00000003")


def test_a_pickle_in_the_artifact_of_a_stage_is_refused_by_name(mine: Path, trap: Trap) -> None:
    (artifact,) = mine.glob("stages/01-teacher/artifact")
    trap.check(artifact / "stage.safetensors", lambda: resume(artifact, mine), "01-teacher")
    for other in ("stage.bin", "pytorch_model.bin", "tensors.pt"):
        trap.check(artifact / other, lambda: resume(artifact, mine), "01-teacher")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_pickle_in_the_folder_of_a_student_is_refused_by_name(done: Path, trap: Trap, name: str) -> None:
    def evaluate() -> None:
        if name != "manifest.json":
            sign(done / "student")
        kdcore.evaluate(done)

    trap.check(done / "student" / name, evaluate, name)


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_a_pickle_in_the_place_of_what_a_run_says_of_itself_is_refused_by_name(
    mine: Path, done: Path, trap: Trap, name: str
) -> None:
    trap.check(mine / name, lambda: kdcore.run(RECIPE, run_dir=mine), name)
    trap.check(done / name, lambda: kdcore.compare([done]), name)


def test_a_pickle_in_the_place_of_a_journal_or_archive_is_not_loaded(mine: Path, done: Path, trap: Trap) -> None:
    from kdcore.leaderboard import curves
    from kdcore.search import read_archive

    trap.check(done / "metrics.jsonl", lambda: curves(done), "metrics.jsonl")
    trap.check(done / "archive.jsonl", lambda: read_archive(done / "archive.jsonl"), "archive.jsonl")
    trap.check(mine / "metrics.jsonl", lambda: kdcore.run(RECIPE, run_dir=mine, resume=True), None)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".npz", ".pkl"])
def test_a_pickle_as_weights_of_timm_is_refused_by_name(trap: Trap, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    trap.check(path, lambda: build("teacher", "timm", CLASSES, model="resnet10t", checkpoint=str(path)), path.name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth", "config.json"])
def test_a_pickle_in_a_folder_of_timm_is_refused_by_name(trap: Trap, tmp_path: Path, name: str) -> None:
    where = tmp_path / "saved"
    where.mkdir()
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (where / "config.json").write_text(json.dumps(config))
    trap.check(
        where / name, lambda: build("teacher", "timm", CLASSES, model="resnet10t", checkpoint=str(where)), "saved"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier, as transformers saves it."""
    import transformers

    where = tmp_path_factory.mktemp("bert") / "model"
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, num_labels=3)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(where)
    return where


def classifier(where: Path, **options: Any) -> Any:
    return build("teacher", "transformers", TEXTS, model=str(where), **options)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "pytorch_model.bin"]
)
def test_a_pickle_in_a_folder_of_transformers_is_refused_by_name(
    bert: Path, trap: Trap, tmp_path: Path, name: str
) -> None:
    where = Path(shutil.copytree(bert, tmp_path / "model"))
    if name == "pytorch_model.bin":  # the only weights
        (where / "model.safetensors").unlink()
    if name == "preprocessor_config.json":
        import transformers

        transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                   image_size=32, num_labels=3)
        ).save_pretrained(where)  # fmt: skip
        trap.check(where / name, lambda: build("teacher", "transformers", CLASSES, model=str(where)), str(where))
    else:
        trap.check(where / name, lambda: classifier(where), str(where))


def test_pickles_beside_the_weights_of_transformers_are_not_loaded(bert: Path, trap: Trap, tmp_path: Path) -> None:
    where = Path(shutil.copytree(bert, tmp_path / "model"))
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl"):
        (where / name).write_bytes(trap.forms["torch"])
    classifier(where)
    assert not trap.mark.exists()


@pytest.mark.parametrize(
    ("component", "options"),
    [
        ("demo-cnn", {}),
        ("cifar-resnet", {}),
        ("nasbench201", {"arch": "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|none~0|none~1|skip_connect~2|"}),
        ("av-mnist-net", {"inputs": ["image"]}),
    ],
)
def test_a_pickle_in_the_checkpoint_of_a_small_network_is_refused_by_name(
    trap: Trap, tmp_path: Path, component: str, options: dict[str, Any]
) -> None:
    where = tmp_path / "saved"
    build("teacher", component, CLASSES, **options).save(where)
    files = {path: path.read_bytes() for path in where.iterdir()}
    assert where / "model.safetensors" in files
    for path, content in files.items():
        trap.check(path, lambda: build("teacher", component, CLASSES, checkpoint=str(where), **options), "saved")
        path.write_bytes(content)
    build("teacher", component, CLASSES, checkpoint=str(where), **options)


SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
       "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
       "pos_embed_max_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny denoiser, as a run saves it."""
    where = tmp_path_factory.mktemp("denoiser") / "saved"
    build("teacher", "diffusers", Task("unlabelled"), architecture="SD3Transformer2DModel", config=SD3).save(where)
    return where


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "config.json", "kd.json",
             "scheduler/scheduler_config.json"]
)  # fmt: skip
def test_a_pickle_in_the_folder_of_a_denoiser_is_refused_by_name(
    denoiser: Path, trap: Trap, tmp_path: Path, name: str
) -> None:
    from kd_diffusers.denoiser import FACTS

    where = Path(shutil.copytree(denoiser, tmp_path / "saved"))
    (where / "manifest.json").unlink(missing_ok=True)
    if name.endswith(".bin"):  # the only weights
        (where / "diffusion_pytorch_model.safetensors").unlink()
    path = where / (FACTS if name == "kd.json" else name)
    trap.check(path, lambda: build("teacher", "diffusers", Task("unlabelled"), checkpoint=str(where)), "saved")


@pytest.mark.parametrize("name", ["pruned.json", "pruned.safetensors"])
def test_a_pickle_in_the_folder_of_a_pruned_student_is_refused_by_name(trap: Trap, tmp_path: Path, name: str) -> None:
    from kd_hierarchical_prune.surgery import load as load_pruned

    where = tmp_path / "saved"
    where.mkdir()
    facts = {"config": {"_class_name": "SD3Transformer2DModel", **SD3}, "removed": [["transformer_blocks.0", "ff"]]}
    (where / "pruned.json").write_text(json.dumps(facts))
    trap.check(where / name, lambda: load_pruned(where), "saved")


def test_a_pickle_beside_a_student_of_simkd_is_refused_by_name(trap: Trap, tmp_path: Path) -> None:
    method = build("method", "simkd")
    trap.check(tmp_path / "simkd.safetensors", lambda: method.restore(None, tmp_path), "simkd.safetensors")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl", ".pickle", ".pt", ".csv", ".json", ".parquet", ".arrow"])
def test_a_pickle_as_data_is_refused_by_name(trap: Trap, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    trap.check(path, lambda: build("data", "datasets", path=str(path), label="label").sample("train"), None
               if suffix == ".csv" else path.name)  # fmt: skip


def test_pickles_in_a_folder_of_data_are_not_loaded(trap: Trap, tmp_path: Path) -> None:
    where = tmp_path / "rows"
    trap.check(where / "train.pkl", lambda: build("data", "datasets", path=str(where)), "rows")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n"
    (where / "README.md").write_text(card)
    trap.check(where / "train.pkl", lambda: build("data", "datasets", path=str(where)), "rows")
    for name in ("README.md", "train.pkl"):
        (where / name).unlink()
    with tarfile.open(where / "train.tar", "w") as tar:
        for form, name in (("pickle", "1.pkl"), ("pickle", "1.pyd"), ("torch", "1.pth"), ("npy", "1.npy")):
            entry = tarfile.TarInfo(name)
            entry.size = len(trap.forms[form])
            tar.addfile(entry, io.BytesIO(trap.forms[form]))
    with pytest.raises(UserError, match="rows"):
        build("data", "datasets", path=str(where), label="cls")
    assert not trap.mark.exists()


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_pickle_in_a_saved_data_set_is_refused_by_name(trap: Trap, tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    where = tmp_path / "rows"
    Dataset.from_dict({"label": [0, 1], "text": ["a", "b"]}).save_to_disk(str(where))
    trap.check(where / name, lambda: build("data", "datasets", path=str(where), label="label"), "rows")


def test_a_pickle_as_arrays_is_refused_by_name(trap: Trap, tmp_path: Path) -> None:
    np.save(tmp_path / "label.npy", np.zeros(4))
    for name in ("image.npy", "image.npz"):
        options = {"path": str(tmp_path), "arrays": {"image": [name]}, "label": ["label.npy"]}
        trap.check(tmp_path / name, lambda options=options: build("data", "paired-arrays", **options), "image")  # type: ignore[misc]


def test_a_pickle_in_the_cache_of_answers_is_asked_again(
    trap: Trap, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from kd_openai.cache import AnswerCache, Ledger

    cache, request = AnswerCache(tmp_path), {"prompt": "hello"}
    trap.check(cache.path(request), lambda: cache.read(request), None)
    assert cache.read(request).answers == []
    assert "is damaged" in caplog.text
    trap.check(tmp_path / "spent.jsonl", lambda: Ledger(tmp_path / "spent.jsonl").spent, None)


@pytest.mark.parametrize("name", ["x", "allx", "graph"])
def test_a_pickle_with_code_in_the_raw_files_of_a_graph_is_refused_by_name(
    trap: Trap, tmp_path: Path, name: str
) -> None:
    for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        (tmp_path / f"ind.cora.{part}").write_bytes(pickle.dumps(np.zeros((2, 2))))
    (tmp_path / "ind.cora.test.index").write_text("0\n1\n")
    trap.check(tmp_path / f"ind.cora.{name}",
               lambda: build("data", "planetoid", name="cora", root=str(tmp_path)), "cannot be read")  # fmt: skip


# -- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "/tmp/x", "..", ".", "", "a.b", "x\n", "x\x00", "distribution:x", "ä"]
)
@pytest.mark.parametrize("section", ["teachers", "students", "stages"])
def test_names_of_roles_and_stages_cannot_be_paths(here: Path, section: str, name: str) -> None:
    entry = {"train": {}} if section == "stages" else {"use": "demo-cnn"}
    recipe = {key: value for key, value in RECIPE.items() if key != section.removesuffix("s")}
    with pytest.raises(RecipeError, match=section):
        kdcore.run({**recipe, section: {name: entry}})
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "method",
    ["../../x", "kd-classic:../../x", "../x:kd", "kd/../../../x", "kd/../quickstart", "..", "kd-classic:kd/.."],
)
def test_names_of_methods_and_recipes_cannot_be_paths(kd: Any, here: Path, method: str) -> None:
    with pytest.raises(UserError):
        kdcore.run({**RECIPE, "method": method})
    for command in ("run", "cp", "bench"):
        assert kd(command, method).exit_code == 2
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["...yaml", "..yaml", "....yml", "x.yaml"])
def test_the_default_run_folder_of_any_recipe_lies_in_runs(here: Path, name: str) -> None:
    (here / name).write_text("method: kd")
    _, chosen = find_recipe(here / name, PluginManager())
    assert (here / "runs" / chosen).resolve().parent == here / "runs"


def test_a_bench_writes_nothing_for_a_role_that_is_a_path(here: Path) -> None:
    recipe = {**RECIPE, "teachers": {"../../x": RECIPE["teacher"]}}
    del recipe["teacher"]
    with pytest.raises(RecipeError, match="teachers"):
        kdcore.bench(["kd"], recipe, seeds=1, run_dir=here / "bench" / "deep")
    assert list(here.rglob("*")) == []


@pytest.mark.parametrize("name", ["../outside.txt", "{}/outside.txt", "a/../../outside.txt"])
def test_a_manifest_names_nothing_outside_of_its_folder(done: Path, name: str) -> None:
    outside = done.parent / "outside.txt"
    outside.write_text("mine")
    manifest = json.loads((done / "student" / folder.MANIFEST).read_text())
    manifest["files"][name.format(done.parent)] = folder._digest(outside)
    manifest.pop("digest")
    (done / "student" / folder.MANIFEST).write_text(json.dumps(folder._sealed(manifest)))
    with pytest.raises(RunFolderError, match=r"outside\.txt is missing"):
        kdcore.evaluate(done)


def test_a_link_in_the_folder_of_a_student_that_leads_out_is_refused(done: Path) -> None:
    weights = done / "student" / "model.safetensors"
    shutil.move(weights, done.parent / "elsewhere")
    weights.symlink_to(done.parent / "elsewhere")
    with pytest.raises(RunFolderError, match=r"model\.safetensors.*link"):
        kdcore.evaluate(done)


@pytest.mark.parametrize(
    "name", [".run.json.tmp", ".recipe.yaml.tmp", "metrics.jsonl", ".lock", "stages/09-x", "students"]
)
def test_a_link_in_a_run_folder_changes_nothing_outside(mine: Path, name: str) -> None:
    outside = mine.parent / "outside"
    outside.mkdir()
    for kept in ("notes", "draft.tmp"):
        (outside / kept).write_text("mine")
    (mine / name).unlink(missing_ok=True)
    (mine / name).symlink_to(outside if name in ("stages/09-x", "students") else outside / "notes")
    with contextlib.suppress(KDError):
        kdcore.run(RECIPE, run_dir=mine)
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"notes": "mine", "draft.tmp": "mine"}


@pytest.mark.parametrize("name", ["../secret", "/secret", "a/../../secret"])
def test_a_saved_data_set_names_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    Dataset.from_dict({"label": [0, 1]}).save_to_disk(str(tmp_path / "secret"))
    shutil.copytree(tmp_path / "secret", tmp_path / "rows")
    (tmp_path / "splits").mkdir()
    target = str(tmp_path / "secret") if name == "/secret" else name
    (tmp_path / "splits" / "dataset_dict.json").write_text(json.dumps({"splits": [target]}))
    state = json.loads((tmp_path / "rows" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"{target}/data-00000-of-00001.arrow"}]
    (tmp_path / "rows" / "state.json").write_text(json.dumps(state))
    for where in ("rows", "splits"):
        with pytest.raises(UserError, match="outside of its folder"):
            build("data", "datasets", path=str(tmp_path / where), label="label")


def test_archives_of_pictures_are_not_unpacked_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from PIL import Image

    cache = tmp_path / "a" / "b" / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(cache / "downloads"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(cache / "extracted"))
    where = tmp_path / "pictures"
    where.mkdir()
    Image.new("RGB", (8, 8)).save(where / "one.png")
    with zipfile.ZipFile(where / "two.zip", "w") as archive:
        for name in ("../../../../../escaped.png", "/escaped.png", "two.png"):
            archive.write(where / "one.png", name)
    with tarfile.open(where / "three.tar", "w") as tar:
        for name in ("../../../../../escaped.png", str(tmp_path / "escaped.png"), "three.png"):
            tar.add(where / "one.png", name)
    with contextlib.suppress(KDError):
        build("data", "datasets", path=str(where), image="image")
    found = [p for p in tmp_path.rglob("*escaped*") if cache not in p.parents]
    assert found == []
    assert not Path("/escaped.png").exists()


# -- code that comes with models ----------------------------------------------------------------------------------


@pytest.fixture
def coded(bert: Path, tmp_path: Path) -> Path:
    """A model folder with code, which leaves a mark when it is imported."""
    where = Path(shutil.copytree(bert, tmp_path / "coded"))
    (where / "odd.py").write_text(
        f"open({str(where.parent / 'ran')!r}, 'w')\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class Config(BertConfig):\n    model_type = 'odd'\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )
    config = json.loads((where / "config.json").read_text())
    classes = {"AutoConfig": "odd.Config", "AutoModelForSequenceClassification": "odd.Model"}
    (where / "config.json").write_text(json.dumps({**config, "model_type": "odd", "auto_map": classes}))
    return where


def test_code_of_a_model_is_refused_unless_the_recipe_trusts_it(coded: Path) -> None:
    with pytest.raises(UserError, match="trust_remote_code"):
        classifier(coded)
    assert not (coded.parent / "ran").exists()


def test_code_of_a_model_that_the_recipe_trusts_runs_with_one_warning_that_names_it(
    coded: Path, kd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(coded.parent / "modules"))
    (coded.parent / "here" / "texts.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 2}\n')
    recipe = {**RECIPE, "teacher": {"use": "transformers", "model": str(coded), "trust_remote_code": True},
              "student": {"use": "transformers", "model": str(coded), "trust_remote_code": True, "pretrained": False},
              "data": {"use": "datasets", "path": "texts.jsonl", "text": "text", "label": "label",
                       "classes": ["a", "b", "c"]}}  # fmt: skip
    Path("trusting.yaml").write_text(yaml.safe_dump(recipe))
    result = kd("run", "trusting.yaml")
    warnings = [line for line in result.stderr.splitlines() if "trust_remote_code" in line]
    assert len(warnings) == 1, result.stderr
    assert str(coded) in warnings[0]
    assert warnings[0].startswith("warning:")
    assert (coded.parent / "ran").exists()


@pytest.mark.parametrize("what", ["model type", "class of the model", "tokenizer", "generation"])
def test_no_other_file_of_a_model_brings_code_in(coded: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # nobody is asked
    config = json.loads((coded / "config.json").read_text())
    if what == "class of the model":  # the config itself is a usual one
        config["auto_map"].pop("AutoConfig")
    if what in ("tokenizer", "generation"):
        config.pop("auto_map")
    if what != "model type":
        config["model_type"] = "bert"
    (coded / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}}
    if what == "tokenizer":
        (coded / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        with contextlib.suppress(KDError):
            build("data", "datasets", path="rows.csv", text="text", tokenizer=str(coded))
    if what == "generation":
        (coded / "custom_generate").mkdir()
        shutil.copy(coded / "odd.py", coded / "custom_generate" / "generate.py")
    with contextlib.suppress(KDError):
        classifier(coded)
    assert not (coded.parent / "ran").exists()


def test_the_tokenizer_of_a_data_set_runs_no_code(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    settings = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(settings))
    from kd_datasets.texts import load_tokenizer
    from kd_lingugkd.lm import read_tokenizer
    from kd_symbolic_kd.data import load_tokenizer as load_of_triples

    for read in (load_tokenizer, read_tokenizer, load_of_triples):
        with pytest.raises(UserError, match="coded"):
            read(str(coded))
        assert not (coded.parent / "ran").exists(), read.__module__


@pytest.mark.parametrize("where", ["recipe", "config"])
def test_a_kernel_of_the_hub_is_code_too(bert: Path, tmp_path: Path, where: str) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    if where == "config":
        (copy / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    options = {"attn_implementation": "somebody/kernel"} if where == "recipe" else {}
    with pytest.raises(UserError, match=r"somebody/kernel.*trust_remote_code"):
        classifier(copy, **options)


def test_code_of_a_pipeline_does_not_run(denoiser: Path, tmp_path: Path) -> None:
    where = tmp_path / "pipeline"
    shutil.copytree(denoiser, where / "transformer")
    ran = tmp_path / "ran"
    for name in ("odd.py", "vae/odd.py", "transformer/odd.py"):
        (where / name).parent.mkdir(exist_ok=True)
        (where / name).write_text(f"open({str(ran)!r}, 'w')\nclass Odd: ...\n")
    (where / "vae" / "config.json").write_text("{}")
    index = {
        "_class_name": ["odd", "Odd"],
        "transformer": ["odd", "Odd"],
        "vae": ["odd", "Odd"],
        "_diffusers_version": "0",
    }
    config = json.loads((where / "transformer" / "config.json").read_text())
    for changed in (index, {**index, "_class_name": "StableDiffusion3Pipeline"},
                    {**index, "transformer": ["diffusers", "SD3Transformer2DModel"]}):  # fmt: skip
        (where / "model_index.json").write_text(json.dumps(changed))
        with contextlib.suppress(KDError):
            build("teacher", "diffusers", Task("unlabelled"), model=str(where)).rest.pipe  # noqa: B018
    (where / "transformer" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "odd.Odd"}}))
    with pytest.raises(UserError, match="trust_remote_code"):
        build("teacher", "diffusers", Task("unlabelled"), checkpoint=str(where / "transformer"))
    assert not ran.exists()


def test_a_recipe_names_no_module_that_is_no_plugin(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_hierarchical_prune.analysis import load_metric

    (here / "odd_metric.py").write_text("open('ran', 'w')\ndef score(run, model): return 1.0\n")
    monkeypatch.syspath_prepend(here)
    for name in ("odd_metric:score", "os:system", "builtins:print"):
        with pytest.raises(RecipeError, match="no installed plugin"):
            load_metric(name)
    assert not (here / "ran").exists()


# -- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:builtins.open [ran, w]",
        "!!python/object/new:builtins.open [ran, w]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:builtins.open> [ran, w]",
        "${python:open}",
        "${eval:open('ran', 'w')}",
        "${oc.create:${python:open}}",
    ],
)
def test_a_recipe_makes_no_objects(here: Path, value: str) -> None:
    (here / "recipe.yaml").write_text(f"method: {value}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load(here / "recipe.yaml")
    (here / "plain.yaml").write_text("method: kd\n")
    with pytest.raises(RecipeError, match=r"plain\.yaml"):
        load(here / "plain.yaml", [f"seed={value}"])
    assert not (here / "ran").exists()


@pytest.mark.parametrize("allowed", ["", "OTHER", "HF_TOKEN,OPENAI_API_KEY,DB_PASSWORD,AWS_SECRET"])
@pytest.mark.parametrize(
    ("text", "name"),
    [("${oc.env:HF_TOKEN}", "HF_TOKEN"), ("${oc.env:OPENAI_API_KEY,none}", "OPENAI_API_KEY"),
     ("${oc.env:DB_PASSWORD}", "DB_PASSWORD"), ("${oc.env:${oc.decode:AWS_SECRET}}", "AWS_SECRET"),
     ("${oc.decode:${oc.env:AWS_SECRET}}", "AWS_SECRET"), ("${oc.select:x,${oc.env:HF_TOKEN}}", "HF_TOKEN")],
)  # fmt: skip
def test_a_recipe_reads_no_secret_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, name: str, allowed: str
) -> None:
    monkeypatch.setenv(name, "canary-of-the-environment")
    monkeypatch.setenv("KD_ALLOW_ENV", allowed)
    for source, overrides in (({"seed": text}, []), ({"seed": 1}, [f"seed={text}"])):
        with pytest.raises(RecipeError, match=f"{name} looks like a secret") as caught:
            load(source, overrides)
        assert "canary" not in str(caught.value)


def test_a_recipe_reads_of_the_environment_what_is_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SIDE", "12")
    with pytest.raises(RecipeError, match="KD_ALLOW_ENV=MY_SIDE"):
        load({"seed": "${oc.env:MY_SIDE}"})
    monkeypatch.setenv("KD_ALLOW_ENV", "OTHER, MY_SIDE")
    assert load({"seed": "${oc.env:MY_SIDE}"}) == {"seed": "12"}


@pytest.mark.parametrize("recipe", [
    {"method": "${oc.env:HOME}"}, {"teacher": "${oc.env:HOME}"}, {"students": "${oc.env:HOME}"},
    {"students": {"vit": "${oc.env:HOME}"}}, {"eval": "${oc.env:HOME}"}, {"data": {"path": "${oc.env:HOME}"}},
])  # fmt: skip
def test_a_variable_that_may_not_be_read_is_named_with_its_key(recipe, monkeypatch):
    monkeypatch.delenv("KD_ALLOW_ENV", raising=False)
    [(key, value)] = recipe.items()
    where = f"{key}.{next(iter(value))}" if isinstance(value, dict) else key
    with pytest.raises(RecipeError, match=f"{where}: the recipe reads the environment variable HOME"):
        load(recipe)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ text|attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(text) }}",
        "{{ '{0.__class__}'.format_map({'0': text}) }}",
        "{% set _ = rows.append(1) %}{{ rows }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(999999999) }}",
        "{{ 1 / 0 }}",
        "{{ 1 + text }}",
        "{{ text.encode('latin-7') }}",
        "{{ [][3].x }}",
    ],
)
def test_templates_leave_no_sandbox_and_end_with_a_sentence(here: Path, template: str) -> None:
    with pytest.raises(RecipeError, match="template"):
        render(template, {"text": "hello", "rows": [0]})
    assert not (here / "ran").exists()


# -- secrets ------------------------------------------------------------------------------------------------------

SECRETS = {name: f"canary-{name.lower()}-4711" for name in
           ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY",
            "DB_PASSWORD")}  # fmt: skip


@pytest.fixture
def parrot() -> Iterator[str]:
    """A server that refuses every request and repeats the key it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = json.dumps({"error": {"message": f"Incorrect key: {self.headers['Authorization']}"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_values_of_secrets_are_neither_printed_nor_written(
    kd: Any, here: Path, parrot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "KD_ALLOW_ENV": ",".join(SECRETS), "KD_DEBUG": "1"}.items():
        monkeypatch.setenv(name, value)
    level = logging.getLogger().level
    plain = {**RECIPE, "method": "supervised"}
    del plain["teacher"]
    Path("plain.yaml").write_text(yaml.safe_dump(plain))
    Path("curious.yaml").write_text(yaml.safe_dump({**plain, "seed": "${oc.env:HF_TOKEN}"}))
    teacher = {"use": "openai", "model": "tiny", "base_url": parrot, "cache": "cache"}
    asks = {**load(find_recipe("symbolic-kd", PluginManager())[0]), "teacher": teacher, "trackers": []}
    asks.pop("teachers", None)
    Path("asks.yaml").write_text(yaml.safe_dump(asks))
    said = [kd(*command) for command in (
        ("-vv", "run", "plain.yaml"), ("compare", "runs/plain"), ("eval", "runs/plain"), ("doctor", "--json"),
        ("run", "plain.yaml", "--dry-run"), ("run", "curious.yaml"), ("run", "plain.yaml", "seed=${oc.env:HF_TOKEN}"),
        ("-vv", "run", "asks.yaml"), ("show", "openai", "--json"),
    )]  # fmt: skip
    logging.getLogger().setLevel(level)
    assert said[0].exit_code == 0, said[0].output
    assert "401" in said[-2].output, said[-2].output
    assert "looks like a secret" in said[5].output
    everything = {str(result): result.output for result in said}
    everything |= {str(path): path.read_bytes().decode(errors="replace") for path in here.rglob("*") if path.is_file()}
    for where, text in everything.items():
        assert not [name for name, value in SECRETS.items() if value in text], where


# -- what people are shown ----------------------------------------------------------------------------------------

PLUGIN = f"""
import kdcore
from kdcore import Component, Method, Options, Roles, hookimpl
from kdcore.stages import Supervised

HOSTILE = {HOSTILE!r}

class Odd(Options):
    label: str = HOSTILE

class OddMethod(Method):
    roles = Roles(teachers=0)
    def stages(self, run):
        yield Supervised(run.student, run.data.task, name="train")
        run.add_metric(HOSTILE, 0.5)
        run.rows.append({{"model": HOSTILE, HOSTILE: 0.5}})

@hookimpl
def kd_register_methods():
    return [Component("method", "odd", OddMethod, options=Odd, summary=HOSTILE, tags=(HOSTILE,))]

@hookimpl
def kd_evaluated(run, stage, metrics):
    raise RuntimeError(HOSTILE)
"""


@pytest.fixture(scope="module")
def odd_site(tmp_path_factory: pytest.TempPathFactory, install: Any) -> Path:
    """Two plugins with texts made for the terminal: one works, one fails with such a text."""
    site = tmp_path_factory.mktemp("site")
    install(site, "odd-texts", PLUGIN)
    install(site, "odd-broken", f"raise RuntimeError({HOSTILE!r})")
    return site


def told(*arguments: str, terminal: bool) -> str:
    """All that a command prints, to a terminal or a file."""
    with pytest.MonkeyPatch.context() as patch:
        if terminal:
            patch.setenv("FORCE_COLOR", "1")
            patch.setenv("COLUMNS", "1000")
        result = CliRunner().invoke(app, arguments, color=terminal)
    assert result.exit_code in (0, 1, 2), result.output
    return result.output


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_texts_of_plugins_and_data_do_not_command_the_terminal(
    here: Path, odd_site: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.syspath_prepend(odd_site)
    recipe = {"method": "odd", "student": RECIPE["student"], "data": "digits", "train": RECIPE["train"], "trackers": []}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    commands = [("list",), ("list", "--json"), ("show", "odd"), ("doctor",), ("run", "mine.yaml"), ("run", HOSTILE),
                ("run", "mine.yaml", f"method.{HOSTILE.replace('=', '')}=1"), ("compare", "runs/mine"),
                ("compare", "runs/mine", "--json"), ("run", "mine.yaml", "--dry-run"),
                ("list", "--tag", HOSTILE)]  # fmt: skip
    for command in commands:
        text = told(*command, terminal=terminal)
        assert not CONTROL.findall(SHOWN.sub("", text)), (command, text)
        if command[0] in ("list", "compare") and "--json" not in command and "--tag" not in command:
            assert "[red]z[/] [/]" in text, command
            assert not re.search(r"^\W*forged", text, re.MULTILINE), (command, text)
        if "--json" in command:
            json.loads(text[: text.rindex("}") + 1] if command[0] == "list" else text)


def test_metrics_of_any_name_do_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from kd_cli import progress

    tables.show_metrics(tables.console(), {HOSTILE: 0.5}, HOSTILE)
    tables.show_records(tables.console(), [{HOSTILE: HOSTILE}], HOSTILE)
    print(progress.values({HOSTILE: 0.5}))
    out = capsys.readouterr().out
    assert not CONTROL.findall(SHOWN.sub("", out)), out
    assert "[red]z[/]" in out


def test_the_model_card_shows_any_text_as_what_it_is(
    here: Path, odd_site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(odd_site)
    recipe = {"method": "odd", "student": RECIPE["student"], "train": {**RECIPE["train"], "steps": 1}, "trackers": [],
              "data": "digits"}  # fmt: skip
    assert HOSTILE in kdcore.run(recipe, run_dir="run").metrics
    named = load({**recipe, "student": {"use": "timm", "model": "resnet10t", "checkpoint": HOSTILE}})
    named = type(
        "Named", (), {"recipe": resolve(named, manager := PluginManager()).recipe, "manager": manager, "seed": 0}
    )
    for card in (Path("run/README.md").read_text(), model_card(named, {HOSTILE: 1.0})):
        assert not CONTROL.findall(card)
        assert "<script>" not in card
        assert not re.search(r"(?<!\\)`y(?<!\\)`", card)
        assert not [line for line in card.splitlines() if line.startswith(("| forged", "- forged"))]
        rows = [line for line in card.splitlines() if line.startswith("|") and "alert" in line]
        assert rows
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


class Tags(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_leaderboards_and_their_pictures_show_any_text_as_what_it_is(done: Path) -> None:
    standing = Standing(HOSTILE, HOSTILE, {0: 0.5}, 0.5, None, 0.1, None, None, 1.0, None, {1: HOSTILE})
    rows = [{"method": HOSTILE, HOSTILE: HOSTILE}]
    with (done / "metrics.jsonl").open("a") as journal:
        journal.write(json.dumps({"stage": HOSTILE, "step": 1, "metrics": {HOSTILE: 0.5}}) + "\n")
    for name, plot in (
        ("bars", pages.bars([standing, replace(standing, method="$x_")])),
        ("lines", pages.lines([done])),
    ):
        page = done / f"{name}.html"
        pages.write_html(page, HOSTILE, HOSTILE, rows, plot)
        found = Tags()
        found.feed(page.read_text())
        assert "script" not in found.tags, name
        assert "<script>alert(1)</script>" in found.text, name
        assert "script" not in plot.replace("&lt;script&gt;", "").replace("&lt;/script&gt;", ""), name
        assert not CONTROL.findall(plot), name
