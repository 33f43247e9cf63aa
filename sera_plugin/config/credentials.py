"""What of a configuration may be kept and shown: everything but what looks like a credential.

A key says that its value is secret (`is_secret`), a value says it by its shape
(`without_credentials`). Where no schema says what a value is, one that looks drawn at random is
left out too (`public`).
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

#: Keys of a schema -> those of the block below them; a free block (`dict[str, Any]`) is not there.
Known = Mapping[str, "Known"]

# --------------------------------------------------------------------------- keys

#: Words that make a key a secret wherever they stand in it; `_` is between words.
_SECRET = re.compile(
    r"(?<![a-z])((api|secret|private)_?keys?(?!_env)|authorization|bearer|cred(ential)?s?|jwt|pwd"
    r"|secrets?|pass_?(code|phrase|wd|word)s?)(?![a-z])"
)
#: Of which a key with these words at its end has only the form (`auth_header`, `token_value`).
_FORM = re.compile(r"(?<!key)_(header|value)s?$")
#: Words that do so at its end, also written together with another (`hftoken`, `dbpass`).
_LAST = re.compile(
    r".*(authorization|cookie|credential|pass(phrase|wd|word)|secret)s?|(?!bypass|compass).*pass"
    r"|.*auth|(?!monkey|hotkey|turnkey).*key(?P<keys>s?)|.*token(?P<tokens>s?)"
)
#: Before `token`: a piece of text that a tokenizer knows, or a number of them.
_TEXT = re.compile(
    r"(add(ed)?|audio|bos|cls|embed|end|eo[ist]|extra|image|mask|pad|sep|special|start|stop|unk|video"
    r"|completion|generated|input|max|min|new|num|output|prompt|reasoning|supervised|thinking|total"
    r"|untrained)(token)?"
)
#: Before `key`: it names a field or an experiment.
_NAME = re.compile(r"(cache|column|experiment|field|group|property|sort|split|thinking)(key)?")


def is_secret(key: str) -> bool:
    """Whether a configuration key names a secret (`api_key`, `HF_TOKENS`, `Authorization`)."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower()
    words = [w for w in re.findall(r"[a-z0-9]+", parted) if not re.fullmatch("v?[0-9]+", w)]
    if _SECRET.search("_".join(words)):
        return True
    *_, before, last = ["", "", *_FORM.sub("", "_".join(words)).split("_")]
    if not (found := _LAST.fullmatch(last.rstrip("0123456789"))):
        return False
    if found["tokens"] is not None:  # `tokens` alone are texts too
        text = _TEXT.fullmatch(before) if last in ("token", "tokens") else _TEXT.match(last)
        return last != "tokens" * (not before) and not text
    if found["keys"] is not None:
        return not (_NAME.fullmatch(before) if last in ("key", "keys") else _NAME.match(last))
    return True


# --------------------------------------------------------------------------- values

