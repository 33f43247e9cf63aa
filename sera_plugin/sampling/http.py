"""One HTTP exchange with bounds: of bytes, of seconds, of nesting."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from sera_plugin.config.credentials import without_credentials
from sera_plugin.config.quoting import plain, printable, without_secret

#: Bytes of a reply. 128 answers of 8,192 tokens have a tenth of it.
LARGEST = 64 * 2**20
#: Seconds for a connection.
CONNECTING = 10.0
#: Characters of a sentence that says what a server has done.
SENTENCE = 2000
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
        """The body as JSON; ValueError where it is none, nested without end, or ambiguous."""
        try:
            return json.loads(self.body, object_pairs_hook=_object)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def words(self, key: str) -> str:
        """The server's own words, cut to a readable length."""
        if 300 <= self.status < 400:
            return "a redirect, which is not followed"
        try:
            error = self.json()
            error = error.get("error", error)
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, AttributeError, RecursionError):
            text = self.text
        return one_line(text, key, 400)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands there twice readers would take one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


class Session(requests.Session):
    """Connections that are kept, `at_once` of them, and never lead to another address.

    requests reads what comes with a redirect before it follows it or not, however long that is.
    """

    def __init__(self, at_once: int, trust_env: bool) -> None:
        super().__init__()
        self.trust_env = trust_env
        # A few bytes may be megabytes, or nothing for ever, once they are decompressed.
        self.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self.mount(scheme, HTTPAdapter(pool_maxsize=at_once))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: there is nothing to follow."""


def exchange(
    session: Session, method: str, url: str, seconds: float | None, **options: Any
) -> Reply:
    """Send a request and read the reply.

    `seconds` are for all of it by the clock, None for as long as it takes, where somebody else
    watches. requests' own limits count the silence between two pieces.

    Raises:
        requests.RequestException: also for a reply that is too long, compressed or takes too long.
    """
    began = monotonic()
    connecting = CONNECTING if seconds is None else min(CONNECTING, seconds)

    def work() -> Reply:
        body, timeout = bytearray(), (connecting, seconds)
        with session.request(method, url, timeout=timeout, stream=True, **options) as answer:
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise requests.RequestException(
                    f"the reply is compressed ({plain(encoding)}), which was not asked for"
                )
            try:
                # What has come so far: `iter_content` waits until a piece is full.
                while piece := answer.raw.read1(2**16, decode_content=False):
                    body += piece
                    if len(body) > LARGEST:
                        raise requests.RequestException(
                            f"the reply is longer than {LARGEST:,} bytes"
                        )
                    if seconds is not None and monotonic() > began + seconds:
                        raise _late(seconds)
            except HTTPError as error:  # of urllib3
                raise requests.ConnectionError(str(error)) from error
            return Reply(answer.status_code, answer.headers, bytes(body))

    return within(seconds, work)


def within(seconds: float | None, call: Callable[[], Result]) -> Result:
    """What a call returns; requests.Timeout where that takes longer.

    A name's address may take minutes to find, and headers may come byte by byte, each within
    requests' limit. The thread that waits for them is left behind.
    """
    try:
        return started(call).result(seconds)
    except TimeoutError:
        raise _late(seconds or 0.0) from None


def started(call: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """A call in a thread that no end of the program waits for, as it would for those of a pool."""
    made: Future[Result] = Future()

    def work() -> None:
        try:
            made.set_result(call(*arguments))
        except Exception as error:
            made.set_exception(error)

    Thread(target=work, daemon=True).start()
    return made


def _late(seconds: float) -> requests.Timeout:
    return requests.Timeout(f"there is no reply after {seconds:g} seconds")


def one_line(text: str, key: str, limit: int = SENTENCE) -> str:
    """Text in one line and cut, without the key: a server may send back what it was sent."""
    # Cut before anything looks for credentials in it, which takes its time over a long text.
    line = printable(" ".join(without_secret(text, key).split())[: 10 * limit])
    return without_credentials(line)[:limit]
