"""Servers that fail, answers that cannot be used, budgets that end, keys that are missing, and what is said of it."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest

import kdcore
from kd_openai.failures import LONGEST_WAIT
from kdcore import PluginManager
from kdcore.errors import DataError, ModelError, RecipeError, RunFailed
from kdcore.options import Sampling
from kdcore.recipe import resolve

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
FAULTS = ("busy", "broken", "away", "timeout", "cut", "drop", "malformed", "html", "shape", "empty")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_tried_again(serve, ask, quick, fault):
    server = serve(fault=lambda number, body: fault if number in (0, 1, 3) else "ok")
    answers = ask(server).generate(["a", "b"], Sampling(), [1, 2])
    assert [bool(group[0].text) for group in answers] == [True, True]
    assert len(server.asked) == 5
    assert server.answered == ["a", "b"]


def test_a_request_that_takes_too_long_is_given_up_and_tried_again(serve, ask, quick):
    server = serve(fault=lambda number, body: "ok" if number % 2 else "hang")
    start = time.monotonic()
    assert ask(server, timeout=0.3).generate(["a"], Sampling(), [1])[0][0].text == "<a> by 1"
    assert time.monotonic() - start < 2


def test_the_server_says_how_long_to_wait(serve, ask):
    server = serve(fault=lambda number, body: "busy" if number < 6 else "ok")  # retry-after: 0.05
    start = time.monotonic()
    ask(server).generate(["a"], Sampling(), [1])
    assert 6 * 0.05 <= time.monotonic() - start < 15  # of its own accord, more than half a minute


def test_a_wait_that_is_too_long_stops_the_run(serve, ask):
    with pytest.raises(RunFailed, match="status 429: later now"):
        ask(serve(fault=lambda number, body: "later")).generate(["a"], Sampling(), [1])
    assert LONGEST_WAIT < 86400


def test_after_the_last_retry_the_prompt_is_named_and_what_is_answered_is_kept(serve, ask, quick):
    server = serve(fault=lambda number, body: "broken" if body["messages"][0]["content"] == "p3" else "ok")
    prompts = [f"p{i}" for i in range(6)]
    teacher = ask(server, retries=2, concurrency=2)
    with pytest.raises(RunFailed, match=r"prompt 3 \('p3'\) got no answer .* status 500: broken now") as caught:
        teacher.generate(prompts, Sampling(), range(6))
    assert "5 of the 6 prompts" in str(caught.value)
    assert str(teacher.cache.folder) in str(caught.value)
    assert len(server.asked) == 5 + 3
    server.fault = lambda number, body: "ok"
    ask(server).generate(prompts, Sampling(), range(6))
    assert sorted(server.answered) == prompts


@pytest.mark.parametrize("fault", ["400: the prompt is too long", "quota"])
def test_what_cannot_succeed_is_not_tried_again(serve, ask, fault):
    server = serve(fault=lambda number, body: fault if number else "ok")
    with pytest.raises(RunFailed, match=r"prompt 1 .*(too long|no money left)"):
        ask(server, concurrency=1).generate(["a", "b", "c"], Sampling(), [1, 2, 3])
    assert len(server.asked) == 2


def test_nothing_further_is_asked_after_a_failure(serve, ask):
    server = serve(fault=lambda number, body: "400" if number == 5 else "ok", pace=0.01)
    with pytest.raises(RunFailed):
        ask(server, concurrency=3).generate([f"p{i}" for i in range(50)], Sampling(), range(50))
    assert len(server.asked) <= 9


# -- answers that cannot be used -------------------------------------------------------------------------------------


def test_an_empty_answer_is_asked_again_with_another_seed(serve, ask):
    server = serve(fault=lambda number, body: "empty" if number < 2 else "ok")
    ask(server).generate(["a"], Sampling(), [1])
    assert len({body["seed"] for body in server.asked}) == 3


def test_a_prompt_that_has_only_empty_answers_does_not_stop_the_others(serve, ask, caplog):
    server = serve(answer=lambda prompt, seed: "" if prompt == "mute" else "x")
    answers = ask(server, retries=2).generate(["mute", "b"], Sampling(n=2), [1, 2])
    assert [[a.text for a in group] for group in answers] == [["", ""], ["x", "x"]]
    assert "prompt 0 ('mute')" in caplog.text
    asked = len(server.asked)
    ask(server, retries=2).generate(["mute"], Sampling(n=2), [1])
    assert len(server.asked) == asked == 2 * 3 + 1


def test_an_answer_that_the_server_withheld_is_its_last_word(serve, ask, monkeypatch):
    server = serve()
    reply = server.reply
    monkeypatch.setattr(server, "reply", lambda body, fault: _withheld(reply(body, "empty")))
    (answers,) = ask(server).generate(["a"], Sampling(json_schema=SCHEMA), [1])
    assert [(a.text, a.finish) for a in answers] == [("", "content_filter")]
    assert len(server.asked) == 1


def _withheld(reply):
    reply["choices"][0]["finish_reason"] = "content_filter"
    return reply


def test_answers_have_to_fit_the_schema(serve, ask):
    wanted = iter(['{"age": "ten"}', "ten", '{"age": 1', '{"age": 10}'])
    server = serve(answer=lambda prompt, seed: next(wanted))
    (answers,) = ask(server).generate(["a"], Sampling(json_schema=SCHEMA), [1])
    assert [answer.text for answer in answers] == ['{"age": 10}']
    assert len({body["seed"] for body in server.asked}) == 4


def test_of_several_answers_those_that_fit_are_kept(serve, ask):
    server = serve(answer=lambda prompt, seed: f'{{"age": {seed}}}' if seed % 2 else "none")
    (answers,) = ask(server, retries=9).generate(["a"], Sampling(n=4, json_schema=SCHEMA), [1])
    assert len(answers) == 4
    assert all(answer.text.startswith('{"age"') for answer in answers)


def test_a_prompt_whose_answers_never_fit_is_named(serve, ask):
    with pytest.raises(RunFailed, match=r"prompt 0 \('how old'\).*\$.age: 'ten' is not of type 'integer'"):
        ask(serve(answer=lambda prompt, seed: '{"age": "ten"}'), retries=1).generate(
            ["how old"], Sampling(json_schema=SCHEMA), [1]
        )


def test_a_schema_that_leads_nowhere_is_refused(serve, ask):
    sampling = Sampling(json_schema={"$ref": "#/$defs/nowhere"})
    with pytest.raises(RecipeError, match="json_schema"):
        ask(serve(answer=lambda prompt, seed: "{}")).generate(["a"], sampling, [1])


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_the_run_stops_when_the_tokens_are_spent_and_goes_on_with_a_larger_budget(serve, ask):
    server = serve(pace=0.005)  # four tokens for each prompt and answer
    prompts = [f"p{i}" for i in range(30)]
    with pytest.raises(RunFailed, match=r"budget of tiny is spent: 40 of 40 tokens, in 10 requests. 10 of the 30"):
        ask(server, budget={"tokens": 40}, concurrency=4).generate(prompts, Sampling(), range(30))
    with pytest.raises(RunFailed, match="40 of 40 tokens"):
        ask(server, budget={"tokens": 40}).generate(prompts, Sampling(), range(30))
    assert len(server.asked) == 10
    found = ask(server, budget={"tokens": 1000}).generate(prompts, Sampling(), range(30))
    assert [group[0].text for group in found] == [f"<p{i}> by {i}" for i in range(30)]
    assert sorted(server.answered) == sorted(prompts)


def test_what_is_answered_already_costs_nothing_of_the_budget(serve, ask):
    server = serve()
    ask(server).generate(["a", "b"], Sampling(), [1, 2])
    assert ask(server).spent.tokens == 8
    assert ask(server, budget={"tokens": 1}).generate(["b"], Sampling(), [2])[0][0].text == "<b> by 2"


def test_money_is_counted_by_the_prices(serve, ask):
    server = serve()  # one token in, three out
    teacher = ask(server, prices={"input": 1e6, "output": 2e6}, budget={"money": 20.0}, concurrency=1)
    with pytest.raises(RunFailed, match="21 of 20 in money, in 3 requests"):
        teacher.generate([f"p{i}" for i in range(9)], Sampling(), range(9))
    assert teacher.spent.money(teacher.options.prices) == 21


def test_a_server_that_does_not_count_tokens_is_estimated(serve, ask):
    teacher = ask(serve(counts=False), budget={"tokens": 30}, concurrency=1)
    with pytest.raises(RunFailed, match="budget"):
        teacher.generate(["four token prompt"] * 9, Sampling(), range(9))
    assert 30 <= teacher.spent.tokens <= 45


def test_answers_that_cannot_be_used_are_paid_for_too(serve, ask):
    teacher = ask(serve(answer=lambda prompt, seed: "no json"), budget={"tokens": 12})  # three tokens each
    with pytest.raises(RunFailed, match="12 of 12 tokens, in 4 requests"):
        teacher.generate(["a"], Sampling(json_schema=SCHEMA), [1])


# -- wrong input -----------------------------------------------------------------------------------------------------


def refused(**options):
    recipe = {"method": "distill", "teacher": {"use": "openai", "model": "tiny", **options}, "student": "demo-cnn",
              "data": "digits", "losses": ["cross-entropy"]}  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, PluginManager())
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"tokens": 0}}, "teachers.teacher.budget.tokens: Input should be greater than 0 (got 0)"),
        ({"budget": {"money": 0}, "prices": {"input": 1, "output": 1}}, "budget.money: Input should be greater than 0"),
        ({"budget": {}}, "give `tokens` or `money`"),
        ({"budget": {"money": 1}}, "budget.money: money is counted by `prices"),
        ({"prices": {"input": 1}}, "prices.output: required"),
        ({"base_url": "localhost:8000"}, "base_url: give the server's address, such as http://"),
        ({"model": ""}, "teachers.teacher.model"),
        ({"mode": "complete"}, "'chat' or 'completion'"),
        ({"concurrency": 0}, "concurrency: Input should be greater than 0"),
        ({"extra": {"seed": 1}}, "extra.seed: this comes from the recipe"),
        ({"api_key": "x"}, "api_key: unknown key"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options, words):
    assert words in refused(**options)


@pytest.mark.parametrize("key", ["sk-secret-1", "hf_SecretKey", "gsk_secret1"])
def test_a_key_in_the_recipe_is_refused_without_being_shown(key):
    for options in ({"key_env": key}, {"base_url": f"https://me:{key}@host/v1"}, {"base_url": f"http://host?k={key}"}):
        message = refused(**options)
        assert key not in message
        assert "environment variable" in message
    assert key not in refused(api_key=key)


def test_a_missing_key_is_named(ask, monkeypatch):
    monkeypatch.delenv("KD_TEST_KEY", raising=False)
    with pytest.raises(ModelError, match="KD_TEST_KEY, which `key_env` names, holds no key"):
        ask("http://127.0.0.1:9/v1", key_env="KD_TEST_KEY").generate(["a"], Sampling(), [1])


def test_what_the_cache_holds_needs_no_key_no_server_and_no_folder_to_write(serve, ask, monkeypatch):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(key="sk-secret-1")
    first = ask(server, key_env="KD_TEST_KEY").generate(["a", "b"], Sampling(), [1, 2])
    address = server.url
    server.close()
    monkeypatch.delenv("KD_TEST_KEY")
    monkeypatch.setattr("kd_openai.cache.os.open", refuse_to_write)
    assert ask(address, key_env="KD_TEST_KEY").generate(["a", "b"], Sampling(), [1, 2]) == first
    with pytest.raises(ModelError, match="holds no key"):
        ask(address, key_env="KD_TEST_KEY").generate(["a", "c"], Sampling(), [1, 3])


def refuse_to_write(*args):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("key", ["sk-se\ncret", "two words", "schlüssel"])
def test_a_key_that_cannot_be_one_is_not_shown(ask, monkeypatch, key):
    monkeypatch.setenv("KD_TEST_KEY", key)
    with pytest.raises(ModelError, match="KD_TEST_KEY") as caught:
        ask("http://127.0.0.1:9/v1", key_env="KD_TEST_KEY").generate(["a"], Sampling(), [1])
    assert key not in str(caught.value)


def test_the_key_is_sent_and_written_nowhere(serve, ask, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(key="sk-secret-1")
    with caplog.at_level(logging.DEBUG):
        ask(server, key_env="KD_TEST_KEY").generate(["a"], Sampling(), [1])
        server.key = "another"
        with pytest.raises(
            ModelError, match=r"refuses the key in KD_TEST_KEY: status 401: wrong key: Bearer \*\*\*"
        ) as e:
            ask(server, key_env="KD_TEST_KEY").generate(["b"], Sampling(), [1])
    assert e.value.__cause__ is None
    assert "sk-secret-1" not in caplog.text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) >= 2
    assert not any(b"sk-secret-1" in path.read_bytes() for path in kept)


@pytest.mark.parametrize("before", range(280, 300))
def test_no_part_of_a_key_is_left_where_a_long_message_is_cut(serve, ask, monkeypatch, before):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(fault=lambda number, body: "400 " + "x" * before + "sk-secret-1" + "y" * 300)
    with pytest.raises(ModelError) as caught:
        ask(server, key_env="KD_TEST_KEY").generate(["a"], Sampling(), [1])
    assert "x" * 200 in str(caught.value)
    assert "sk" not in str(caught.value)


def test_a_key_that_the_server_answers_with_is_not_kept_and_a_placeholder_is_no_key(serve, ask, monkeypatch, quick):
    monkeypatch.setenv("KD_TEST_KEY", "sk-secret-1")
    server = serve(answer=lambda prompt, seed: "EMPTY sk-secret-1")
    assert ask(server, key_env="KD_TEST_KEY").generate(["a"], Sampling(), [1])[0][0].text == "EMPTY ***"
    monkeypatch.setenv("KD_TEST_KEY", "EMPTY")
    assert ask(server, key_env="KD_TEST_KEY").generate(["b"], Sampling(), [1])[0][0].text == "EMPTY sk-secret-1"


def test_a_server_that_needs_no_key_is_sent_none(serve, ask, monkeypatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, "sk-secret-1")
    server = serve()
    ask(server).generate(["a"], Sampling(), [1])
    assert "sk-secret-1" not in str(server.headers)


@pytest.mark.parametrize("status", [404, 400, 500])
def test_a_model_that_the_server_does_not_know_is_told_at_once(serve, ask, quick, status):
    server = serve(unknown=status)
    with pytest.raises(ModelError, match="does not know the model 'smal'; did you mean 'small'") as caught:
        ask(server, model="smal", retries=1).generate([f"p{i}" for i in range(20)], Sampling(), range(20))
    assert f"status {status}: there is no such model" in str(caught.value)
    assert len(server.asked) == (2 if status == 500 else 1)


def test_an_address_without_the_end_is_told(serve, ask):
    server = serve(models=())
    with pytest.raises(ModelError, match="does `base_url` end in /v1"):
        ask(server).generate(["a"], Sampling(), [1])


def test_a_server_that_is_not_there(ask, free_port):
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=rf"no server of this kind answers at http://127.0.0.1:{free_port}/v1 \(the connection"
    ):
        ask(f"http://127.0.0.1:{free_port}/v1").generate([f"p{i}" for i in range(9)], Sampling(), range(9))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("prompt", "mode", "words"),
    [("  ", "chat", "prompt 1 is empty"), ("\ud800", "chat", "prompt 1 is not valid Unicode"),
     ([{"role": "user", "content": "x"}], "completion", "prompt 1 is a chat"),
     ([{"role": "user"}], "chat", "prompt 1: a chat is a list of"), ([], "chat", "prompt 1 is empty")],
)  # fmt: skip
def test_prompts_that_cannot_be_sent_are_named(ask, prompt, mode, words):
    with pytest.raises(DataError, match=words):
        ask("http://127.0.0.1:9/v1", mode=mode).generate(["fine", prompt], Sampling(), [1, 2])


def test_a_cache_that_cannot_be_written_is_named(ask, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cache: the folder .*file"):
        ask("http://127.0.0.1:9/v1", cache=str(tmp_path / "file"))


def test_a_cache_that_may_only_be_read_is_told_before_anything_is_paid(serve, ask, monkeypatch):
    server = serve()
    monkeypatch.setattr("kd_openai.cache.os.open", refuse_to_write)
    with pytest.raises(ModelError, match=r"cache: the folder .* cannot be written: Permission denied; name another"):
        ask(server).generate(["a"], Sampling(), [1])
    assert not server.asked


def test_a_full_disk_is_told(serve, ask, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kd_openai.cache.write_text", refuse)
    with pytest.raises(RunFailed, match=r"cannot be kept in .*: No space left"):
        ask(serve()).generate(["a"], Sampling(), [1])


def test_a_web_page_is_no_server(serve, ask, quick):
    with pytest.raises(ModelError, match=r"no server of this kind .*back soon.*ends in /v1"):
        ask(serve(fault=lambda number, body: "html"), retries=1).generate(["a"], Sampling(), [1])


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(serve, ask):
    def interrupt(number, body):
        if number == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return "delay"

    server = serve(fault=interrupt)
    teacher, prompts = ask(server, concurrency=4), [f"p{i}" for i in range(40)]
    with pytest.raises(KeyboardInterrupt):
        teacher.generate(prompts, Sampling(), range(40))
    asked = len(server.asked)
    assert 11 <= asked < 20
    assert len(list(teacher.cache.folder.glob("*/*.json"))) == len(server.answered) == asked
    found = teacher.generate(prompts, Sampling(), range(40))
    assert [group[0].text for group in found] == [f"<p{i}> by {i}" for i in range(40)]
    assert sorted(server.answered) == sorted(prompts)


def test_a_failure_does_not_wait_for_the_limits(serve, ask):
    server = serve(fault=lambda number, body: "400" if number == 1 else "ok")
    teacher = ask(server, requests_per_minute=60)
    start = time.monotonic()
    with pytest.raises(RunFailed):
        teacher.generate([f"p{i}" for i in range(20)], Sampling(), range(20))
    assert time.monotonic() - start < 6  # the second request comes after a second, the ninth after eight
    assert teacher.generate(["p5"], Sampling(), [5])[0][0].text == "<p5> by 5"


def test_dry_run_downloads_nothing_and_needs_neither_server_nor_key(monkeypatch, free_port):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recipe = {"method": "distill", "teacher": {"use": "openai", "model": "m", "base_url": f"http://127.0.0.1:{free_port}"},
              "student": "demo-cnn", "data": "digits", "losses": ["cross-entropy"]}  # fmt: skip
    assert kdcore.plan(recipe).downloads == {}
