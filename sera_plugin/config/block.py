"""Blocks of a YAML, read once into a frozen type; an API judge's is one.

What is wrong with a block is said in a sentence for each key.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sera_plugin.config.credentials import is_secret
from sera_plugin.config.quoting import as_written, quoted

_OURS = frozenset({"model", "messages", "stream", "n"})
_REPOSITORY = re.compile(
    r"(?!.*(--|\.\.))(?!.*\.git$)[a-z0-9]([a-z0-9_-]*[a-z0-9])?/\w([\w.-]{0,94}\w)?",
    re.ASCII | re.IGNORECASE,
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def closest(name: str, known: Collection[str], cutoff: float = 0.5) -> str | None:
    """The known key that a name resembles most, if any does."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def not_a_key(where: str, name: object, known: Collection[str]) -> str:
    """What to say of an unknown key; `where` comes before it: its block and a dot (`sera.`)."""
    key = as_written(name)
    close = closest(key, known)
    hint = f"Did you mean `{close}`?" if close else f"Known keys: {', '.join(known)}."
    return f"{where}{key} is not a key. {hint}"


def address(url: str, example: str, instead: str) -> SplitResult:
    """The parts of an http or https URL; `instead` says where a key comes from.

    ValueError where it is none, or may hold a secret, which is not repeated.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        known = False
    if not known:
        raise ValueError(f"give an address such as {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "an address with a user, a password or a query may be secret and is not kept; "
            f"keys come from the environment variable {instead}"
        )
    return parts


def repository(name: str) -> str:
    """The name of a repository of the hub, with its owner; ValueError for anything else."""
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(
            f"{quoted(name)} is no repository of the hub: write user/name, of letters, digits, "
            "-, _ and ., at most 96 in the name"
        )
    return name


def block_of(key: str, value: Any) -> Mapping[str, Any]:
    """The keys of a block, none where it is not set; ValueError for anything but a block."""
    if isinstance(block := {} if value is None else value, Mapping):
        return block
    raise ValueError(
        f"{key}: {quoted(value)} is not a block of keys. Write `{key}:` and indent its keys."
    )


def _on_one_line(schema: dict[str, Any]) -> None:
    for key in schema["properties"].values():
        key["description"] = " ".join(key["description"].split())


class Block(BaseModel):
    """A block of a YAML: unknown keys are errors, and the docstring of a key is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=_on_one_line,
    )

    @classmethod
    def parse(cls, block: Any, where: str) -> Self:
        """The block as a YAML has it; `where` comes before the keys that are named (`sera.`).

        Raises:
            ValueError: with a sentence for each key that is wrong. With `hide_input_in_errors` no
                value is repeated: any of them could be a secret.
        """
        try:
            return cls.model_validate(dict(block))
        except ValidationError as error:
            shown = not cls.model_config.get("hide_input_in_errors")
            errors = error.errors(include_input=shown, include_url=False)
            said = "; ".join(cls._sentence(one, where) for one in errors)
        except (OverflowError, RecursionError) as error:
            said = (
                f"{where.rstrip('.: ')}: {quoted(block)} has a value that cannot be read: {error}"
            )
        # Which keys are known is said at the last unknown one alone.
        before, known, after = said.rpartition(f" Known keys: {', '.join(cls.model_fields)}.")
        raise ValueError(before.replace(known, "") + known + after)

    @classmethod
    def _sentence(cls, error: Mapping[str, Any], where: str) -> str:
        """The key, the value, what is allowed."""
        key = ".".join(map(as_written, error["loc"]))
        place = f"{where}{key}: " if key else where
        match error["type"]:
            case "extra_forbidden" if is_secret(key):
                return (
                    f"{place}no key belongs in a file. Export it in an environment variable and "
                    "give that variable's name as api_key_env"
                )
            case "extra_forbidden":
                return not_a_key(where, key, cls.model_fields)
            case "missing":
                return f"{where}{key} is missing"
            case "value_error":
                return place + error["msg"].removeprefix("Value error, ")
        value = f"{quoted(error['input'])} is not allowed: " if "input" in error else ""
        return f"{place}{value}{error['msg']}"


class JudgeConfig(Block, hide_input_in_errors=True):
    """A judge at an OpenAI-compatible endpoint."""

    base_url: str
    """Where the endpoint is, up to `/v1`: `https://api.openai.com/v1`, `http://127.0.0.1:8000/v1`.
    `/v1` is added to an address without a path."""
    model: str = Field(min_length=1)
    """The model's name there."""
    api_key_env: str | None = None
    """The NAME of the environment variable that holds the key. Unset: no key is sent."""
    mode: Literal["pairwise", "single"] = "pairwise"
    """`pairwise` shows two answers, in both orders; `single` rates each answer from 1 to 10."""
    template: Path | None = None
    """A text file with the judge's prompt in place of the shipped one."""
    request: dict[str, Any] = Field({"temperature": 0, "max_tokens": 2048})
    """Fields of the request besides `model` and `messages`, sent as they are."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests at a time."""
    timeout: float = Field(120.0, gt=0, le=3600)
    """Seconds for a reply, by the clock; then the request is made again."""
    prompt_price: float | None = Field(None, ge=0)
    """Price of a million prompt tokens, in any currency."""
    completion_price: float | None = Field(None, ge=0)
    """Price of a million completion tokens."""

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = address(url, "https://api.openai.com/v1", "that api_key_env names")
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"

    @field_validator("api_key_env")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("give the NAME of an environment variable, never the key itself")
        return name

    @field_validator("request")
    @classmethod
    def _check_request(cls, request: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(key for key in request if key in _OURS or is_secret(key))
        if refused:
            raise ValueError(
                f"{', '.join(map(quoted, refused))} cannot be set here; see model and api_key_env"
            )
        return request

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine, where no proxy has a part in it."""
        return urlsplit(self.base_url).hostname in _LOOPBACK

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The price of tokens, None unless both prices are known."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


def read_judge(path: Path) -> JudgeConfig:
    """A judge from a YAML file; a relative `template` is looked for beside the file.

    Raises:
        ValueError: naming the file, the key and what is wrong. No value that could be a key is
            repeated.
        OSError: if it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path} is not YAML{where}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping. It needs base_url and model.")
    config = JudgeConfig.parse(content, f"{path}: ")
    if config.template is not None:
        config = config.model_copy(update={"template": path.parent / config.template})
    return config
