import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kdcore
from kd_symbolic_kd.data import TripleData, load_tokenizer
from kd_symbolic_kd.options import NAMES, ScriptedWorldOptions, TextFormatOptions
from kd_symbolic_kd.student import answers, with_special_tokens
from kd_symbolic_kd.world import FACTS, NOUNS, RELATIONS, VERBS, ScriptedWorld, event, split_of, valid, word_tokenizer
from kdcore import Component, PluginManager, api, hookimpl
from kdcore.data import IGNORE, Task
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError, RunFailed
from kdcore.models import Labels, Model
from kdcore.options import Sampling
from kdcore.testing.conformance import assert_same_students, cut_recipe
from kdcore.text import Answer, TextTeacher

METHOD = "symbolic-kd"
SEEDS = (0, 1)
MARGIN = 0.15


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, int], Any]:
    """The quickstart and its ablation, whole."""
    where = tmp_path_factory.mktemp("runs")
    names = [(kind, seed) for seed in SEEDS for kind in ("critic", "random")]
    return {(kind, seed): kdcore.run(METHOD, [f"seed={seed}", f"method.filter={kind}"], run_dir=where / f"{kind}{seed}")
            for kind, seed in names}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(runs) -> Any:
    return load_from_disk(str(runs["critic", 0].path / "stages" / "04-filter" / "artifact" / "data"))


def holds(rows: Any) -> list[bool]:
    return [valid(row["head"], row["relation"], row["tail"]) for row in rows]


def mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def report(result: Any, stage: str = "04-filter") -> dict[str, Any]:
    return json.loads((result.path / "stages" / stage / "artifact" / "report.json").read_text())


def test_the_student_says_more_that_is_true_than_after_as_many_unfiltered_triples(runs):
    for split in ("val", "test"):
        gains = [runs["critic", seed].metrics[f"{split}/match"] - runs["random", seed].metrics[f"{split}/match"]
                 for seed in SEEDS]  # fmt: skip
        assert mean(gains) > MARGIN
    for seed in SEEDS:
        kept, drawn = (report(runs[kind, seed]) for kind in ("critic", "random"))
        assert kept["kept"] == drawn["kept"] < kept["rows"]


def test_on_the_toy_world_a_match_is_the_truth(runs):
    rows = [
        json.loads(line)
        for line in (runs["critic", 0].path / "stages" / "06-answers" / "artifact" / "answers.jsonl")
        .read_text()
        .splitlines()
    ]
    assert [row["match"] for row in rows] == holds(rows)
    assert {row["split"] for row in rows} == {"val", "test"}
    assert len(rows) == 2 * 3 * len(VERBS) * len(NOUNS) / 5


