"""One HTTP exchange with bounds: of bytes, of seconds, of nesting."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

import requests
from urllib3.exceptions import HTTPError

from sera_plugin.config.credentials import without_credentials
from sera_plugin.config.quoting import printable, without_secret

#: Bytes of a reply, decompressed. 128 answers of 8,192 tokens have a tenth of it.
LARGEST = 64 * 2**20
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """What a server has answered, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON; ValueError where it is none, or nested without end."""
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def words(self, key: str) -> str:
        """The server's own words, cut to a readable length."""
        try:
            error = self.json()
            error = error.get("error", error)
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, AttributeError):
            text = self.text[:4096]
        return one_line(text, key)[:400]


def exchange(
    session: requests.Session,
    method: str,
    url: str,
    timeout: tuple[float, float | None],
    **options: Any,
) -> Reply:
    """Send a request and read the reply.

    `timeout` has the seconds for a connection, and for all of the reply (None: as long as it takes,
    where somebody else watches). requests' own limits the silence between two pieces.

    Raises:
        requests.RequestException: also for a reply that is too long or takes too long.
    """
    body, began, most = bytearray(), monotonic(), timeout[1]
    with session.request(method, url, timeout=timeout, stream=True, **options) as answer:
        try:
            # What has come so far: `iter_content` waits until a piece is full.
            while piece := answer.raw.read1(2**16, decode_content=True):
                body += piece
                if len(body) > LARGEST:
                    raise requests.RequestException(f"the reply is longer than {LARGEST:,} bytes")
                if most is not None and monotonic() > began + most:
                    raise requests.Timeout(f"the reply is not at its end after {most:g} seconds")
        except HTTPError as error:  # of urllib3
            raise requests.ConnectionError(str(error)) from error
        return Reply(answer.status_code, answer.headers, bytes(body))


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a call returns; requests.Timeout where that takes longer.

    A name's address may take minutes to find, and headers may come one by one, each within
    requests' limit. The thread that waits for them is left behind.
    """
    made: Future[Result] = Future()

    def work() -> None:
        try:
            made.set_result(call())
        except Exception as error:
            made.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return made.result(seconds)
    except TimeoutError:
        raise requests.Timeout(f"there is no reply after {seconds:g} seconds") from None


def one_line(text: object, key: str) -> str:
    """Text in one line, without the key: a server may send back what it was sent."""
    line = printable(" ".join(without_secret(str(text), key).split()))
    return without_credentials(line)
