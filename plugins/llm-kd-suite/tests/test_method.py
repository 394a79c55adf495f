"""The suite's algorithms, run on small Llamas: what each trains on, and what it changes."""

import json

import pytest
import torch

from kd_llm_kd_suite import functional
from kd_llm_kd_suite.elicit import groups, ranked
from kd_llm_kd_suite.losses import Divergence
from kd_llm_kd_suite.texts import Buffer, Schedule
from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore import PluginManager, api
from kdcore.data import Task
from kdcore.errors import UserError
from kdcore.reading import load
from kdcore.recipe import find_recipe
from kdcore.testing.conformance import effect

SMALL = ["data.train=96", "data.val=24", "teacher.train.epochs=1", "method.sft_epochs=0", "train.steps=6",
         "train.batch_size=16", "method.answers=4", "method.max_new_tokens=8", "train.log_every=1"]  # fmt: skip


def run(tmp_path, *overrides, name="run"):
    return api.run("llm-kd-suite", [*SMALL, *overrides], run_dir=tmp_path / name)


def terms(result):
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["terms"] for row in rows if row["stage"] == "distill" and "terms" in row]


@pytest.mark.parametrize(("algorithm", "names"), [
    ("sft", {"sft"}), ("seqkd", {"sft"}), ("fkl", {"fkl"}), ("rkl", {"rkl"}), ("sym", {"sym"}), ("jsd", {"jsd"}),
    ("tvd", {"tvd"}), ("sfkl", {"sfkl"}), ("srkl", {"srkl"}), ("distillm", {"srkl"}), ("hidden", {"fkl", "hidden"}),
    ("minillm", {"policy", "single-step", "lm", "kd"}),
])  # fmt: skip
def test_an_algorithm_trains_the_student_by_its_terms(algorithm, names, tmp_path):
    result = run(tmp_path, f"method.algorithm={algorithm}")
    found = terms(result)
    assert len(found) == 6
    assert all(set(row) == names for row in found)
    assert {"val/perplexity", "val/rouge-l", "val/divergence", "val/teacher-logprob"} <= set(result.metrics)
    samples = (result.path / "stages").glob("*-answers/artifact/samples.jsonl")
    rows = [json.loads(line) for line in next(samples).read_text().splitlines()]
    assert len(rows) >= 4
    assert all({"prompt", "reference", "student", "teacher"} == set(row) for row in rows)


@pytest.mark.parametrize("algorithm", ["dpo", "rrhf", "pro"])
def test_ranked_answers_of_the_student_teach_it_what_the_teacher_prefers(algorithm, tmp_path):
    before = run(tmp_path, "method.algorithm=sft", "train.steps=12", name="before")
    more = ["method.elicit=feedback", f"method.algorithm={algorithm}", "train.steps=12", "method.dpo_beta=1.0",
            f"student.checkpoint={before.path}", f"teacher.checkpoint={_teacher(before)}", "teacher.train=false",
            "student.config={}", "teacher.config={}", "method.answers=24"]  # fmt: skip
    after = run(tmp_path, *more, name="after")
    value = [row[algorithm] for row in terms(after)]
    assert value[-1] < value[0]
    assert after.metrics["val/teacher-logprob"] > before.metrics["val/teacher-logprob"]


def _teacher(result):
    return next((result.path / "stages").glob("*-teacher")) / "artifact" / "teacher"


def test_the_best_of_its_own_answers_and_a_reward_model_train_the_student(tmp_path):
    run(tmp_path, "method.elicit=self", "method.algorithm=sft", name="self")
    result = run(tmp_path, "method.elicit=feedback", "method.algorithm=rm_rl", name="reward")
    names = [path.name.partition("-")[2] for path in sorted((result.path / "stages").iterdir())]
    assert names == ["teacher", "samples", "feedback", "reward", "distill", "answers"]
    assert set(terms(result)[0]) == {"policy"}


def test_feedback_ranks_by_the_teachers_score_and_leaves_out_what_is_alike():
    corpus = [(1, [4], "[5]"), (0, [3], "[6]"), (0, [3], "[7, 8]"), (1, [4], "[5]")]
    found = groups([{"number": n, "tokens": tokens, "answer": answer} for n, tokens, answer in corpus])
    kept = ranked(found, torch.tensor([-2.0, -1.0, -3.0, -3.0]))
    assert kept == [{"prompt": [3], "answers": [[7, 8], [6]]}]


def test_all_steps_are_on_texts_of_the_student_if_the_fraction_is_1(tmp_path):
    result = run(tmp_path, "method.algorithm=gkd", "method.lmbda=1", "method.sft_weight=1")
    assert all(row["sft"] == 0 and row["jsd"] > 0 for row in terms(result))
    alone = run(tmp_path, "method.algorithm=gkd", "method.lmbda=0", "method.sft_weight=1", name="data")
    assert all(row["sft"] > 0 for row in terms(alone))