#: Before the host of a URL, or of `user:password@host...` that stands by itself. What stands
#: after the host's port is no password, what stands after another colon is, whatever is in it.
_USER = re.compile(
    r"(?<=://)[^\s/?#]+@|(?<=://)[^\s/?#:@]{0,200}:(?!\d*[/?#])[^\s@]{1,500}@(?=[^\s@])"
    r"|^[^\s/?#:@]+:[^\s/?#@]+@(?=\S+$)"
    r"|(?<![^\s\"'(=])[^\s/?#:@\"'(=]+:[^\s/?#@]{1,500}@(?=[\w-]+[.:]\w)"
)
#: From the `?` or `#` of a URL on. Signatures and tokens stand there, under many names.
_QUERY = re.compile(r"(://(?:(?!://)[^\s?#])*[?#])\S+")
#: Whoever knows the address of a webhook may write there.
_WEBHOOK = re.compile(
    r"((?:(?<![\w.-])hooks\.|\.webhook\.|(?<![\w.-])api\.telegram\.)[\w.:-]{1,99}/"
    r"|/(?:web-?)?hooks?/)[^\s\"'<>]+",
    re.IGNORECASE,
)
#: What services give out begins with letters of theirs.
_ISSUED = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{12,}"
    r"|[sr]k-(?=[\w-]{0,200}[A-Z0-9])(?:[A-Za-z0-9]{1,11}[_-]){0,3}[A-Za-z0-9]{12}[\w-]*"
    r"|[spr]k_(?:live|test)_\w{8,}|gh[a-z]_[A-Za-z0-9]{12,}|github_pat_\w{12,}|glpat-[\w-]{12,}"
    r"|A[KS]IA[A-Z0-9]{12,}|xox[a-z]-[\w-]{8,}|xapp-[\w-]{8,}|AIza[\w-]{20,}|ya29\.[\w-]{12,}"
    r"|(?:gsk|npm|nvapi|pypi|r8|dop_v1|SG)[_.-](?=[\w-]{0,200}[A-Z0-9])[\w.-]{16,}"
    r"|(?:(?:AGE-SECRET-KEY|pplx|xai)-|hvs\.|(?:dckr|lsv2|shp)_?[a-z]{2,3}_|(?:tgp|wandb)_v1_)"
    r"(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20}[\w-]*|eyJ[\w-]{6,}\.[\w.-]+)"
    # Of others what stands by itself, drawn from digits and letters of both kinds.
    r"|(?<![\w./-])[A-Za-z][A-Za-z0-9]{0,9}(?:[_-][A-Za-z0-9]{1,6}){0,2}[_.-]"
    r"(?=[A-Za-z]*[0-9]+[A-Za-z]+[0-9]+[A-Za-z]+[0-9])(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])"
    r"[A-Za-z0-9]{20,}(?![\w/-]|\.\w)"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(-----END [A-Z ]*-----|\Z)", re.DOTALL
)
#: `Bearer xyz`; of `Basic xyz` what is nothing else, or is no word of a language.
_SCHEME = re.compile(
    r"(\b(?i:bearer)\s+|^\s*(?i:basic)\s+|\b(?i:basic)\s+(?=[\w+/=-]{8})(?=\S?[a-z]*[A-Z0-9+/=]))"
    r"[^\s\"',;]+"
)
#: A header whose value may have several words.
_HEADER = re.compile(
    r"((?<![\w-])(?:proxy-)?(?:authorization|(?:set-)?cookie)\\*[\"']?\s*[:=]\s*\\*[\"']?)"
    r"(?!\s|\\*[\"'])[^\"'\r\n]+",
    re.IGNORECASE,
)
#: `key=`, `key: `, `"key": ` and `--key `, also inside a longer text, and what is given to it.
_GIVEN = re.compile(
    r"(?<![\w.-])(?:(?P<key>-{0,2}[A-Za-z_][\w.-]*)"
    r"(?P<by>\\*[\"']?\s*(?:=>|[:=])\s*(?:[|>][-+0-9]*\s+)?)"
    r"|--?(?P<option>[A-Za-z][\w-]*)\s+(?!-))"
)
_VALUE = re.compile(r"\\*\"[^\"]*\"?|\\*'[^']*'?|(?:(?![\s;&]|,\s*[\w.-]+\s*[:=]).)+")
#: What is given with `|` or `>` in a YAML: all lines that are indented.
_LINES = re.compile(r".*(?:\n[ \t].*)*")
_NO_VALUE = re.compile(r"(true|false|none|null|\*\*\*|[\[\](){}]*)[\"'\])},.]*", re.IGNORECASE)
#: Keys that are words of a sentence too (`the key: patience`).
_WORDS = ("auth", "key", "keys", "pass", "secret", "secrets", "token")


def _without_given(text: str) -> str:
    """Text without the values that are given to a secret's name in it."""
    shown, done = [], 0
    while found := _GIVEN.search(text, done):
        shown.append(text[done : found.end()])
        done = found.end()
        key, by = found["key"] or found["option"], found["by"] or ""
        if is_secret(key) and (value := (_LINES if "\n" in by else _VALUE).match(text, done)):
            bare = value[0].strip("\\\"'.,")
            word = (":" in by and bare.isalpha()) or (bare.isdecimal() and len(bare) < 4)
            if not ((word and key.lower() in _WORDS) or _NO_VALUE.fullmatch(value[0])):
                shown.append(MASK)
                done = value.end()
    return "".join([*shown, text[done:]])


def without_credentials(text: str) -> str:
    """Text without what looks like a credential, wherever it stands in it.

    That is `user:password@` of a URL, its query, which may be signed, the path of a webhook, tokens
    as services issue them, private keys, `Bearer ...`, and values that are assigned to a secret's
    name (`--api-key=...`, `Authorization: ...`).
    """
    text = _PRIVATE_KEY.sub(MASK, text)
    text = _QUERY.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))
    text = _WEBHOOK.sub(rf"\1{MASK}", text)
    text = _HEADER.sub(rf"\1{MASK}", _ISSUED.sub(MASK, text))
    return _without_given(_SCHEME.sub(rf"\1{MASK}", text))


#: Where a value that was drawn at random may begin and end.
_RUN = re.compile(r"[A-Za-z0-9+/_=-]{20,}")
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
#: Keys of checksums and revisions, which are hexadecimal and no secrets.
_CHECKSUM = re.compile(
    r"(checksum|commit|digest|fingerprint|hash|md5|revision|sha\d*)$", re.IGNORECASE
)
_HEX = re.compile(r"(sha256:)?[0-9a-f]{32,64}")
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:\.{0,2}|~)[/\\]([^/\\]*)")