def test_the_critic_tells_valid_triples_from_others(runs):
    for seed in SEEDS:
        lines = (runs["critic", seed].path / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        aucs = [row["metrics"]["val/auroc"] for row in found if row["stage"] == "critic" and "metrics" in row]
        assert max(aucs) > 0.85


def test_stricter_filters_are_more_precise_and_keep_about_the_share_that_was_asked_for(runs, corpus):
    truth, scores = torch.tensor(holds(corpus)), torch.tensor(corpus["p_valid"][:])
    cut = report(runs["critic", 0])["cut_off"]
    accepted = scores > cut
    assert accepted.tolist() == corpus["kept"][:]
    assert truth[accepted].float().mean() > truth.float().mean() + 0.1
    half = scores > scores[truth].quantile(0.5)
    assert truth[half].float().mean() >= truth[accepted].float().mean()
    for split in ("val", "test"):
        assert report(runs["critic", 0])[split]["recall"] == pytest.approx(0.9, abs=0.1)


def test_no_event_is_in_two_splits_and_no_name_leaks(runs, corpus):
    by_event: dict[str, set[str]] = {}
    for row in corpus:
        by_event.setdefault(row["head"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_event.values())
    assert {split for splits in by_event.values() for split in splits} == {"train", "val", "test"}
    assert not [row["tail"] for row in corpus if {"Alex", "Chris"} & set(row["tail"].split())]
    assert any("PersonY" in row["tail"] for row in corpus)
    assert len({(r["head"], r["relation"], r["tail"]) for r in corpus}) == len(corpus)


def test_every_row_says_where_it_comes_from(corpus):
    row = corpus[0]
    assert row["teacher"] == "scripted-world"
    assert row["prompt"].rstrip().endswith(("needed", "wants", "feels"))
    assert "Alex" in row["prompt"].split("\n\n")[-1]
    assert row["answer"].strip().removesuffix(".").replace("Chris", "PersonY") == row["tail"]
    assert json.loads(row["sampling"]) == {"max_tokens": 12, "top_p": 0.5, "n": 6, "stop": ["\n"], "logprobs": True}
    assert row["logprob"] < 0
    assert isinstance(row["seed"], int)


def test_events_are_whole_cleaned_and_the_likeliest(runs):
    artifact = runs["critic", 0].path / "stages" / "01-events" / "artifact"
    events = (artifact / "events.txt").read_text().splitlines()
    raw = load_from_disk(str(artifact / "data"))
    assert len(events) == len(set(events)) == int(0.8 * len(set(raw["event"])))
    assert all(event.startswith("PersonX") and "so on" not in event for event in events)
    assert report(runs["critic", 0], "01-events")["dropped"]["unparsed"] > 0
    kept = load_from_disk(str(artifact / "kept"))
    assert kept["logprob"][:] == sorted(kept["logprob"], reverse=True)


def test_the_students_tokenizer_knows_the_special_tokens_and_a_text_comes_out_outside_the_run(runs):
    import transformers

    folder = runs["critic", 0].path / "student"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    head = next(event(v, n) for v in VERBS for n in NOUNS if split_of(v, n) == "val")
    prompt = f"<head> {head} </head> <relation> xNeed </relation> [GEN]"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    assert tokenizer.unk_token_id not in ids["input_ids"]
    found = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    lines = (runs["critic", 0].path / "stages" / "06-answers" / "artifact" / "answers.jsonl").read_text().splitlines()
    ours = next(r for r in map(json.loads, lines) if (r["head"], r["relation"]) == (head, "xNeed"))
    assert text == ours["tail"]


# -- stopping and going on -----------------------------------------------------------------------------------------


class StopIn:
    """Sends SIGINT when a stage has taken so many steps in this session."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.left = stage, step

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        self.left -= stage.name == self.stage
        if self.left == 0 and stage.name == self.stage:
            os.kill(os.getpid(), signal.SIGINT)


def short(**method: Any) -> dict[str, Any]:
    recipe = cut_recipe(METHOD)
    recipe["method"].update(shard_size=4, **method)
    recipe["stages"]["critic"]["train"].update(eval_every=2)
    return recipe


def test_every_stage_goes_on_where_it_was_stopped(tmp_path):
    whole = api.run(short(), run_dir=tmp_path / "whole")
    for stage, step in (("events", 2), ("inferences", 3), ("critic", 3), ("filter", 1), ("distill", 3), ("answers", 1)):
        manager = PluginManager()
        manager.register(StopIn(stage, step), name="stop")
        with pytest.raises(Interrupted, match=f"in stage '{stage}'"):
            api.run(short(), run_dir=tmp_path / "stopped", plugins=manager)
    resumed = api.run(short(), run_dir=tmp_path / "stopped")
    assert resumed.metrics == whole.metrics
    assert_same_students(whole.path, resumed.path)
    for stage in ("02-inferences", "04-filter"):
        ours, theirs = (load_from_disk(str(r.path / "stages" / stage / "artifact" / "data")) for r in (resumed, whole))
        assert ours.to_list() == theirs.to_list()


def test_without_a_critic_all_triples_are_kept(tmp_path):
    recipe = short(filter="none")
    recipe["stages"] = {}
    result = api.run(recipe, run_dir=tmp_path / "run")
    assert [path.name for path in sorted((result.path / "stages").iterdir())] == [
        "01-events", "02-inferences", "03-distill", "04-answers"]  # fmt: skip
    assert "val/accepted" not in result.metrics


def test_a_second_teacher_writes_the_tails(tmp_path):
    recipe = short()
    recipe["teachers"]["inferences"] = {"use": "scripted-world", "mistakes": 0.0}
    result = api.run(recipe, run_dir=tmp_path / "run")
    assert all(holds(load_from_disk(str(result.path / "stages" / "02-inferences" / "artifact" / "data"))))


def test_the_critic_keeps_its_best_weights_lowers_its_rate_and_stops(tmp_path):
    recipe = short()
    recipe["method"]["critic"] |= {"patience": 4, "plateau": 2, "plateau_factor": 0.5}
    recipe["stages"]["critic"]["train"] |= {
        "steps": 200,
        "eval_every": 1,
        "log_every": 1,
        "save_every": 1000,
        "schedule": {"name": "constant"},
        "optimizer": {"name": "sgd", "lr": 1e-9},
    }
    result = api.run(recipe, run_dir=tmp_path / "run")
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["stage"] == "critic" and "lr" in row]
    assert rates == pytest.approx([1e-9] * 3 + [5e-10] * 2)  # 1 is the best, 2 and 3 are not: then halved; stop after 5


# -- wrong input ---------------------------------------------------------------------------------------------------


class Says(TextTeacher):
    """Always the same; no log-probabilities."""

    def __init__(self, text: str, finish: str = "stop") -> None:
        self.text, self.finish = text, finish

    def generate(self, prompts, sampling: Sampling, seeds):
        return [[Answer(self.text, self.finish)] * sampling.n for _ in prompts]


def with_parts(*components: Component) -> PluginManager:
    class Parts:
        @hookimpl
        def kd_register_teachers(self):
            return [c for c in components if c.kind == "teacher"]

        @hookimpl
        def kd_register_data(self):
            return [c for c in components if c.kind == "data"]

    manager = PluginManager()
    manager.register(Parts, name="parts")
    return manager


def rows(count: int = 12, **more: Any) -> list[dict[str, Any]]:
    found = [{"head": event(v, n), "relation": r, "tail": FACTS[v][r][0], "split": split_of(v, n)}
             for v in VERBS for n in NOUNS for r in RELATIONS]  # fmt: skip
    return [row | more for row in found][: count or None]


def words() -> Any:
    return word_tokenizer(iter([*NAMES, *(w for row in rows(0) for key in ("head", "relation", "tail")
                                          for w in row[key].split())]))  # fmt: skip


def data(triples: list[Any], labelled: list[Any]) -> Component:
    return Component("data", "mine", target=lambda _=None: TripleData(triples, labelled, words(), TextFormatOptions()))


def run_wrong(tmp_path: Path, *components: Component, teacher: str | None = None, mine: bool = False, **method: Any):
    recipe = short(**method)
    if teacher:
        recipe["teachers"] = {"teacher": {"use": teacher}}
    if mine:
        recipe["data"] = {"use": "mine"}
    return api.run(recipe, run_dir=tmp_path / "run", plugins=with_parts(*components))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nmber }}. Event: {{ event }}", "no field 'nmber'; did you mean 'number'"),
        ("{{ number }}. Event:", "does not use"),
        ("{{ number", "is not valid"),
    ],
)
def test_an_event_template_that_does_not_fit(tmp_path, template, message):
    with pytest.raises(RecipeError, match=message):
        run_wrong(tmp_path, event_template=template)
    assert not (tmp_path / "run").exists()


def test_a_template_of_any_relation_with_an_unknown_field_is_told_before_anything_is_asked(tmp_path):
    wrong = {"xReact": {"item": "{{ number }}. {{ hed }} feels {{ tail }}", "connector": "feels"}}
    with pytest.raises(RecipeError, match="no field 'hed'; did you mean 'head'"):
        run_wrong(tmp_path, templates=wrong)
    assert not (tmp_path / "run").exists()


def test_a_relation_without_a_template():
    with pytest.raises(RecipeError, match=r"no template for 'xNeeds'.*did you mean 'xNeed'"):
        api.plan(METHOD, ["method.relations=[xNeeds]"])
    assert api.plan(
        METHOD, ["method.relations=[likes]", "method.templates={likes: {item: 'a {{ tail }}', connector: b}}"]
    )


def test_a_teacher_that_gives_no_text(tmp_path):
    recipe = short()
    recipe["teachers"] = {"teacher": recipe["students"]["student"]}
    with pytest.raises(ModelError, match=r"asks its teacher for text, which teachers\.teacher"):
        api.run(recipe, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "finish", "message"),
    [
        ("  \n ", "stop", "nothing is left of .* empty"),
        (" Someone sleeps", "stop", "nothing is left of .* unparsed"),
        (" PersonX sleeps and", "length", "nothing is left of .* unparsed"),
        (" PersonX sleeps", "stop", "gives no log-probabilities"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path, text, finish, message):
    says = Component("teacher", "says", target=lambda options, task: Says(text, finish))
    with pytest.raises((RunFailed, ModelError), match=message):
        run_wrong(tmp_path, says, teacher="says")


def test_events_of_strange_characters_only(tmp_path):
    says = Component("teacher", "says", target=lambda options, task: Says(" PersonX #!"))
    with pytest.raises(RunFailed, match="none is left after cleaning"):
        run_wrong(tmp_path, says, teacher="says", keep_fraction=1.0)


@pytest.mark.parametrize(
    ("labelled", "message"),
    [([], "train has none"), (rows(0, valid=1), "all of them valid"), (rows(0, valid=0), "all of them not")],
)
def test_a_critic_needs_both_kinds_of_labelled_triples(tmp_path, labelled, message):
    with pytest.raises(DataError, match=message):
        run_wrong(tmp_path, data(rows(0), labelled), mine=True)
    assert not (tmp_path / "run").exists()


def test_a_critic_that_leaves_nothing_to_train_on(tmp_path, monkeypatch):
    def doubtful(critic, reader, rows, device):  # of the judged triples some are valid, of the teacher's none
        judged = {(row["head"], row["relation"], row["tail"]) for row in labelled}
        return [0.5 + i / 1e6 if (r["head"], r["relation"], r["tail"]) in judged else 0.1 for i, r in enumerate(rows)]

    monkeypatch.setattr("kd_symbolic_kd.stages.score", doubtful)
    labelled = [row | {"tail": f"{row['tail']} again", "valid": i % 2} for i, row in enumerate(rows(0))]
    with pytest.raises(RunFailed, match=r"the critic leaves none to train on \(cut-off 0\.5.*raise method\.target_rec"):
        run_wrong(tmp_path, data(rows(0), labelled), mine=True)


def test_a_corpus_without_a_training_split(tmp_path):
    recipe = short(filter="none", fractions=[0.01, 0.01, 0.98], event_prompts=1, event_sampling={"n": 4})
    recipe["stages"] = {}
    with pytest.raises(RunFailed, match=r"of \d+ triples that the teacher wrote none is of the training split"):
        api.run(recipe, run_dir=tmp_path / "run")


def test_a_recall_that_the_critic_cannot_give(tmp_path):
    alike = [next(row for row in rows(0) if row["split"] == split) for split in ("train", "val", "test")]
    labelled = [row | {"valid": truth} for row in alike for truth in (1, 0)]  # nobody can tell these apart
    with pytest.raises(DataError, match=r"method\.target_recall: no threshold has a recall as low as 0\.5"):
        run_wrong(tmp_path, data(rows(0), labelled * 4), mine=True, target_recall=0.5)


def test_data_that_holds_no_triples(tmp_path):
    recipe = short()
    recipe["data"] = {"use": "sentences"}
    with pytest.raises(DataError, match="needs triples of head, relation and tail"):
        api.run(recipe, run_dir=tmp_path / "run")


def test_a_relation_that_the_data_does_not_show(tmp_path):
    with pytest.raises(DataError, match="no triple of relation 'xAttr' to show"):
        run_wrong(tmp_path, relations=["xNeed", "xAttr"])


def test_heads_that_are_no_events(tmp_path):
    with pytest.raises(DataError, match="no head of the training data begins with 'Somebody'"):
        run_wrong(tmp_path, event_prefix="Somebody")


def test_a_student_that_cannot_take_more_tokens():
    task = Task("causal-lm", num_classes=30, tokenizer=words())
    with pytest.raises(ModelError, match="knows 7 tokens"):
        with_special_tokens(Model(torch.nn.Linear(2, 7), labels=Labels(7)), task, 0)


# -- triples as texts ----------------------------------------------------------------------------------------------


def test_only_the_tail_and_the_end_are_to_be_predicted():
    made = TripleData(rows(0), [], words(), TextFormatOptions())
    long, brief = rows(0)[0], {**rows(0)[1], "tail": "to"}
    batch = made.batch([long, brief])
    tokenizer = made.tokenizer
    for row, ids, labels, mask in zip((long, brief), batch["input_ids"], batch["labels"], batch["attention_mask"],
                                      strict=True):  # fmt: skip
        wanted = [*tokenizer(row["tail"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert labels[labels != IGNORE].tolist() == wanted
        assert ids[1:][labels[:-1] != IGNORE].tolist() == wanted
        assert tokenizer.decode(ids[mask.bool()]).split()[:4] == ["<head>", *row["head"].split()[:3]]
    assert made.task.num_classes == len(tokenizer)


def test_the_written_form_has_the_tokens_that_the_student_learns(tmp_path):
    core = Tokenizer(models.BPE())  # where blanks belong to words, as in GPT-2
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<end>"]))
    row = {"head": "PersonX eats", "relation": "xWant", "tail": "to rest", "split": "train"}
    made = TripleData([row], [], PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>"), TextFormatOptions())
    made.tokenizer.save_pretrained(tmp_path)
    written = "<head> PersonX eats </head> <relation> xWant </relation> [GEN] to rest<end>"
    assert load_tokenizer(str(tmp_path))(written)["input_ids"] == made.batch([row])["input_ids"][0].tolist()


def test_long_heads_are_cut_and_the_tail_stays_whole():
    made = TripleData(rows(0), [], words(), TextFormatOptions(max_length=16))
    row = {**rows(0)[0], "head": " ".join(["boat"] * 40)}
    batch = made.batch([row])
    assert batch["input_ids"].shape[1] <= 16
    count = len(made.tokenizer(row["tail"], add_special_tokens=False)["input_ids"]) + 1
    assert (batch["labels"] != IGNORE).sum() == count


def test_special_tokens_that_are_in_use():
    taken = word_tokenizer(iter(["[GEN]", "boat"]))
    with pytest.raises(DataError, match=r"'\[GEN\]' is a word of the tokenizer's vocabulary already"):
        TripleData(rows(0), [], taken, TextFormatOptions())
    with pytest.raises(DataError, match="holds '<head>'"):
        TripleData([{**rows(0)[0], "tail": "to lift <head>"}], [], words(), TextFormatOptions())
    with pytest.raises(DataError, match="two of them are alike"):
        TripleData(rows(0), [], words(), TextFormatOptions(special_tokens=("<a>", "<a>", "<b>", "<c>", "<d>")))
    again = TripleData(rows(0), [], words(), TextFormatOptions()).tokenizer
    size = len(again)
    assert len(TripleData(rows(0), [], again, TextFormatOptions()).tokenizer) == size


def test_a_tokenizer_without_an_end():
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        TripleData(rows(0), [], tokenizer, TextFormatOptions())


def test_a_larger_embedding_keeps_what_was_there_and_its_tokenizer(tmp_path):
    from kd_transformers.build import build
    from kd_transformers.options import TransformersOptions

    plain = words()
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
    model = build(TransformersOptions(config=config), Task("causal-lm", tokenizer=plain))
    before = model.module.get_input_embeddings().weight.detach().clone()
    made = TripleData(rows(0), [], words(), TextFormatOptions())
    grown = with_special_tokens(model, made.task, 0)
    after = model.module.get_input_embeddings().weight
    assert len(after) == len(made.tokenizer) == len(before) + 5
    assert torch.equal(after[: len(before)], before)
    grown.save(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(made.tokenizer)
    pairs = [("PersonX buys the boat", "xNeed"), ("PersonX wins", "xReact")]
    both = answers(grown, made, pairs, 5, torch.device("cpu"))
    assert both == [answers(grown, made, [pair], 5, torch.device("cpu"))[0] for pair in pairs]


def test_the_script_follows_its_seeds_and_refuses_what_it_does_not_know():
    teacher = ScriptedWorld(ScriptedWorldOptions(), Task("unlabelled"))
    asked = ["1. Event:", "2. Alex buys the boat. As a result, Alex wants"]
    sampling = Sampling(n=3, stop=("\n",))
    both = teacher.generate(asked, sampling, [1, 2])
    assert both == [teacher.generate([a], sampling, [s])[0] for a, s in zip(asked, [1, 2], strict=True)]
    with pytest.raises(RecipeError, match="does not know how to go on"):
        teacher.generate(["Alex eats because"], sampling, [1])