def test_a_schedule_is_a_share_of_the_steps_and_grows_with_the_validation_loss():
    schedule, buffer = Schedule(0.3, replay=True, adaptive=True), Buffer(4)
    buffer.rows = [{"prompt": [1], "answer": [2]}]
    kinds = [schedule.choose(buffer, 0.5, step) for step in range(2000)]
    assert abs(kinds.count("data") / 2000 - 0.7) < 0.04
    assert abs(kinds.count("new") / 2000 - 0.15) < 0.03  # 0.3 * (1 - 0.5)
    assert [schedule.choose(buffer, 0.999, step) for step in range(300)].count("new") == 0
    for perplexity, expected in ((5.0, 0.3), (5.2, 0.3), (9.0, 0.4), (9.0, 0.4), (20.0, 0.5)):
        schedule.watch(buffer, perplexity)
        assert buffer.facts.get("fraction", 0.3) == pytest.approx(expected)


def test_a_buffer_keeps_the_latest_rows_and_comes_back_from_a_checkpoint():
    buffer, other = Buffer(3), Buffer(3)
    buffer.push([{"prompt": [i], "answer": [i, i]} for i in range(5)])
    buffer.facts["fraction"] = 0.1 + 0.2
    other.load_state_dict(buffer.state_dict())
    assert [row["prompt"] for row in other.rows] == [[2], [3], [4]]
    assert other.facts == {"fraction": 0.1 + 0.2}
    like = {"input_ids": torch.zeros(2, 1), "index": torch.tensor([0, 1])}
    drawn = other.draw(like, 7)
    assert drawn["input_ids"].shape == (2, 3)
    assert torch.equal(drawn["index"], like["index"])


@pytest.mark.parametrize("algorithm", ["gkd", "minillm"])
def test_micro_batches_give_the_student_of_the_whole_batch(algorithm, tmp_path):
    more = [f"method.algorithm={algorithm}", "method.lmbda=0.6", "method.policy=replay", "train.optimizer.name=sgd"]
    students = []
    for name, parts in (("one", 1), ("four", 4)):
        result = run(tmp_path, *more, f"train.grad_accumulation={parts}", name=name)
        students.append(result.student.state_dict())
    for key, value in students[0].items():
        torch.testing.assert_close(value, students[1][key], rtol=2e-4, atol=2e-5)


def test_padding_changes_no_loss():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 3:] = -100
    wide = [torch.nn.functional.pad(t, (0, 0, 0, 4), value=9.0) for t in (logits, teacher)]
    padded = torch.nn.functional.pad(labels, (0, 4), value=-100)
    for name in functional.DIVERGENCES:
        short, long = (functional.divergence(name, *x, y) for x, y in (((logits, teacher), labels), (wide, padded)))
        torch.testing.assert_close(short, long)


@pytest.mark.parametrize(("overrides", "message"), [
    (["method.beta=1.5"], "method.beta"),
    (["method.temperature=0"], "method.temperature"),
    (["method.algorithm=sym", "method.lam=1"], "method.lam"),
    (["method.buffer_capacity=0"], "method.buffer_capacity"),
    (["method.algorithm=uld", "method.lmbda=0.5"], "lmbda"),
    (["method.algorithm=sft", "method.elicit=feedback"], "elicit"),
    (["method.algorithm=dpo", "method.elicit=none"], "chosen"),
    (["method.algorithm=distillm", "eval.metrics=[token-accuracy]"], "perplexity"),
    (["method.algorithm=uld"], "tokenizer"),
    (["data.prompt=60", "student.config.max_position_embeddings=40", "teacher.config.max_position_embeddings=200"],
     "at most 40 tokens"),
])  # fmt: skip
def test_wrong_input_is_refused_with_the_way_out(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *overrides)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"use": "topics"}}, "language models"),
    ({"students": {"student": {"use": "demo-transformer"}}}, "writes no tokens"),
])  # fmt: skip
def test_other_tasks_and_models_that_do_not_write_are_refused(changes, message, tmp_path):
    recipe = load(str(find_recipe("llm-kd-suite", PluginManager())[0]), [])
    with pytest.raises(UserError, match=message):
        api.run({**recipe, "teachers": {"teacher": {"use": "demo-transformer"}}, **changes}, run_dir=tmp_path / "run")


def test_packed_rows_give_the_loss_of_the_texts_apart():
    torch.manual_seed(0)
    config = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    task = Task("causal-lm", num_classes=40)
    student, teacher = (build(TransformersOptions(config=config), task) for _ in range(2))
    texts = [torch.randint(4, 40, (n,)) for n in (5, 7)]
    targets = [torch.cat([text[1:], torch.tensor([-100])]) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    apart = {"input_ids": pad(texts, True, 0), "labels": pad(targets, True, -100),
             "attention_mask": pad([torch.ones_like(t) for t in texts], True, 0)}  # fmt: skip
    packed = {"input_ids": torch.cat(texts)[None], "labels": torch.cat(targets)[None],
              "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}  # fmt: skip
    loss = Divergence("jsd", beta=0.5)
    values = [loss(student(batch), teacher(batch), batch) for batch in (apart, packed)]
    torch.testing.assert_close(*values)
    assert loss.count(apart) == loss.count(packed) == 10


def test_the_teacher_gives_a_better_student_than_the_texts_alone(tmp_path):
    assert effect("llm-kd-suite", tmp_path, seeds=(0, 1, 2)) > 0.4
