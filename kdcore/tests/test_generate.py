"""Corpora: prompts, answers in shards, what is dropped, kills, two processes, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

import kdcore
from kdcore import Answer, Component, GenerateStage, Method, Roles, Sampling, TextTeacher
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError, RunFailed, RunFolderError
from kdcore.text import misfit, render

ROWS = [{"word": f"w{i}", "number": i} for i in range(20)]
TEMPLATE = "{{ word }} is"


class Echo(TextTeacher):
    """Answers with the prompt and its seed; keeps count of what it was asked."""

    name = "echo"
    asked: list[str] = []

    def generate(self, prompts, sampling, seeds):
        type(self).asked += prompts
        return [[Answer(f" {prompt} {seed % 7} {i}", logprob=-1.0 - i, tokens=3) for i in range(sampling.n)]
                for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip


class Silent(Echo):
    name = "silent"

    def generate(self, prompts, sampling, seeds):
        return [[Answer("  \n")] * sampling.n for _ in prompts]


class Short(Echo):
    name = "short"

    def generate(self, prompts, sampling, seeds):
        return super().generate(prompts, sampling, seeds)[1:]


class Corpus(Method):
    roles = Roles(students=())
    more = {}
    rows = ROWS
    template = TEMPLATE

    def stages(self, run):
        corpus = yield GenerateStage("corpus", run.text_teacher(), self.rows, self.template, Sampling(n=2),
                                     shard_size=6, **self.more)  # fmt: skip
        run.add_metric("rows", len(corpus))


class Picky(Corpus):
    more = {
        "parse": lambda row: [] if row["number"] == 3 else [{**row, "tail": row["answer"].split()[-1]}],
        "filters": {"odd": lambda rows: [row["number"] % 2 == 0 for row in rows]},
        "unique": ("tail", "seed"),
    }


class Unknown(Corpus):
    template = "{{ wrod }} is"


class Taken(Corpus):
    rows = [{"answer": "there already", "word": "x"}]


class Nothing(Corpus):
    rows = []


METHODS = {"corpus": Corpus, "picky": Picky, "unknown": Unknown, "taken": Taken, "nothing": Nothing}


def data(options):
    return kdcore.DataModule({"train": [{"series": torch.zeros(2)}]}, kdcore.Task("unlabelled"))


def model(options, task):
    return kdcore.Model(torch.nn.Linear(2, 2))


class Plugin:
    @kdcore.hookimpl
    def kd_register_data(self):
        return [Component("data", "toy", data)]

    @kdcore.hookimpl
    def kd_register_methods(self):
        return [Component("method", name, cls) for name, cls in METHODS.items()]

    @kdcore.hookimpl
    def kd_register_teachers(self):
        teachers = {"echo": Echo, "silent": Silent, "short": Short}
        made = [Component("teacher", name, lambda options, task, cls=cls: cls()) for name, cls in teachers.items()]
        return [*made, Component("teacher", "toy", model)]


class Stop:
    @kdcore.hookimpl
    def kd_step_finished(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def go(path, method="corpus", teacher="echo", *plugins, **more):
    manager = kdcore.PluginManager(discover=False)
    manager.register(Plugin(), name="toy")
    for plugin in plugins:
        manager.register(plugin, name=type(plugin).__name__)
    recipe = {"method": method, "teacher": {"use": teacher, **more}, "data": "toy", "trackers": []}
    return kdcore.run(recipe, run_dir=path, plugins=manager)


def corpus(path):
    from datasets import load_from_disk

    return load_from_disk(str(path / "stages/01-corpus/artifact/data")).to_list()


def test_every_prompt_is_answered_once_and_every_row_says_where_it_comes_from(tmp_path):
    result = go(tmp_path / "run")
    rows = corpus(result.path)
    assert result.metrics == {"rows": 40}
    assert [row["number"] for row in rows] == [i for i in range(20) for _ in range(2)]
    assert rows[0]["prompt"] == "w0 is"
    assert {row["teacher"] for row in rows} == {"echo"}
    assert json.loads(rows[0]["sampling"]) == {"n": 2}
    assert len({row["seed"] for row in rows}) == 20
    assert [row["logprob"] for row in rows[:2]] == [-1.0, -2.0]


def test_an_interrupted_corpus_goes_on_with_the_shards_that_are_missing(tmp_path):
    whole = go(tmp_path / "whole")
    Echo.asked = []
    with pytest.raises(Interrupted, match="at prompt 12 of 20"):
        go(tmp_path / "run", "corpus", "echo", Stop())
    go(tmp_path / "run")
    assert sorted(Echo.asked) == sorted(f"w{i} is" for i in range(20))
    assert corpus(tmp_path / "run") == corpus(whole.path)


def test_a_damaged_shard_is_asked_for_again(tmp_path, caplog):
    with pytest.raises(Interrupted):
        go(tmp_path / "run", "corpus", "echo", Stop())
    file = next((tmp_path / "run/stages/01-corpus/shards/000000").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-10])
    go(tmp_path / "run")
    assert "its prompts are asked again" in caplog.text
    assert len(corpus(tmp_path / "run")) == 40


def test_what_is_dropped_is_counted_by_cause(tmp_path):
    rows = corpus(go(tmp_path / "run", "picky").path)
    report = json.loads((tmp_path / "run/stages/01-corpus/artifact/report.json").read_text())
    assert report == {"prompts": 20, "answers": 40, "kept": 20, "dropped": {"unparsed": 2, "odd": 18}}
    assert {row["number"] for row in rows} == set(range(0, 20, 2))
    assert {row["tail"] for row in rows} == {"0", "1"}


def test_rows_alike_but_for_case_and_blanks_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Corpus, "more", {"unique": ("answer",)})
    alike = [Answer("Same  thing"), Answer("same thing ")]
    monkeypatch.setattr(Echo, "generate", lambda self, prompts, sampling, seeds: [alike] * len(prompts))
    assert go(tmp_path / "run").metrics == {"rows": 1}


@pytest.mark.parametrize(
    ("method", "teacher", "error", "words"),
    [("unknown", "echo", RecipeError, "no field 'wrod'; did you mean 'word'"),
     ("taken", "echo", DataError, "a column 'answer'"),
     ("nothing", "echo", DataError, "no rows"),
     ("corpus", "silent", RunFailed, "nothing is left of 40 answers .dropped: empty 40"),
     ("corpus", "short", RunFailed, "did not give 2 answers to each of 6 prompts"),
     ("corpus", "toy", ModelError, "asks its teacher for text, which teachers.teacher .toy. does not give")],
)  # fmt: skip
def test_what_cannot_become_a_corpus_is_told(method, teacher, error, words, tmp_path):
    with pytest.raises(error, match=words):
        go(tmp_path / "run", method, teacher)


def test_a_text_teacher_is_refused_where_logits_are_asked_for_or_training(tmp_path):
    with pytest.raises(ModelError, match="gives no logits"):
        Echo()({"series": torch.zeros(1)})
    with pytest.raises(ModelError, match="layer3"):
        Echo().tap("layer3")
    with pytest.raises(RecipeError, match=r"teacher.train: a Echo cannot be trained"):
        go(tmp_path / "run", train=True)


@pytest.mark.parametrize("template", ["{{ word", "{% for x in %}", "{{ word.__class__.__mro__ }}"])
def test_a_template_that_is_malformed_or_reaches_out_is_refused(template):
    with pytest.raises(RecipeError, match="template"):
        render(template, {"word": "x"})


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=20), min_size=1))
def test_a_field_is_rendered_as_it_is(row):
    row = {f"f_{key}": value for key, value in row.items()}
    assert render("|".join(f"{{{{ {key} }}}}" for key in row), row) == "|".join(row.values())


SIZE = {"type": "integer", "minimum": 3}


@pytest.mark.parametrize(("text", "why"), [("4", None), ("2", "less than the minimum"), ('"4"', "not of type"),
                                           ("4 5", "no JSON"), ("", "no JSON")])  # fmt: skip
def test_an_answer_is_held_to_its_schema(text, why):
    found = misfit(text, SIZE)
    assert found is None if why is None else why in found


def test_what_is_no_schema_is_told_before_anything_is_asked():
    with pytest.raises(ValidationError, match="not a valid JSON Schema"):
        Sampling(json_schema={"type": "objekt"})
    with pytest.raises(RecipeError, match="nowhere"):
        misfit("4", {"$ref": "#/$defs/nowhere"})


class Limits(kdcore.Options):
    passing = frozenset({"patience"})
    patience: int | None = Field(None, description="changes nothing")
    wisdom: int = Field(1, description="changes everything")


def test_a_run_goes_on_when_only_passing_options_have_changed(tmp_path):
    class Limited:
        @kdcore.hookimpl
        def kd_register_teachers(self):
            return [Component("teacher", "limited", lambda options, task: Echo(), Limits)]

    with pytest.raises(Interrupted):
        go(tmp_path / "run", "corpus", "limited", Limited(), Stop())
    with pytest.raises(RunFolderError, match="wisdom: 1 there, 2 now"):
        go(tmp_path / "run", "corpus", "limited", Limited(), wisdom=2, patience=3)
    go(tmp_path / "run", "corpus", "limited", Limited(), patience=3)
    assert "patience: 3" in (tmp_path / "run/recipe.yaml").read_text()
    assert len(corpus(tmp_path / "run")) == 40


WORKER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_generate import go
go(Path(sys.argv[1]))
"""


def test_two_processes_write_the_corpus_that_one_writes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert corpus(tmp_path / "two") == corpus(go(tmp_path / "one").path)
