"""A server that speaks /v1/chat/completions, in a process of its own: run by `judge_server`.

It prefers the answer with more stars (`*`), or of what else it is told to count, and rates an
answer by them; the shipped templates say where the answers are. A plan, set over HTTP, says how it
misbehaves on its next requests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

COUNTED = sys.argv[1] if len(sys.argv) == 2 and __name__ == "__main__" else "*"
KEY = 'a-planted-key-91c4"\\'  # with characters that Python and JSON write otherwise


def verdict(prompt: str) -> str:
    pair = re.search(r"===== ANSWER A =====(.*)===== ANSWER B =====(.*)===== END", prompt, re.S)
    if pair:
        a, b = (text.count(COUNTED) for text in pair.groups())
        return f"They have {a} and {b} stars.\n[[{'C' if a == b else 'A' if a > b else 'B'}]]"
    single = re.search(r"===== ANSWER =====(.*)===== END", prompt, re.S)
    stars = single[1].count(COUNTED) if single else 0
    return f"It has {stars} stars.\nRating: [[{1 + min(9, stars)}]]"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    plan: list[Any] = []  # noqa: RUF012
    seen: list[dict[str, Any]] = []  # noqa: RUF012
    at_once = most_at_once = 0

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        with self.lock:
            self.answer(200, {"seen": self.seen, "most_at_once": Handler.most_at_once})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/plan":
            with self.lock:
                Handler.plan, Handler.most_at_once = body, 0
                self.seen.clear()
            self.answer(200, {})
            return
        with self.lock:
            step = self.plan.pop(0) if self.plan else "fine"
            key = self.headers.get("Authorization")
            self.seen.append({"path": self.path, "body": body, "key": key})
            Handler.at_once += 1
            Handler.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.act(step, body)
        finally:
            with self.lock:
                Handler.at_once -= 1

    def act(self, step: Any, body: dict[str, Any]) -> None:
        name, *details = step if isinstance(step, list) else [step]
        if name == "sleep":
            time.sleep(details[0])
        if name in ("drop", "hang up"):
            self.close_connection = True
        if name == "drop":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
        elif name == "status":
            status, headers = details[0], details[1] if len(details) > 1 else {}
            said = f"no, {self.headers.get('Authorization')}"
            self.answer(status, {"error": {"message": said}}, **headers)
        elif name == "raw":
            self.answer(200, details[0].encode())
        elif name != "hang up":
            text = details[0] if name == "say" else verdict(body["messages"][0]["content"])
            reply = {"message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self.answer(200, {"choices": [reply], "usage": usage})


#: For the tests' own questions, whatever proxies a test sets.
DIRECT = requests.Session()
DIRECT.trust_env = False


@dataclass
class JudgeServer:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plan(self, *steps: Any) -> None:
        """How to act on the next requests; forgets those before."""
        DIRECT.post(f"{self.url}/plan", json=steps, timeout=10).raise_for_status()

    def _told(self) -> dict[str, Any]:
        return DIRECT.get(self.url, timeout=10).json()

    #: What was asked since the last plan.
    seen = property(lambda self: self._told()["seen"])
    most_at_once = property(lambda self: self._told()["most_at_once"])
    calls = property(lambda self: len(self.seen))


@contextmanager
def judge_server(counted: str = "*") -> Iterator[JudgeServer]:
    command = [sys.executable, __file__, counted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield JudgeServer(process, int(process.stdout.readline()))
        finally:
            process.kill()


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
