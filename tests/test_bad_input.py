"""What a user gets wrong: a message that says what, where and the way out, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import kdcore
from kdcore.checkpoint import latest
from kdcore.errors import ModelError, RecipeError, UserError
from kdcore.models import Labels

MINE = """
method: distill
teacher: {use: demo-cnn, width: 2}
student: {use: demo-cnn, width: 2}
data: {use: digits}
losses: [cross-entropy, kd]
train: {steps: 2, batch_size: 8}
trackers: []
"""

LONG = "a" * 300


@pytest.fixture
def mine(kd) -> Path:
    """A recipe that is right."""
    path = Path("mine.yaml")
    path.write_text(MINE)
    return path


def refused(result) -> str:
    """What was said; the command must have ended as wrong input does, and have made no run."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
    return result.stderr


@pytest.mark.parametrize(
    ("change", "where", "way_out"),
    [
        ("method=distil", "method.use: unknown method 'distil'", "did you mean 'distill'"),
        ("student.use=demo-cn", "students.student.use: unknown student 'demo-cn'", "did you mean 'demo-cnn'"),
        ("data.use=digit", "data.use: unknown data 'digit'", "did you mean 'digits'"),
        ("losses=[kdd]", "losses.0.use: unknown loss 'kdd'", "did you mean 'kd'"),
        ("losses=['kd-clasic:kd']", "losses.0.use: unknown loss 'kd-clasic:kd'", "'kd'"),
        ("student.widht=4", "students.student.widht: unknown key", "did you mean 'width'"),
        ("losses=[{use: kd, temprature: 2}]", "losses.0.temprature: unknown key", "did you mean 'temperature'"),
        ("trian.steps=4", "trian: unknown key", "did you mean 'train'"),
        ("train.step=4", "train.step: unknown key", "did you mean 'steps'"),
        ("stages.distil.train.steps=4", "stages.distil: there is no such stage", "did you mean 'distill'"),
        ("stages.distill.train.step=4", "stages.distill.train.step: unknown key", "did you mean 'steps'"),
        ("teacher.train.step=4", "teachers.teacher.train.step: unknown key", "did you mean 'steps'"),
        ("eval.metrics=[acuracy]", "eval.metrics:", "did you mean 'accuracy'"),
        ("eval.on=[tset]", "eval.on: the data has no split 'tset'", "train, val, test"),
        ("train.steps=many", "train.steps:", "valid integer"),
        ("student.width=wide", "students.student.width:", "valid integer"),
        ("student.width=0", "students.student.width:", "greater than 0"),
        ("seed=-1", "seed:", "greater than or equal to 0"),
        ("losses=[{use: kd, weight: nan}]", "losses.0.weight:", "finite number"),
        ("train.optimizer=adamm", "train.optimizer.name:", "'adamw'"),
        ("train.optimizer={name: adam, momentum: 0.9}", "train.optimizer: adam has no momentum", "betas, eps"),
        ("train.precision=fp8", "train.precision:", "'bf16'"),
        ("losses=[]", "needs a `losses:` list", "cross-entropy"),
        ("method=kd", "method 'kd' has losses of its own", "takes no `losses:` list"),
        ("data.val_fraction=0.8", "data: val_fraction and test_fraction together", "less than a tenth"),
        ("losses=[{use: kd, teacher: big}]", "needs a teacher with the role 'big'", "the recipe names: teacher"),
        ("losses=[{use: kd, name: a.b}]", "losses.0.name:", "a.b"),
        ("losses=[{use: kd, temperature: 0}]", "losses.0.temperature:", "greater than 0"),
        ("losses=[{use: dist, tau: nan}]", "losses.0.tau:", "greater than 0"),
        ("losses=[{use: rkd, weight: -1}]", "losses.0.weight:", "greater than or equal to 0"),
        ("losses=[{use: at, student_layers: ['@0']}]", "losses.0:", "give both, or neither"),
        ("losses=[{use: crd, negatives: 5000}]", "5000 negatives are asked for", "set fewer `negatives`"),
        ("losses=[cwd]", "cwd compares score maps", "set `signal: layers`"),
        ("losses=[deit]", "deit needs a student with a distillation token", "deit_tiny_distilled"),
        ("losses=[{use: multi-teacher, weights: {big: 1}}]", "weights names big", "the teachers are teacher"),
        (
            "losses=[{use: mgd, student_layers: ['@1'], teacher_layers: ['@2']}]",
            "the student's is [4, 4]",
            "of one size",
        ),
        ("train.grad_accumulation=3", "train.batch_size 8", "3 equal"),
        ("steps", "override 'steps'", "write key=value"),
        ("data='${nope}'", "nope", "not found"),
    ],
)
def test_a_wrong_recipe_is_refused_at_the_key_with_the_way_out(kd, mine, change, where, way_out):
    said = refused(kd("run", mine, change))
    assert where in said
    assert way_out in said


