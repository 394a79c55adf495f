"""What is asked, what is answered, what is kept."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import APIStatusError

from kd_openai import wire
from kd_openai.cache import AnswerCache, Entry, Ledger, cache_folder
from kd_openai.failures import retry_after
from kd_openai.options import OpenAIOptions
from kdcore.options import Sampling
from kdcore.text import Answer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_a_text_is_a_message_of_the_user_in_a_chat_and_gone_on_with_in_a_completion(serve, ask):
    server = serve()
    assert ask(server).generate(["Hi", CHAT], Sampling(), [1, 2]) == [
        [Answer("<Hi> by 1", "stop", None, 3)],
        [Answer("<Hello> by 2", "stop", None, 3)],
    ]
    assert ask(server, mode="completion").generate(["Once"], Sampling(), [3])[0][0].text == "<Once> by 3"
    bodies = {wire_prompt(body): body for body in server.asked}
    assert bodies["Hi"]["messages"] == [{"role": "user", "content": "Hi"}]
    assert bodies["Hello"]["messages"] == CHAT
    assert bodies["Once"]["prompt"] == "Once"
    assert "messages" not in bodies["Once"]


def wire_prompt(body):
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def test_every_sampling_option_reaches_the_server(serve, ask):
    server = serve(answer=lambda prompt, seed: '{"a": 1}')
    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, n=3, stop=("\n", "##"), presence_penalty=0.1,
                        frequency_penalty=0.2, logprobs=True, json_schema={"type": "object"})  # fmt: skip
    teacher = ask(server, extra={"top_k": 20})
    (answers,) = teacher.generate(["Hi"], sampling, [2**40 + 5])
    (body,) = server.asked
    body.pop("messages")
    assert body == {
        "model": "tiny", "seed": 5, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "n": 3, "stop": ["\n", "##"],
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "logprobs": True, "top_k": 20,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
    }  # fmt: skip
    assert answers == [Answer('{"a": 1}', "stop", -1.0, 2)] * 3


def test_openais_own_models_are_sent_nothing_at_its_default():
    hosted = wire.request(OpenAIOptions(model="m"), "Hi", Sampling(), 1, 0)
    assert hosted.keys() == {"model", "seed", "messages", "max_completion_tokens", "extra_body"}
    local = wire.request(OpenAIOptions(model="m", base_url="http://x/v1"), "Hi", Sampling(), 1, 0)
    named = OpenAIOptions(model="m", base_url="http://x/v1", extra={"max_completion_tokens": 9})
    assert "max_tokens" not in wire.request(named, "Hi", Sampling(), 1, 0)
    assert local.keys() == {"model", "seed", "messages", "max_tokens", "temperature", "top_p", "extra_body"}


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_log_probabilities_are_summed_over_the_tokens(serve, ask, mode):
    (answers,) = ask(serve(), mode=mode).generate(["one two"], Sampling(logprobs=True, n=2), [0])
    assert answers == [Answer("<one two> by 0", "stop", -2.0, 4), Answer("<one two> by 1", "stop", -2.0, 4)]


def test_a_server_that_ignores_n_is_asked_again_with_other_seeds(serve, ask):
    server = serve(ignores_n=True)
    (answers,) = ask(server).generate(["Hi"], Sampling(n=4), [7])
    assert [body.get("n", 1) for body in server.asked] == [4, 3, 2, 1]
    assert len({answer.text for answer in answers}) == 4
    assert server.asked[0]["seed"] == 7


def test_answers_depend_on_the_prompt_and_its_seed_alone(serve, ask, tmp_path):
    server = serve(ignores_n=True)
    together = ask(server, cache=str(tmp_path / "a")).generate(["x", "y", "z"], Sampling(n=3), [1, 2, 3])
    alone = ask(server, cache=str(tmp_path / "b")).generate(["y"], Sampling(n=3), [2])
    assert alone[0] == together[1]


def test_nothing_is_asked_twice_not_even_within_a_call_or_after_a_restart(serve, ask):
    server = serve()
    teacher = ask(server)
    first = teacher.generate(["a", "b", "a", "a"], Sampling(), [1, 1, 1, 2])
    assert first[0] == first[2] != first[3]
    assert sorted(server.answered) == ["a", "a", "b"]
    assert ask(server).generate(["a", "b", "a", "a"], Sampling(), [1, 1, 1, 2]) == first
    assert len(server.asked) == 3
    assert ask(server).generate([], Sampling(), []) == []


@pytest.mark.parametrize(
    ("options", "sampling", "seed"),
    [({"mode": "completion"}, {}, 1), ({"extra": {"k": 1}}, {}, 1), ({"model": "small"}, {}, 1),
     ({}, {"top_p": 0.5}, 1), ({}, {"logprobs": True}, 1), ({}, {}, 2)],
)  # fmt: skip
def test_whatever_an_answer_depends_on_is_asked_anew(serve, ask, options, sampling, seed):
    server = serve()
    ask(server).generate(["a"], Sampling(), [1])
    ask(server, **options).generate(["a"], Sampling(**sampling), [seed])
    assert len(server.asked) == 2


def test_a_damaged_answer_is_named_and_asked_again(serve, ask, caplog):
    server = serve()
    teacher = ask(server)
    first = teacher.generate(["a", "b", "c", "d"], Sampling(), [1] * 4)
    files = sorted(teacher.cache.folder.glob("*/*.json"))
    assert len(files) == 4
    files[0].write_text(files[0].read_text()[:30])
    files[1].write_text(files[1].read_text().replace("by 1", "by 2"))
    files[2].write_text(files[3].read_text())  # a whole one, of another prompt
    with caplog.at_level(logging.WARNING):
        assert ask(server).generate(["a", "b", "c", "d"], Sampling(), [1] * 4) == first
    assert all(str(file) in caplog.text for file in files[:3])
    assert str(files[3]) not in caplog.text
    assert len(server.asked) == 7


def test_it_works_where_an_event_loop_runs_as_in_a_notebook(serve, ask):
    async def cell() -> list[list[Answer]]:
        return ask(serve()).generate(["Hi"], Sampling(), [1])

    assert asyncio.run(cell())[0][0].text == "<Hi> by 1"


def test_several_threads_may_ask_at_once(serve, ask):
    teacher, found = ask(serve()), {}

    def part(i: int) -> None:
        found[i] = teacher.generate([f"p{i}"], Sampling(), [i])[0][0].text

    threads = [threading.Thread(target=part, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"<p{i}> by {i}" for i in range(3)}


def test_no_more_requests_are_under_way_than_allowed(serve, ask):
    server = serve(pace=0.02)
    ask(server, concurrency=4).generate([f"p{i}" for i in range(40)], Sampling(), range(40))
    assert server.busiest == 4


def test_requests_keep_to_their_rate_over_calls(serve, ask):
    teacher = ask(serve(), requests_per_minute=1200)  # one in 0.05 s
    start = time.monotonic()
    for call in range(3):
        teacher.generate([f"{call}-{i}" for i in range(5)], Sampling(), range(5))
    assert time.monotonic() - start >= 14 * 0.05 - 0.01


def test_tokens_keep_to_their_rate(serve, ask):
    teacher = ask(serve(), tokens_per_minute=6000)  # 100 in a second
    start = time.monotonic()
    teacher.generate([f"p{i}" for i in range(5)], Sampling(max_tokens=49), range(5))  # 50 with the prompt
    assert 1.4 <= time.monotonic() - start < 4


def test_processes_share_the_limits(serve, ask, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    teacher = ask(serve(), requests_per_minute=1200)  # this process: one in 0.1 s
    start = time.monotonic()
    teacher.generate([f"p{i}" for i in range(6)], Sampling(), range(6))
    assert time.monotonic() - start >= 0.49


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4),
    logprob=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    draws=st.integers(0, 9),
)
def test_what_the_cache_keeps_comes_back(tmp_path, texts, logprob, draws):
    cache, request = AnswerCache(tmp_path), {"prompt": texts, "seed": draws}
    entry = Entry([Answer(text, "stop", logprob, len(text)) for text in texts], draws)
    cache.write(request, entry)
    assert cache.read(request) == entry
    assert cache.read({**request, "seed": -1}) == Entry()


def test_the_journal_of_costs_survives_a_line_that_was_cut_off_and_other_writers(tmp_path, caplog):
    path = tmp_path / "spent.jsonl"
    ours, theirs = Ledger(path), Ledger(path)
    ours.add(10, 1)
    with open(path, "ab") as file:
        file.write(b'\n{"input": 5, "out')
    theirs.add(20, 2)
    assert (ours.spent.requests, ours.spent.input, ours.spent.output) == (2, 30, 3)
    theirs.add(1, 1)
    assert ours.spent.tokens == 35
    assert theirs.spent == ours.spent == Ledger(path).spent
    assert str(path) in caplog.text


@given(st.text(), st.sampled_from(["chat", "completion"]))
def test_any_body_is_read_or_refused(body, mode):
    with pytest.raises(wire.MalformedReplyError):
        wire.read_reply(mode, body)


def test_replies_are_read_as_servers_vary_them():
    bare = {"choices": [{"message": {"content": None, "refusal": "no"}}, {"message": {"content": "b"}}]}
    assert wire.read_reply("chat", json.dumps(bare)) == wire.Reply([Answer("", "content_filter"), Answer("b")], None)
    odd = {"choices": [{"text": "a", "finish_reason": "eos", "logprobs": {"token_logprobs": [None, -1]}}]}
    for usage in ({"prompt_tokens": 3}, {"completion_tokens": 3}, {}, {"prompt_tokens": None}):  # half is not counted
        found = wire.read_reply("completion", json.dumps({**odd, "usage": usage}))
        assert found == wire.Reply([Answer("a", "eos", None, usage.get("completion_tokens"))], None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "3"}, 3), ({"retry-after-ms": "20"}, 0.02), ({"retry-after-ms": "x", "retry-after": "4"}, 4),
     ({}, None), ({"retry-after": "soon"}, None), ({"retry-after": "0"}, None), ({"retry-after": "inf"}, None),
     ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None)],
)  # fmt: skip
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert retry_after(busy(headers)) == seconds


def test_a_server_may_name_the_time_to_come_back():
    assert 90 < retry_after(busy({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)})) <= 100


def busy(headers):
    return APIStatusError("busy", response=SimpleNamespace(status_code=429, headers=headers, request=None), body=None)


def test_the_cache_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(OpenAIOptions(model="tiny", cache="~/answers")).parent == tmp_path / "answers"