def _is_random(text: str) -> bool:
    """Whether 20 or more characters have no words in them, but random letters and digits."""
    plain = re.sub(r"[^A-Za-z0-9]", "", text)
    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text):
        return True  # a UUID, which some services use as a key
    if len(plain) < 20 or plain.isdigit() or (len(text.rstrip("=")) - len(plain)) * 10 > len(text):
        return False  # names have many separators
    if len(re.findall("[0-9]+", plain)) > 2 or re.fullmatch(r"[A-Z]*[2-7][A-Z2-7]*", plain):
        return True
    if re.search(r"[bcdfghjklmnpqrstvwxz]{6,}", plain.lower()) and len(set(plain)) > 8:
        return True
    return len(plain) < 4 * len(_PIECE.findall(plain))


def _without_random(text: str) -> str:
    if (path := _PATH.match(text)) and not _is_random(path[1]):
        return text  # a directory below may be called by a checksum
    parts = re.split(r"(://[^\s/]*/)", text)  # of a URL each segment is judged by itself

    def judged(found: re.Match[str]) -> str:
        if _is_random(found[0]):
            return MASK
        return "/".join(MASK if _is_random(one) else one for one in found[0].split("/"))

    return "".join(_RUN.sub(judged, part) for part in parts)


# --------------------------------------------------------------------------- configurations


#: A tokenizer's special token, by its key and as it is written (`tool_call_token: <|call|>`).
_TOKEN = re.compile(r"[a-z]_tokens?$")
_SPECIAL = re.compile(r"\W?</?[^<>\s/]{1,40}>|\[[A-Z_]{1,20}\]")
#: Types of a JSON schema, whose `properties` are names of fields.
_SCHEMA = ("array", "boolean", "integer", "null", "number", "object", "string")


def public(value: Any, known: Known | None = None, key: str = "") -> Any:
    """A configuration that can be kept and shown: without credentials, at any depth.

    What is secret by its key is left out, what is secret by its shape is masked. Booleans are
    settings whatever their key says (`hf_use_auth_token: true`), and so is a number of tokens.

    Args:
        value: mappings, lists and plain values.
        known: the keys that a schema has here, None in a free block: there what looks drawn at
            random is masked too, and a name beside a value or before it says what that is.
        key: the key it stands under.
    """
    if isinstance(value, dict):
        named = not known and any(isinstance(one, str) and _names(one) for one in value.values())
        judged = {
            _shown(name, known) if isinstance(name, str) else name: inner
            for name, inner in value.items()
        }
        return {
            name: public(inner, None if known is None else known.get(name), str(name))
            for name, inner in judged.items()
            if inner is None
            or isinstance(inner, bool)
            or not (is_secret(str(name)) or (named and str(name).lower() in ("value", "val")))
            or (isinstance(inner, (int, float)) and str(name).lower().endswith("tokens"))
            or (_TOKEN.search(str(name)) and isinstance(inner, str) and _SPECIAL.fullmatch(inner))
            or (key == "properties" and isinstance(inner, dict) and inner.get("type") in _SCHEMA)
        }
    if isinstance(value, (list, tuple)):
        shown = [
            MASK
            if known is None and isinstance(one, str) and isinstance(before, str) and _names(before)
            else public(one, known, key)
            for before, one in zip([None, *value], value, strict=False)
        ]
        return shown if isinstance(value, list) else tuple(shown)
    return _shown(value, known, key) if isinstance(value, str) else value


def _shown(text: str, known: Known | None, key: str = "") -> str:
    text = without_credentials(text)
    checksum = _CHECKSUM.search(key) and _HEX.fullmatch(text)
    return text if known is not None or checksum else _without_random(text)


def _names(text: str) -> bool:
    """Whether a value is the name of a secret, such as an option that the next one is given to."""
    option = re.fullmatch(r"(-{0,2})([A-Za-z_][\w-]{0,60}):?", text)
    return bool(option and is_secret(option[2]) and (option[1] or option[2].lower() not in _WORDS))


def storable(value: Any) -> Any:
    """A value as JSON can hold it, whatever a YAML has put there: a number that is none, half of a
    character, a date, a set."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {
            storable(json.dumps(key) if isinstance(key, (bool, int, type(None))) else str(key)): (
                storable(inner)
            )
            for key, inner in value.items()
        }
    if isinstance(value, (set, frozenset)):
        return sorted(map(storable, value), key=str)
    if isinstance(value, (list, tuple)):
        return [storable(inner) for inner in value]
    return str(value).encode("utf-8", "backslashreplace").decode()
