"""Distributions from a server: those of the model behind it, whatever the batch; cached; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kdcore
from kd_demo.text import sentences
from kd_openai.options import LogprobsOptions
from kd_openai.scoring import read_scores, served
from kd_openai.wire import MalformedReplyError
from kdcore.data import IGNORE, Task
from kdcore.errors import ModelError, RunFailed

K = 8
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0,
         "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> kdcore.DataModule:
    from kd_demo.options import SentencesOptions

    return sentences(SentencesOptions(prompt=2, train=24, val=8))


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Any:
    """The model behind the server."""
    from kd_transformers.build import build
    from kd_transformers.options import TransformersOptions

    torch.manual_seed(0)
    return build(TransformersOptions(config=LLAMA), data.task).freeze()


@pytest.fixture
def vllm(serve, model, monkeypatch):
    """A server that scores prompts as vLLM does: the k likeliest tokens, and the prompt's own."""
    server = serve()

    def reply(body: dict[str, Any], fault: str) -> dict[str, Any]:
        assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
        ids = body["prompt"]
        with torch.no_grad():
            scores = model({"input_ids": torch.tensor([ids])}).logits[0].log_softmax(-1)
        places: list[Any] = [None]
        for row, actual in zip(scores, ids[1:], strict=False):
            named = {*row.topk(body["prompt_logprobs"]).indices.tolist(), actual}
            places.append({str(i): {"logprob": row[i].item(), "rank": 1, "decoded_token": "x"} for i in sorted(named)})
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return {"choices": [{"text": "x", "prompt_logprobs": places}], "usage": usage}

    monkeypatch.setattr(server, "reply", reply)
    return server


def options(server: Any, folder: Path, **more: Any) -> LogprobsOptions:
    given = {"model": "tiny", "base_url": server.url, "key_env": None, "cache": str(folder), "k": K, **more}
    return LogprobsOptions.model_validate(given)


def test_distributions_are_those_of_the_model_behind_it(vllm, model, data, tmp_path):
    teacher = served(options(vllm, tmp_path), data.task)
    batch = data.sample("train", 5)
    with torch.no_grad():
        ours, theirs = teacher(batch).logits.exp(), model(batch).logits.softmax(-1)
    kept = batch["attention_mask"].bool()
    assert not kept.all()
    found, wanted = ours[kept], theirs[kept]
    top = wanted.topk(K)
    torch.testing.assert_close(found.gather(1, top.indices), top.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)), rtol=1e-4, atol=0)
    rest = found.scatter(1, top.indices, 0.0)
    assert (rest.amax(1) - rest.masked_fill(rest == 0, 1).amin(1)).max() < 1e-6  # spread evenly
    torch.testing.assert_close(ours[~kept], torch.full_like(ours[~kept], 1 / ours.shape[-1]))


def test_a_run_learns_from_it_as_from_a_cache_of_the_model(vllm, model, tmp_path):
    recipe = {
        "method": "distill", "losses": [{"use": "fkl"}], "trackers": [],
        "data": {"use": "sentences", "prompt": 2, "train": 24, "val": 8}, "eval": {"metrics": ["perplexity"]},
        "student": {"use": "transformers", "config": LLAMA},
        "train": {"steps": 4, "batch_size": 8, "log_every": 1},
    }  # fmt: skip
    own = options(vllm, tmp_path / "answers").model_dump()
    named = {key: own[key] for key in ("model", "base_url", "key_env", "k", "cache")}
    live = kdcore.run({**recipe, "teacher": {"use": "openai-logprobs", **named}}, run_dir=tmp_path / "live")
    model.save(tmp_path / "model")
    top = {"logits": "top-k", "k": K, "dtype": "float32", "folder": str(tmp_path / "caches"), "splits": ["train"]}
    cached = {**recipe, "teacher": {"use": "transformers", "checkpoint": str(tmp_path / "model"), "cache": top}}
    held = kdcore.run(cached, run_dir=tmp_path / "held")

    def terms(result: kdcore.Result) -> list[float]:
        rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
        return [row["terms"]["fkl"] for row in rows if "terms" in row]

    assert len(terms(live)) == 4
    assert terms(live) == pytest.approx(terms(held), rel=1e-3)


def test_its_distributions_can_be_cached(vllm, tmp_path):
    own = options(vllm, tmp_path / "answers").model_dump()
    recipe = {
        "method": "distill", "losses": [{"use": "fkl"}],
        "data": {"use": "sentences", "prompt": 2, "train": 24, "val": 8},
        "teacher": {"use": "openai-logprobs", **{k: own[k] for k in ("model", "base_url", "key_env", "k")}},
        "student": {"use": "transformers", "config": LLAMA},
    }  # fmt: skip
    filled = kdcore.fill_cache(recipe, options={"logits": "top-k", "k": K, "folder": str(tmp_path / "caches")})
    asked = len(vllm.asked)
    assert asked >= 24
    recipe["teacher"]["cache"] = {"filled": str(filled["teacher"])}
    recipe |= {"train": {"steps": 3, "batch_size": 8}, "trackers": [], "eval": {"metrics": ["perplexity"]}}
    kdcore.run(recipe, run_dir=tmp_path / "run")
    assert len(vllm.asked) == asked


def test_failures_are_asked_again_and_told(vllm, data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(vllm, "fault", lambda number, body: "broken" if number == 1 else "ok")
    teacher = served(options(vllm, tmp_path, retries=2), data.task)
    assert teacher(data.sample("train", 3)).codes.shape[0] == 3
    assert len(vllm.asked) == 4
    monkeypatch.setattr(vllm, "reply", lambda body, fault: {"choices": [{"text": "x"}]})
    with pytest.raises(RunFailed, match=r"of \d+ tokens.*prompt_logprobs.*is it vLLM\?.*`kd cache` keeps"):
        teacher(data.sample("train", 2))
    with pytest.raises(ModelError, match="no server of this kind"):
        served(options(vllm, tmp_path, retries=1), data.task)(data.sample("train", 2))


def test_what_does_not_fit_is_told(vllm, data, tmp_path):
    with pytest.raises(ModelError, match="task of kind 'classification'"):
        served(options(vllm, tmp_path), Task("classification", num_classes=3))
    with pytest.raises(ModelError, match="ask for fewer"):
        served(options(vllm, tmp_path, k=500), data.task)
    small = served(options(vllm, tmp_path, size=K + 1), data.task)
    with pytest.raises(ModelError, match=r"names the token .* another tokenizer"):
        small(data.sample("train", 2))


@pytest.mark.parametrize("reply", [
    {"choices": []}, {"choices": [{"prompt_logprobs": None}]}, {"choices": [{"prompt_logprobs": [None, {}]}]},
    {"choices": [{"prompt_logprobs": [None]}]}, {"choices": [{"prompt_logprobs": [None, {"a": {"logprob": -1}}]}]},
])  # fmt: skip
def test_replies_that_do_not_score_are_refused(reply):
    with pytest.raises(MalformedReplyError, match="prompt_logprobs"):
        read_scores(json.dumps(reply), 2)


def test_the_position_after_the_last_token_follows_the_last_token(vllm, model, data, tmp_path):
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[6, 7, IGNORE]])}
    with torch.no_grad():
        ours = served(options(vllm, tmp_path), data.task)(batch).logits[0, -1].argmax()
        assert ours == model(batch).logits[0, -1].argmax()
