"""A server on loopback that speaks the protocol, and fails as it is told."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kd_openai.options import OpenAIOptions
from kd_openai.teacher import OpenAITeacher

STATUSES = {"busy": (429, {"Retry-After": "0.05"}), "broken": (500, {}), "away": (503, {}), "timeout": (408, {}),
            "later": (429, {"Retry-After": "86400"})}  # fmt: skip
FAULTS = ("busy", "broken", "away", "cut", "drop", "malformed", "html", "shape", "empty", "delay")


def echo(prompt: str, seed: int) -> str:
    """What the server answers to a prompt."""
    return f"<{prompt}> by {seed}"


def prompt_of(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


@dataclass
class Server:
    """A server of the model `tiny`.

    Args:
        fault: `(number, body) -> name of a fault or "ok"`, for the request of that number.
        answer: `(prompt, seed) -> text`.
        ignores_n: gives one choice whatever it is asked for.
        counts: whether it says how many tokens there were.
        key: what it wants to be asked with.
        models: those it knows.
        unknown: its status for others.
        pace: seconds that an answer takes.
    """

    fault: Callable[[int, dict[str, Any]], str] = lambda number, body: "ok"
    answer: Callable[[str, int], str] = echo
    ignores_n: bool = False
    counts: bool = True
    key: str | None = None
    models: tuple[str, ...] = ("tiny", "small")
    unknown: int = 404
    pace: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busiest: int = 0

    def __post_init__(self) -> None:
        self.lock, self.now = threading.Lock(), 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"it": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda request, address: None  # a client that was killed
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reply(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        prompt, n = prompt_of(body), 1 if self.ignores_n else body.get("n", 1)
        texts = ["" if fault == "empty" else self.answer(prompt, body["seed"] + i) for i in range(n)]
        numbers = [[-0.5] * len(text.split()) for text in texts]
        choices: list[dict[str, Any]] = []
        for i, (text, logprobs) in enumerate(zip(texts, numbers, strict=True)):
            choice: dict[str, Any] = {"index": i, "finish_reason": "stop"}
            if "messages" in body:
                choice["message"] = {"role": "assistant", "content": text}
                given: Any = {"content": [{"token": "x", "logprob": p} for p in logprobs]}
            else:
                choice["text"] = text
                given = {"tokens": ["x"] * len(logprobs), "token_logprobs": logprobs}
            choices.append({**choice, "logprobs": given if body.get("logprobs") else None})
        words = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": words, "total_tokens": 0}
        return {"id": "x", "object": "x", "model": "tiny", "choices": choices, "usage": usage if self.counts else None}


class Handler(BaseHTTPRequestHandler):
    it: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send({"object": "list", "data": [{"id": name, "object": "model"} for name in self.it.models]})

    def do_POST(self) -> None:
        it = self.it
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with it.lock:
            number = len(it.asked)
            it.asked.append(body)
            it.headers.append(dict(self.headers))
            it.now += 1
            it.busiest = max(it.busiest, it.now)
        try:
            self.respond(body, it.fault(number, body))
        finally:
            with it.lock:
                it.now -= 1

    def respond(self, body: dict[str, Any], fault: str) -> None:
        it = self.it
        if it.key and self.headers["Authorization"] != f"Bearer {it.key}":
            return self.send({"error": {"message": f"wrong key: {self.headers['Authorization']}"}}, 401)
        if body["model"] not in it.models:
            return self.send({"error": {"message": "there is no such model", "code": "model_not_found"}}, it.unknown)
        if fault in STATUSES:
            status, headers = STATUSES[fault]
            return self.send({"error": {"message": f"{fault} now"}}, status, **headers)
        if fault.startswith("400"):
            return self.send({"error": {"message": fault}}, 400)
        if fault == "quota":
            return self.send({"error": {"message": "no money left", "code": "insufficient_quota"}}, 429)
        if fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        time.sleep({"delay": 0.05, "hang": 3.0}.get(fault, 0.0) + it.pace)
        if fault == "html":
            return self.send_bytes(b"<html>back soon</html>", "text/html")
        if fault == "shape":
            return self.send({"error": "something else"})
        text = json.dumps(it.reply(body, fault)).encode()
        if fault == "malformed":
            return self.send_bytes(text[: len(text) // 2])
        if fault == "cut":
            self.close_connection = True
            return self.send_bytes(text[: len(text) // 2], length=len(text))
        if fault != "empty":
            with it.lock:
                it.answered.append(prompt_of(body))
        return self.send_bytes(text)

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send_bytes(json.dumps(value).encode(), status=status, **headers)

    def send_bytes(
        self, data: bytes, kind: str = "application/json", status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length or len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def mixed_faults(share: float, kinds: Sequence[str]) -> Callable[[int, dict[str, Any]], str]:
    """Every kind of fault, in this share of the requests."""
    draw = random.Random(0)
    return lambda number, body: draw.choice(kinds) if draw.random() < share else "ok"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(**settings)`: a server that lives as long as the test; `faults=0.2` makes one request in five fail."""
    servers: list[Server] = []

    def start(faults: float = 0.0, kinds: Sequence[str] = FAULTS, **settings: Any) -> Server:
        servers.append(Server(**({"fault": mixed_faults(faults, kinds)} if faults else {}), **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., OpenAITeacher]:
    """`ask(server or address, **options)`: a teacher with a cache of the test's own."""

    def make(server: Server | str, **options: Any) -> OpenAITeacher:
        url = server if isinstance(server, str) else server.url
        given = {"model": "tiny", "base_url": url, "key_env": None, "cache": str(tmp_path / "cache"), **options}
        return OpenAITeacher(OpenAIOptions.model_validate(given))

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after hundredths of a second."""
    from tenacity import wait_exponential_jitter

    monkeypatch.setattr("kd_openai.failures.backoff", wait_exponential_jitter(initial=0.01, max=0.05, jitter=0.01))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
