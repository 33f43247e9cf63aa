"""Small servers that speak what SeRA asks of vLLM (test_vllm has the real one) and of a judge.

Both send the key that they are asked with back, wherever they can.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

KEY = 'a-planted-key-91c4"\\'  # with characters that Python and JSON write otherwise
CONTEXT = 48


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def asked(self) -> tuple[Any, str | None]:
        """The request's body and key."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return json.loads(body or "{}"), self.headers["Authorization"]

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    with server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
        server.shutdown()


class JudgeHandler(Handler):
    server: JudgeServer

    def do_POST(self) -> None:
        its, (body, key) = self.server, self.asked()
        with its.lock:
            step = its.steps.pop(0) if its.steps else "fine"
            its.seen.append({"path": self.path, "body": body, "key": key})
            its.at_once += 1
            its.most_at_once = max(its.most_at_once, its.at_once)
        name, *details = step if isinstance(step, list) else [step]
        if name == "sleep":
            time.sleep(details[0])
        with its.lock:
            its.at_once -= 1
        if name == "status":
            self.answer(details[0], {"error": {"message": f"no, {key}"}}, **dict(*details[1:]))
        elif name == "raw":
            self.answer(200, details[0].encode())
        elif name == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            if not details[2:]:
                self.end_headers()
            with suppress(OSError):
                self.flush_headers()
                for _ in range(details[1]):
                    self.wfile.write(b"X-More: 1\r\n" if details[2:] else b" ")
                    time.sleep(details[0])
        elif name == "drop":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        elif name != "hang up":
            text = details[0] if name == "say" else its.verdict(body["messages"][0]["content"])
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self.answer(200, {"choices": [{"message": {"content": text}}], "usage": usage})


class JudgeServer(ThreadingHTTPServer):
    """Speaks /v1/chat/completions; what was asked since the last plan is `seen`.

    It prefers the answer with more stars (`*`), or of what else it is told to count, and rates an
    answer by them; the shipped templates say where the answers are.
    """

    def __init__(self, counted: str) -> None:
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.counted, self.lock = counted, Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.at_once = 0
        self.plan()

    def plan(self, *steps: Any) -> None:
        """How to act, or misbehave, on the next requests; forgets those before."""
        self.steps, self.seen, self.most_at_once = list(steps), [], 0

    @property
    def calls(self) -> int:
        return len(self.seen)

    def verdict(self, prompt: str) -> str:
        shown = r"===== ANSWER A =====(.*)===== ANSWER B =====(.*)===== END"
        if found := re.search(shown, prompt, re.S):
            a, b = (text.count(self.counted) for text in found.groups())
            return f"They have {a} and {b} stars.\n[[{'C' if a == b else 'A' if a > b else 'B'}]]"
        found = re.search(r"===== ANSWER =====(.*)===== END", prompt, re.S)
        stars = found[1].count(self.counted) if found else 0
        return f"It has {stars} stars.\nRating: [[{1 + min(9, stars)}]]"


@contextmanager
def judge_server(counted: str = "*") -> Iterator[JudgeServer]:
    server = JudgeServer(counted)
    with serving(server):
        yield server


def choices(request: dict[str, Any]) -> Any:
    """A token that the seed gives, and the end token 2; -1 nat for each token of a prompt."""
    if "prompt_logprobs" in request:
        known = [{str(token): {"logprob": -1.0}} for token in request["prompt"][1:]]
        return [{"prompt_logprobs": [None, *known]}]
    seeds = range(request["seed"], request["seed"] + request["n"])
    return [
        {"index": index, "token_ids": [5 + seed % 30, 2], "finish_reason": "stop"}
        for index, seed in enumerate(seeds)
    ]


class Vllm(Handler):
    """`base` and `tokenizer` are of the model that it serves.

    On the path `fail` it answers `failure`, `drops` connections it closes without an answer, and
    `raw` is sent to any request.
    """

    base = ""
    tokenizer: Callable[..., Any]
    choices = staticmethod(choices)
    metrics: Callable[[], str] = staticmethod(lambda: "nothing")
    fail: str | None = None
    failure = 500
    raw: bytes | None = None
    drops = 0

    def do_GET(self) -> None:
        if type(self).drops:
            type(self).drops -= 1
            self.close_connection = True
            return
        status, content = self._answer(*self.asked())
        self.answer(status, self.raw or content)

    do_POST = do_GET

    def _answer(self, request: dict[str, Any], said: str | None) -> tuple[int, Any]:
        if self.fail == self.path:
            return self.failure, {"error": {"message": f"\x1b[2J\x07{said}\nsecond line"}}
        if self.path == "/v1/unload_lora_adapter":
            return 400, {"error": said}
        answers: dict[str, Callable[[], Any]] = {
            "/health": bytes,
            "/metrics": lambda: self.metrics().encode(),
            "/version": lambda: {"version": f"1 {said}"},
            "/v1/models": lambda: {
                "data": [{"id": said or "base", "root": self.base, "max_model_len": CONTEXT}]
            },
            "/tokenize": lambda: {
                "tokens": self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            },
            "/v1/load_lora_adapter": bytes,
            "/v1/completions": lambda: {"choices": self.choices(request)},
        }
        return 200, answers[self.path]()


class VllmServer(ThreadingHTTPServer):
    #: Connections that wait to be taken. Beyond them one is tried again after a second.
    request_queue_size = 128


@contextmanager
def vllm_server(base: Path | None = None, **behaviour: Any) -> Iterator[SimpleNamespace]:
    """A running server of the demo's model; yields where it is, the model's `tokenizer`, and `its`
    behaviour, which may change."""
    from sera_plugin.tools.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    its = {"base": str(base), "tokenizer": staticmethod(tokenizer), **behaviour}
    server = VllmServer(("127.0.0.1", 0), type("Its", (Vllm,), its))
    with serving(server):
        url = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(
            url=url, port=server.server_port, tokenizer=tokenizer, its=server.RequestHandlerClass
        )
