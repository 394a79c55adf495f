"""Language models that answer prompts: what is drawn, how likely it was, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

import kdcore
from kd_transformers.options import TextOptions
from kd_transformers.text import TransformersText
from kd_transformers.writing import draw, penalised
from kdcore import Component, GenerateStage, Method, Roles, Sampling, folder
from kdcore.errors import DataError, ModelError, RunFailed
from kdcore.options import Download

PROMPTS = ["word3 word4 word5", "word9", "word20 word30 word31 word32 word7"]


@pytest.fixture
def teacher(folder):
    """`teacher(name="llama", head="causal-lm", config={}, **options)`."""

    def make(name="llama", head="causal-lm", config=None, **options):
        config = {"decoder_start_token_id": 0} if name == "t5" and config is None else config
        return TransformersText(TextOptions(model=folder(name, head, tokenizer=True, **(config or {})), **options))

    return make


def logits_of(teacher, prompt, text):
    """Tokens of an answer and the logits `[T, V]` they were drawn from, read in one forward pass."""
    ids, said = (teacher.tokenizer(part)["input_ids"] for part in (prompt, text))
    if teacher.decoder_only:
        found = teacher.module(torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1]
    else:
        start = [teacher.module.config.decoder_start_token_id]
        found = teacher.module(torch.tensor([ids]), decoder_input_ids=torch.tensor([start + said])).logits[0, :-1]
    return said, found


# -- drawing ---------------------------------------------------------------------------------------------------------

rows = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=7)


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([1.0, 0.9, 0.5, 0.01]))
def test_tokens_are_drawn_as_often_as_they_are_likely(logits, temperature, top_p):
    logits = torch.tensor(logits)
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = draw(logits.expand(4000, -1), grid, temperature, top_p)
    wanted = (logits / temperature).softmax(0).tolist()
    nucleus, total = set(), 0.0
    for token in sorted(range(len(wanted)), key=lambda i: -wanted[i]):
        if total < top_p - 1e-6:
            nucleus.add(token)
        total += wanted[token]
    share = sum(wanted[i] for i in nucleus)
    for token, chance in enumerate(wanted):
        found = (drawn == token).double().mean().item()
        assert found == pytest.approx(chance / share if token in nucleus else 0.0, abs=2e-3)


def test_temperature_zero_takes_the_likeliest_whatever_the_number():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert draw(logits, torch.rand(5), 0.0, 1.0).tolist() == logits.argmax(1).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_follow_what_is_written(written, presence, frequency):
    logits = torch.linspace(-1, 1, 5).expand(1, 5)
    found = penalised(logits, torch.tensor([written], dtype=torch.long), presence, frequency)[0].tolist()
    wanted = [logits[0, v].item() - presence * (v in written) - frequency * written.count(v) for v in range(5)]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_penalty_forbids_repetition(teacher):
    t = teacher()
    repeated = Sampling(max_tokens=12, temperature=0)
    fresh = Sampling(max_tokens=12, temperature=0, frequency_penalty=1e4)
    words = [answer[0].text.split() for answer in t.generate(PROMPTS, fresh, [0, 0, 0])]
    assert all(len(set(said)) == len(said) for said in words)
    assert max(map(len, words)) > 5
    assert any(len(set(a[0].text.split())) < len(a[0].text.split()) for a in t.generate(PROMPTS, repeated, [0, 0, 0]))


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq")])
def test_the_log_probability_is_the_models_own(teacher, name, head):
    t = teacher(name, head, batch_size=16)
    sampling = Sampling(max_tokens=4, n=40, temperature=0.7, top_p=0.9, presence_penalty=0.5, logprobs=True)
    checked = 0
    for prompt, group in zip(PROMPTS, t.generate(PROMPTS, sampling, [1, 2, 3]), strict=True):
        for answer in group:
            said, logits = logits_of(t, prompt, answer.text)
            if answer.finish == "length" and len(said) == answer.tokens == 4:  # nothing that the text leaves out
                chosen = logits.log_softmax(1)[torch.arange(4), said]
                assert answer.logprob == pytest.approx(chosen.sum().item(), abs=1e-4)
                checked += 1
    assert checked >= 3


@pytest.mark.parametrize(("name", "head"), [("gpt2", "causal-lm"), ("t5", "seq2seq")])
def test_temperature_zero_is_the_librarys_greedy_decoding(teacher, name, head):
    t = teacher(name, head)
    answers = t.generate(PROMPTS, Sampling(max_tokens=8, temperature=0), [0, 0, 0])
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        inputs = t.tokenizer(prompt, return_tensors="pt").to("cpu")
        plain = t.module.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8)
        start = inputs["input_ids"].shape[1] if t.decoder_only else 1
        assert answer.text.strip() == t.tokenizer.decode(plain[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_answer_depends_on_its_prompt_and_seed_alone(teacher, batch_size):
    t = teacher(batch_size=batch_size)
    sampling = Sampling(max_tokens=10, n=3)
    together = t.generate(PROMPTS, sampling, [5, 6, 7])
    assert t.generate(PROMPTS[1:2], sampling, [6]) == together[1:2]
    assert t.generate(PROMPTS[::-1], sampling, [7, 6, 5]) == together[::-1]
    assert t.generate(PROMPTS, sampling, [8, 9, 10]) != together
    assert len({answer.text for group in together for answer in group}) == 9


def test_samples_follow_the_models_distribution(teacher):
    t = teacher(batch_size=200)
    answers = t.generate(PROMPTS[:1], Sampling(max_tokens=1, n=3000), [0])[0]
    ids = torch.tensor([t.tokenizer(PROMPTS[0])["input_ids"]])
    wanted = t.module(ids).logits[0, -1].softmax(0)
    counts = torch.zeros(len(wanted))
    for answer in answers:
        said = t.tokenizer(answer.text)["input_ids"]
        counts[said[0] if said else 0] += 1
    plain = torch.arange(3, 40)
    assert (counts[plain] / 3000 - wanted[plain]).abs().max() < 0.02


def test_it_stops_at_the_end_token_or_the_limit(teacher):
    t = teacher()
    answers = [a for g in t.generate(PROMPTS, Sampling(max_tokens=30, n=20), [1, 2, 3]) for a in g]
    ended = [a for a in answers if a.finish == "stop"]
    assert 5 < len(ended) < 60
    beyond = [a.tokens - len(a.text.split()) for a in ended]  # the token that ends it, and those that are no word
    assert set(beyond) >= {0, 1}  # this model says the padding token too
    assert max(a.tokens for a in ended) <= 30
    assert {a.tokens for a in answers if a.finish == "length"} == {30}


def test_an_answer_ends_before_a_stop_text(teacher):
    t = teacher()
    sampling = Sampling(max_tokens=8, n=20, logprobs=True)
    whole = t.generate(PROMPTS[:1], sampling, [4])[0]
    number, words = next((i, a.text.split()) for i, a in enumerate(whole) if len(set(a.text.split())) == 8)
    cut = t.generate(PROMPTS[:1], sampling.model_copy(update={"stop": ("nothing", f" {words[5]}")}), [4])[0][number]
    assert cut.text.split() == words[:5]
    assert (cut.finish, cut.tokens) == ("stop", 6)
    said, logits = logits_of(t, PROMPTS[0], " ".join(words))
    assert cut.logprob == pytest.approx(logits.log_softmax(1)[torch.arange(6), said[:6]].sum().item(), abs=1e-4)


def test_the_models_own_generation_settings_are_left_aside(teacher, folder):
    plain = teacher()
    where = Path(folder("llama", "causal-lm", tokenizer=True))
    config = json.loads((where / "generation_config.json").read_text())
    changed = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "num_beams": 2, "min_new_tokens": 4}
    (where / "generation_config.json").write_text(json.dumps({**config, **changed}))
    sampling = Sampling(max_tokens=10, n=3)
    theirs = TransformersText(TextOptions(model=str(where)))
    assert theirs.generate(PROMPTS, sampling, [1, 2, 3]) == plain.generate(PROMPTS, sampling, [1, 2, 3])


def test_a_chat_goes_through_the_template(teacher, folder):
    where = folder("llama", "causal-lm", tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}word8"
    tokenizer.save_pretrained(where)
    chat, sampling = TransformersText(TextOptions(model=where, mode="chat")), Sampling(max_tokens=5)
    plain = TransformersText(TextOptions(model=where))
    wanted = plain.generate(["word3 word8"], sampling, [1])
    assert chat.generate(["word3"], sampling, [1]) == wanted
    assert plain.generate([[{"role": "user", "content": "word3"}]], sampling, [1]) == wanted


def test_the_blank_between_prompt_and_answer_is_part_of_the_answer(teacher):
    (answer,) = teacher().generate(["word3"], Sampling(max_tokens=3, temperature=0), [1])[0]
    assert answer.text.startswith(" word")


def test_the_student_of_a_run_can_teach(teacher, tmp_path):
    source = teacher()
    source.module.save_pretrained(tmp_path / "run/made")
    source.tokenizer.save_pretrained(tmp_path / "run/made")
    folder.commit(tmp_path / "run/made", tmp_path / "run/student")
    (tmp_path / "run/run.json").write_text(json.dumps(folder._sealed({"status": "finished"})))
    again = TransformersText(TextOptions(checkpoint=str(tmp_path / "run")))
    sampling = Sampling(max_tokens=5)
    assert again.generate(PROMPTS, sampling, [1, 2, 3]) == source.generate(PROMPTS, sampling, [1, 2, 3])


# -- JSON ------------------------------------------------------------------------------------------------------------

LARGE = {"type": "integer", "minimum": 25}


def test_an_answer_that_does_not_fit_the_schema_is_drawn_again(folder, tokenizer):
    where = folder("llama", "causal-lm")
    tokenizer(first="").save_pretrained(where)  # the words are numbers
    t = TransformersText(TextOptions(model=where, retries=40))
    sampling = Sampling(max_tokens=1, n=4, json_schema=LARGE)
    answers = t.generate(["3", "4"], sampling, [1, 2])
    assert all(int(answer.text) >= 25 for group in answers for answer in group)
    assert t.generate(["4"], sampling, [2]) == answers[1:]


def test_a_prompt_without_an_answer_that_fits_is_named(teacher):
    with pytest.raises(RunFailed, match="to prompt 0 fits json_schema in 2 attempts"):
        teacher(retries=1).generate(PROMPTS, Sampling(max_tokens=3, json_schema=LARGE), [1, 2, 3])


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [("vit", "image-classification", "type 'vit' writes no text"), ("bert", "masked-lm", "type 'bert' writes no text"),
     ("llama", "encoder", "no fitting weights for 'lm_head.weight'")],
)  # fmt: skip
def test_a_model_that_writes_no_text_is_refused(teacher, name, head, words):
    with pytest.raises(ModelError, match=words):
        teacher(name, head)


def test_a_model_without_a_tokenizer_is_refused(folder):
    with pytest.raises(ModelError, match="there is no tokenizer"):
        TransformersText(TextOptions(model=folder("llama", "causal-lm")))


def test_an_encoder_decoder_that_does_not_say_how_answers_begin_is_refused(teacher):
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        teacher("t5", "seq2seq", config={"decoder_start_token_id": None, "bos_token_id": None})


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"checkpoint: there is no folder 'nowhere'"):
        TransformersText(TextOptions(checkpoint="nowhere"))
    with pytest.raises(ValidationError, match="give `model`"):
        TextOptions()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("word3 " * 30, r"prompt 1 has 30 tokens; with max_tokens=8 that is more than the 32"),
     ([{"role": "user", "content": "word3"}], "prompt 1 is a chat, and the tokenizer .* has no chat template")],
)  # fmt: skip
def test_prompts_that_the_model_cannot_take_are_named(teacher, prompt, words):
    with pytest.raises(DataError, match=words):
        teacher("gpt2").generate(["word3", prompt], Sampling(max_tokens=8), [1, 2])


def test_a_prompt_without_tokens_begins_at_the_beginning_or_is_named(teacher):
    t = teacher("gpt2")
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        t.generate([""], Sampling(max_tokens=2), [1])
    t.tokenizer.bos_token = "word3"
    assert t.generate([""], Sampling(max_tokens=4), [1])[0][0].tokens is not None


def test_downloads_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_transformers.options._hub_size", lambda *args: 7)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert TextOptions(model="o/m").downloads() == [Download("o/m", "Hugging Face Hub", 7)]
    assert TextOptions(model=str(tmp_path)).downloads() == TextOptions(checkpoint="x").downloads() == []


# -- in a run --------------------------------------------------------------------------------------------------------


class Corpus(Method):
    roles = Roles(students=())

    def stages(self, run):
        rows = [{"number": i} for i in range(3, 13)]
        corpus = yield GenerateStage("corpus", run.text_teacher(), rows, "word{{ number }}",
                                     Sampling(max_tokens=5, n=2, logprobs=True), shard_size=4)  # fmt: skip
        run.add_metric("rows", len(corpus))


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self):
        return [Component("method", "corpus", Corpus)]

    @kdcore.hookimpl
    def kd_register_data(self):
        data = kdcore.DataModule({"train": [{"series": torch.zeros(2)}]}, kdcore.Task("unlabelled"))
        return [Component("data", "nothing", lambda options: data)]


def test_it_writes_a_corpus(folder, tmp_path):
    model = folder("llama", "causal-lm", tokenizer=True)

    def corpus(name, seed):
        manager = kdcore.PluginManager()
        manager.register(Plugin(), name="corpus")
        recipe = {"method": "corpus", "teacher": {"use": "transformers-text", "model": model}, "data": "nothing",
                  "trackers": [], "seed": seed}  # fmt: skip
        kdcore.run(recipe, run_dir=tmp_path / name, plugins=manager)
        return load_from_disk(str(tmp_path / name / "stages/01-corpus/artifact/data")).to_list()

    found = corpus("a", 0)
    assert len(found) >= 15  # answers that are empty are dropped
    assert all(row["logprob"] < 0 and row["teacher"] == model for row in found)
    assert corpus("b", 0) == found
    assert [row["answer"] for row in corpus("c", 1)] != [row["answer"] for row in found]
