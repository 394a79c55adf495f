"""A real server: `transformers serve` with a tiny language model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from kdcore.errors import ModelError
from kdcore.options import Sampling

WORDS = 40
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}w3"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "transformers")),
    reason="`transformers serve` needs transformers, fastapi and uvicorn",
)


def save_model(folder: Path) -> str:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w1")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=WORDS, bos_token_id=None, eos_token_id=1, pad_token_id=0, **small)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.do_sample = True  # the server samples only where the model's files say so
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address and the model of a server."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    where = tmp_path_factory.mktemp("serve")
    model = save_model(where / "model")
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(where / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(480):
            assert process.poll() is None, (where / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_it_answers(ask, server, mode):
    address, model = server
    teacher = ask(address, model=model, mode=mode)
    answers = teacher.generate(["w5 w6", "w7"], Sampling(max_tokens=6, n=2), [1, 2])
    assert [len(group) for group in answers] == [2, 2]  # it ignores `n`: it was asked twice for each
    assert teacher.spent.requests == 4
    for answer in (answer for group in answers for answer in group):
        assert set(answer.text.split()) <= {f"w{i}" for i in range(WORDS)}
        assert answer.tokens is not None
        assert answer.tokens <= 6
        assert answer.finish == ("length" if answer.tokens == 6 else "stop")


def test_answers_follow_their_seeds_and_the_temperature(ask, server, tmp_path):
    address, model = server

    def said(folder, seed, **sampling):
        # one at a time: this server's requests share one random generator
        teacher = ask(address, model=model, cache=str(tmp_path / folder), concurrency=1)
        return teacher.generate(["w5", "w6"], Sampling(max_tokens=8, **sampling), [seed, seed + 1])

    assert said("a", 1) == said("b", 1)
    assert said("a", 1) != said("c", 3)
    assert said("a", 1, temperature=0) == said("b", 5, temperature=0)


def test_it_is_told_what_the_server_refuses(ask, server):
    address, model = server
    with pytest.raises(ModelError, match=r"refuses the first request, prompt 0 \('w5'\): status 400: .*pinned to"):
        ask(address, model="someone/else").generate(["w5"], Sampling(), [1])
    with pytest.raises(ModelError, match=r"status 422: .*no_such_field"):
        ask(address, model=model, extra={"no_such_field": 1}).generate(["w5"], Sampling(), [1])
