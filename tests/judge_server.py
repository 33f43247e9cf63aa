"""A server that speaks /v1/chat/completions.

It prefers the answer with more stars (`*`), or of what else it is told to count, and rates an
answer by them; the shipped templates say where the answers are. A plan says how it misbehaves on
its next requests.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

KEY = 'a-planted-key-91c4"\\'  # with characters that Python and JSON write otherwise


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        its, key = self.server, self.headers.get("Authorization")
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
        elif name == "drop":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        elif name != "hang up":
            text = details[0] if name == "say" else its.verdict(body["messages"][0]["content"])
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self.answer(200, {"choices": [{"message": {"content": text}}], "usage": usage})


class JudgeServer(ThreadingHTTPServer):
    """What was asked since the last plan is `seen`."""

    def __init__(self, counted: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.counted, self.lock = counted, Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.at_once = 0
        self.plan()

    def plan(self, *steps: Any) -> None:
        """How to act on the next requests; forgets those before."""
        self.steps, self.seen, self.most_at_once = list(steps), [], 0

    @property
    def calls(self) -> int:
        return len(self.seen)

    def verdict(self, prompt: str) -> str:
        found = re.search(
            r"===== ANSWER A =====(.*)===== ANSWER B =====(.*)===== END", prompt, re.S
        )
        if found:
            a, b = (text.count(self.counted) for text in found.groups())
            return f"They have {a} and {b} stars.\n[[{'C' if a == b else 'A' if a > b else 'B'}]]"
        found = re.search(r"===== ANSWER =====(.*)===== END", prompt, re.S)
        stars = found[1].count(self.counted) if found else 0
        return f"It has {stars} stars.\nRating: [[{1 + min(9, stars)}]]"


@contextmanager
def judge_server(counted: str = "*") -> Iterator[JudgeServer]:
    with JudgeServer(counted) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