def test_all_that_is_wrong_is_said_at_once(kd, mine):
    said = refused(kd("run", mine, "student.widht=4", "data.use=digit", "losses=[kdd]"))
    assert said.startswith("error: mine.yaml is not valid:\n")
    assert [line.split(":")[0] for line in said.splitlines()[1:4]] == [
        "  data.use", "  students.student.widht", "  losses.0.use"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.yaml", b"method: [kd\ndata: }", "bad.yaml: not valid YAML: "),
        ("twice.yaml", b"method: kd\nmethod: at\n", "found duplicate key method"),
        ("empty.yaml", b"", "empty.yaml: the recipe is empty; `kd cp METHOD/quickstart`"),
        ("comment.yaml", b"# to do\n", "comment.yaml: the recipe is empty"),
        ("list.yaml", b"- method\n- data\n", "list.yaml: a recipe is a mapping of keys such as 'method:', not a list"),
        ("number.yaml", b"3\n", "number.yaml: a recipe is a mapping of keys"),
        ("weights.yaml", bytes(range(128, 256)), "weights.yaml: not a YAML file: it is not text"),
        ("half.yaml", b"method: kd\n", "data: required, but not given"),
        (
            "alone.yaml",
            b"method: kd\ndata: digits\nstudent: demo-cnn\n",
            "needs a teacher with the role 'teacher' (`teacher",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(kd, name, content, said):
    Path(name).write_bytes(content)
    assert said in refused(kd("run", name))


@pytest.mark.parametrize("command", [
    ("run", LONG),
    ("eval", LONG),
    ("compare", LONG),
    ("run", "mine.yaml", "--dry-run", "data={use: datasets, path: owner/data, tokenizer: " + LONG + "}"),
    ("run", "mine.yaml", "data={use: datasets, path: ./" + LONG + "}"),
    ("run", "mine.yaml", "--dry-run", "data={use: datasets, path: owner/data, tokenizer: ~nobody-is-called-this/x}"),
])  # fmt: skip
def test_a_name_that_no_file_can_have_is_refused(kd, mine, command):
    assert len(refused(kd(*command))) < 2 * len(LONG)


def test_a_recipe_that_is_not_there_is_refused(kd):
    Path("folder").mkdir()
    Path("folder.yaml").mkdir()
    assert "missing.yaml: there is no such file" in refused(kd("run", "missing.yaml"))
    assert "folder.yaml: this is a folder; name the recipe file in it" in refused(kd("run", "folder.yaml"))
    assert "unknown method 'folder'" in refused(kd("run", "folder"))
    assert "ships no recipe 'papr'; recipes: " in refused(kd("run", "kd/papr"))
    assert "did you mean 'kd'" in refused(kd("run", "kdd/quickstart"))


@pytest.mark.parametrize(
    ("tap", "said"),
    [
        ("stge1", "did you mean 'stage1'"),
        ("@7", "the model has 3 stages: stage1, stage2, stage3"),
        ("stage1:inptu", "after the colon comes 'input', 'output' or 'pre'"),
    ],
)
def test_a_tap_that_matches_nothing_lists_what_is_near_and_the_folder_is_free_for_the_next_try(kd, mine, tap, said):
    layers = "losses=[{{use: at, student_layers: ['{}'], teacher_layers: [stage1]}}]"
    wrong = refused(kd("run", mine, layers.format(tap)))
    assert f"tap '{tap}'" in wrong
    assert said in wrong
    right = kd("run", mine, layers.format("stage1"))
    assert right.exit_code == 0, right.stderr


def test_a_wrong_student_is_told_before_the_teacher_is_trained(kd, mine):
    said = refused(kd("run", mine, "teacher.train.steps=2", "student.checkpoint=nowhere"))
    assert "checkpoint nowhere: " in said


def test_a_class_that_there_is_not_is_named_with_its_sample(here):
    samples = [{"series": torch.randn(3), "label": torch.tensor(i % 4)} for i in range(16)]
    net = nn.Linear(3, 3)
    for split in ("train", "val"):
        data = kdcore.DataModule({"train": samples[:3] * 5, "val": samples[:3], split: samples},
                                 kdcore.Task("classification", num_classes=3))  # fmt: skip
        with pytest.raises(UserError, match=rf"split '{split}', sample \d+: label 3, but the 3 classes are 0 to 2"):
            kdcore.distill(nn.Linear(3, 3), net, data, "kd", train={"steps": 8, "batch_size": 4}, run_dir=f"r-{split}")


def test_data_without_the_column_or_the_file_is_refused_with_the_near_names(kd, mine, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("texts.csv").write_text("text,label\ngood,1\nbad,0\n")
    text = "{use: demo-transformer, width: 2, heads: 1}"
    table = ("run", mine, f"teacher={text}", f"student={text}")
    said = refused(kd(*table, "data={use: datasets, path: texts.csv, text: texts}"))
    assert "no column 'texts'; did you mean 'text'" in said
    said = refused(kd(*table, "data={use: datasets, path: texts.csv, text: text, label: lable}"))
    assert "no column 'lable'; did you mean 'label'" in said
    said = refused(kd(*table, "data={use: datasets, path: text.csv, text: text}"))
    assert "data 'text.csv': there is no such file or folder" in said


def test_a_checkpoint_that_does_not_fit_the_data_is_refused(kd, mine):
    assert kd("run", mine, "--run-dir", "ten").exit_code == 0
    said = refused(kd("run", mine, "teacher.checkpoint=ten", "data.parity=true"))
    assert "checkpoint ten/student has 10 classes, the data has 2" in said
    said = refused(kd("run", mine, "teacher.checkpoint=one"))
    assert "checkpoint one" in said
    assert "give a run folder, or the `student` folder in one" in said


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (Labels(3), Labels(5), "teacher has 3 classes, student has 5"),
        (Labels(3, ("a", "b", "c")), Labels(3, ("b", "a", "c")), "'a' is class 0 and 1"),
        (Labels(3, vocabulary="1f"), Labels(3, vocabulary="2e"), "different vocabularies (1f and 2e)"),
    ],
)
def test_a_teacher_and_a_student_that_do_not_mean_the_same_are_refused(here, teacher, student, said):
    models = [kdcore.Model(nn.Linear(4, labels.count), labels=labels) for labels in (teacher, student)]
    data = [(torch.rand(4), i % 3) for i in range(8)]
    with pytest.raises(ModelError) as error:
        kdcore.distill(*models, data, train={"steps": 1, "batch_size": 4})
    assert said in str(error.value)
    assert not Path("runs/kd").exists()


def test_python_users_get_the_same_errors(here):
    data = [(torch.rand(4), i % 3) for i in range(8)]
    models = (nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.raises(RecipeError, match="did you mean 'temperature'"):
        kdcore.distill(*models, data, temprature=2)
    with pytest.raises(RecipeError, match="did you mean 'kd'"):
        kdcore.distill(*models, data, method="kdd")
    with pytest.raises(ModelError, match="teacher has 7 classes, student has 3"):
        kdcore.distill(nn.Linear(4, 7), nn.Linear(4, 3), data, train={"batch_size": 4})
    with pytest.raises(UserError, match="str"):
        kdcore.distill(nn.Linear(4, 3), "resnet18", data)
    assert not Path("runs/kd").exists()


def test_a_run_folder_that_exists_is_not_written_over(kd, mine):
    assert kd("run", mine).exit_code == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    for change in ((), ("seed=1",)):
        result = kd("run", mine, *change)
        assert result.exit_code == 2
        assert "--run-dir runs/mine-2" in result.stderr
        assert ("seed: 0 there, 1 now" in result.stderr) if change else ("--resume" in result.stderr)
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_not_written_into(kd, mine):
    Path("papers").mkdir()
    Path("papers/thesis.tex").write_text("mine")
    assert "papers is not a run folder: it holds thesis.tex" in refused(kd("run", mine, "--run-dir", "papers"))
    assert [p.name for p in Path("papers").iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_refused(kd, mine):
    Path("file").write_text("")
    for taken in ("file", "file/run"):
        assert "a file is in the way of the run folder" in refused(kd("run", mine, "--run-dir", taken))
    closed = Path("closed")
    closed.mkdir(mode=0o500)
    unwritable = "/proc/run" if os.access(closed, os.W_OK) else closed / "run"  # to root, no folder is closed
    said = refused(kd("run", mine, "--run-dir", unwritable))
    assert f"{unwritable}: the run folder cannot be written: " in said


def test_debug_adds_the_traceback_to_the_message(kd, mine, monkeypatch):
    monkeypatch.setenv("KD_DEBUG", "1")
    result = kd("run", mine, "student.widht=4")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: mine.yaml is not valid:" in result.stderr


def test_the_process_itself_ends_with_2_and_a_message(kd_process, here):
    done = kd_process("run", "kdd")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown method 'kdd'; did you mean 'kd'")
    assert "Traceback" not in done.stderr
    assert list(here.iterdir()) == []


HOOK = """
from kdcore import Component, hookimpl


@hookimpl
def kd_register_losses():
    return [Component("loss", "spoiled-VALUE", "spoiled_VALUE.parts:Spoiled", summary="wrong at step 5")]
"""
LOSS = """
from kdcore import Loss


class Spoiled(Loss):
    def __init__(self, options):
        super().__init__()

    def forward(self, student, teacher, batch):
        value = student.need("logits").square().mean()
        return value * float("VALUE") if self.progress.step == 4 else value
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_term_that_is_not_finite_is_named_with_step_and_samples_and_the_last_good_checkpoint_is_kept(
    kd, mine, install, tmp_path, monkeypatch, value
):
    site = tmp_path / "site"
    install(site, f"spoiled-{value}", HOOK.replace("VALUE", value), parts=LOSS.replace("VALUE", value))
    monkeypatch.syspath_prepend(site)
    result = kd("run", mine, f"losses=[cross-entropy, spoiled-{value}]", "train.steps=9", "train.save_every=2")
    assert result.exit_code == 1
    digits = kdcore.PluginManager().get("data", "digits")
    loader = digits.load_target()(digits.load_options()()).train_loader("train", 8, seed=0, start=4, stop=5)
    samples = next(iter(loader))["index"].tolist()
    assert f"the term 'spoiled-{value}' became {value} at step 5; samples of that batch: {samples}" in result.stderr
    assert "Traceback" not in result.stderr
    _, facts = latest(Path("runs/mine/stages/01-distill/checkpoints"))
    assert facts["step"] == 4
    assert json.loads(Path("runs/mine/run.json").read_text())["status"] == "failed"


def test_a_run_in_progress_keeps_others_out_and_on_ctrl_c_saves_and_goes_on_later(kd, mine):
    recipe = ("run", str(mine), "train.steps=300", "train.save_every=30", "train.eval_every=300")
    with subprocess.Popen(
        [sys.executable, "-m", "kd_cli", *recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("distill  checkpoint"):
                break
        other = kd(*recipe)
        assert other.exit_code == 2
        assert f"runs/mine is in use by another run (process {process.pid})" in other.stderr
        assert "--run-dir" in other.stderr
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert said.startswith("interrupted: interrupted in stage 'distill' at step ")
    assert "the same command goes on from here" in said
    step = int(said.partition("at step ")[2].split()[0])
    _, facts = latest(Path("runs/mine/stages/01-distill/checkpoints"))
    assert facts["step"] == step
    assert kd("-v", *recipe).stderr.count(f"resumes at step {step} of 300") == 1
    assert json.loads(Path("runs/mine/run.json").read_text())["status"] == "finished"


def test_the_recipe_that_a_run_keeps_runs_again(kd, mine):
    assert kd("run", mine).exit_code == 0
    kept = Path("runs/mine/recipe.yaml")
    assert kd("run", kept, "--run-dir", "again").exit_code == 0
    assert yaml.safe_load(kept.read_text()) == yaml.safe_load(Path("again/recipe.yaml").read_text())
