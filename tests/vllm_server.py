"""A small server that speaks what SeRA asks of vLLM; test_vllm has the real one.

It sends the key that it is asked with back, wherever it can.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXT = 48


def choices(request: dict[str, Any]) -> Any:
    """A token that the seed gives, and the end token 2."""
    seeds = range(request["seed"], request["seed"] + request["n"])
    return [
        {"index": index, "token_ids": [5 + seed % 30, 2], "finish_reason": "stop"}
        for index, seed in enumerate(seeds)
    ]


class Server(BaseHTTPRequestHandler):
    """`base` and `tokenizer` are of the model that it serves.

    On the path `fail` it answers 500, `drops` connections it closes without an answer, and `raw` is
    sent to any request.
    """

    base = ""
    tokenizer: Callable[..., Any]
    choices = staticmethod(choices)
    metrics: Callable[[], str] = staticmethod(lambda: "nothing")
    fail: str | None = None
    raw: bytes | None = None
    drops = 0

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if type(self).drops:
            type(self).drops -= 1
            self.close_connection = True
            return
        length = int(self.headers["Content-Length"] or 0)
        status, body = self._answer(json.loads(self.rfile.read(length) or "{}"))
        content = self.raw or (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def _answer(self, request: dict[str, Any]) -> tuple[int, Any]:
        said = self.headers["Authorization"]
        if self.fail == self.path:
            return 500, {"error": {"message": f"\x1b[2J\x07{said}\nsecond line"}}
        if self.path == "/v1/unload_lora_adapter":
            return 400, {"error": said}
        answers: dict[str, Callable[[], Any]] = {
            "/health": str,
            "/metrics": self.metrics,
            "/version": lambda: {"version": f"1 {said}"},
            "/v1/models": lambda: {
                "data": [{"id": said, "root": self.base, "max_model_len": CONTEXT}]
            },
            "/tokenize": lambda: {
                "tokens": self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            },
            "/v1/load_lora_adapter": str,
            "/v1/completions": lambda: {"choices": self.choices(request)},
        }
        return 200, answers[self.path]()


@contextmanager
def vllm_server(base: Path | None = None, **behaviour: Any) -> Iterator[SimpleNamespace]:
    """A running server of the demo's model; yields its `port` and the model's `tokenizer`."""
    from sera_plugin.tools.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    its = {"base": str(base), "tokenizer": staticmethod(tokenizer), **behaviour}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Its", (Server,), its)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(port=server.server_port, tokenizer=tokenizer)
        server.shutdown()
