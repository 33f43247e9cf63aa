"""What looks like a credential is in no run.json, and what does not is there unchanged."""

import base64
import copy
import datetime
import json
import math
import random
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sera_plugin.algorithm.method import Method, Schedule
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.credentials import is_secret, public, without_credentials
from sera_plugin.config.quoting import plain, quoted
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.run import describe_run, kept, known_keys, require_same_run
from sera_plugin.rundir.store import make_table, read_json, write_json

CASES = 1250
EXAMPLES = sorted((Path(__file__).parents[1] / "example_yamls").glob("*.yaml"))
LETTERS = string.ascii_letters + string.digits

#: A value around a secret that is found by its shape, under any key.
SHAPES: dict[str, Callable[[str], str]] = {
    "password of a URL": lambda s: f"https://me:{s}@example.org/a",
    "password with a slash": lambda s: f"postgres://me:a/{s}?b@db.example.org:5432/runs",
    "user of a URL": lambda s: f"https://{s}@example.org/a",
    "proxy": lambda s: f"me:{s}@proxy.example.org:3128",
    "signed query": lambda s: f"s3://bucket/pairs.jsonl?X-Amz-Signature={s}",
    "fragment": lambda s: f"https://example.org/pairs.jsonl#access_token={s}",
    "Slack webhook": lambda s: f"https://hooks.slack.com/services/T01234567/B01234567/{s}",
    "webhook without https": lambda s: f"hooks.slack.com/services/T01234567/B01234567/{s}",
    "Discord webhook": lambda s: f"https://discord.com/api/webhooks/1234567890/{s}",
    "Teams webhook": lambda s: f"https://example.webhook.office.com/webhookb2/{s}/IncomingWebhook",
    "Telegram bot": lambda s: f"https://api.telegram.org/bot12345:{s}/sendMessage",
    "bearer": lambda s: f"Bearer {s}",
    "bearer in a text": lambda s: f"curl -H 'Authorization: Bearer {s}' https://example.org",
    "basic": lambda s: f"Basic {base64.b64encode(s.encode()).decode()}",
    "header of two words": lambda s: f"Authorization: Token {s}",
    "cookie": lambda s: f"Cookie: session={s}; other=1",
    "option": lambda s: f"serve --api-key={s} --port 80",
    "option and value": lambda s: f"serve --hf-token {s} --port 80",
    "quoted option": lambda s: f"serve --password '{s} {s}' --port 80",
    "variable": lambda s: f"WANDB_API_KEY={s} python train.py",
    "connection": lambda s: f"Server=db;User=me;Password={s};Port=1",
    "JSON": lambda s: json.dumps({"client_secret": s, "a": 1}),
    "JSON in JSON": lambda s: json.dumps({"a": json.dumps({"apiKey": s})}),
    "YAML": lambda s: f"name: a\npassword: {s}\n",
    "Hugging Face": lambda s: f"hf_{s}",
    "OpenAI": lambda s: f"use sk-proj-{s}",
    "GitHub": lambda s: f"ghp_{s}",
    "GitLab": lambda s: f"(glpat-{s})",
    "AWS": lambda s: f"AKIA{s.upper()}",
    "Slack": lambda s: f"xoxb-123-{s}",
    "JWT": lambda s: f"eyJhbGciOiJIUzI1NiJ9.{s}.{s}",
    "a token of another service": lambda s: f"xai-7{s}",
    "a token of any service": lambda s: f"acme_pat_1a2b3C{s}",
    "YAML of several lines": lambda s: f"api_key: |\n  {s}\n  {s}\nb: 1",
    "arrow": lambda s: f"api_key => {s}",
    "PGP key": lambda s: (
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n{s}\n-----END PGP PRIVATE KEY BLOCK-----"
    ),
    "private key": lambda s: (
        f"-----BEGIN RSA PRIVATE KEY-----\n{s}\n{s}\n-----END RSA PRIVATE KEY-----"
    ),
}
#: Keys under which everything is a secret.
KEYS = """
    api_key apiKey apiKeys API-KEY x-api-key WANDB_API_KEY openaiKey hfkey key keys accessKey
    HF_TOKEN HF_TOKENS hfToken hftoken access-token refreshTokens token private_key ssh-key
    client_secret clientSecrets secret db_pass dbPass PASSWD password dbpassword Passwords
    passphrase
    auth basicAuth http-auth Authorization proxy_authorization cookie sessionCookies credential
    awsCredentials credentials api_key_2 token1
    pwd creds pass-word pass_phrase auth_header private_key_pem bearer token_value
"""
#: Keys that say nothing, of free blocks.
NEUTRAL = "endpoint value note a Extra x-thing args 0 env_var url"
#: Keys of the schema with a text in them, and free blocks of it.
KNOWN = "base_model wandb_project mlflow_tracking_uri hub_model_id output_dir wandb_entity"
FREE = """
    wandb env headers lr_scheduler_kwargs overrides_of_model_config chat_template_kwargs optim_args
    comet_experiment_config storage_options my_plugin sera
"""
JUNK: list[Any] = [
    *(
        math.nan,
        math.inf,
        -math.inf,
        10**400,
        True,
        None,
        "",
        "\ud800",
        "a\0b",
        "\u202e",
        b"\xff\xfe",
    ),
    *(datetime.date(2025, 1, 1), {"x", "y"}, (1, "y"), [[]], {1: {None: 2.5}}, {b"k": 1}, object),
]


@cache
def read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    return {key: value for key, value in content.items() if value is not None}


def drawn(rng: random.Random, kind: str | None = None) -> str:
    """A value as drawn at random by whoever issues such."""
    kind = kind or rng.choice(["letters", "hex", "base64", "base32", "small", "uuid"])
    match kind:
        case "hex":
            return rng.randbytes(rng.choice([16, 20, 32])).hex()
        case "base64":
            return base64.b64encode(rng.randbytes(rng.choice([24, 30, 33, 48]))).decode()
        case "base32":
            return base64.b32encode(rng.randbytes(20)).decode()
        case "small":
            return "".join(rng.choices(string.ascii_lowercase + string.digits, k=32))
        case "uuid":
            text = rng.randbytes(16).hex()
            return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    return "".join(rng.choices(LETTERS, k=rng.choice([24, 32, 40])))


def case(number: int) -> tuple[dict[str, Any], list[str], list[str]]:
    """A configuration, the secrets in it, and the values of it that have one in a shape."""
    rng = random.Random(number)
    config: dict[str, Any] = copy.deepcopy(read(rng.choice(EXAMPLES)))
    secrets, shaped = [], []

    def spelled(key: str) -> str:
        return rng.choice([key, key, key.upper(), key.replace("_", "-"), f"my_{key}"])

    def block() -> dict[str, Any]:
        """A free block at some depth of the configuration."""
        name = rng.choice(FREE.split())
        inner = config if rng.random() < 0.2 else config.setdefault(name, {})
        if not isinstance(inner, dict):
            inner = config[name] = {}
        if inner is config:  # keys that no schema has
            inner = config.setdefault(f"unknown_{rng.randrange(3)}", {})
        for _ in range(rng.randrange(4)):
            below: dict[str, Any] = {}
            key = f"{rng.choice(NEUTRAL.split())}_{rng.randrange(99)}"
            inner[key] = rng.choice([below, [below], [0, [below]], (below,)])
            inner = below
        return inner

    for _ in range(rng.randint(1, 4)):
        how = rng.randrange(6)
        if how < 2:
            secret = "".join(rng.choices(LETTERS, k=24))
            value = SHAPES[rng.choice(list(SHAPES))](secret)
            if rng.random() < 0.3:
                config[rng.choice(KNOWN.split())] = value
            elif rng.random() < 0.2:
                config["datasets"].append({"path": value, "data_files": [value], "type": None})
            elif rng.random() < 0.1:
                block()[value] = 1
            else:
                block()[rng.choice(NEUTRAL.split())] = rng.choice(
                    [value, [value], {"a": [value, 1]}]
                )
            shaped.append(value)
            core = value.split("Basic ")[-1] if value.startswith("Basic ") else secret
            secrets.append(core.upper() if "AKIA" in value else core)
        elif how < 4:
            secret = rng.choice([drawn(rng), "hunter2planted", "correct horse planted"])
            value = rng.choice([secret, [secret], {"a": secret}, {"a": [[secret]], "b": 1}])
            block()[spelled(rng.choice(KEYS.split()))] = value
            secrets.append(secret)
        elif how == 4:
            secret = drawn(rng)
            block()[rng.choice(NEUTRAL.split())] = rng.choice(
                [secret, [secret], f"take {secret} here"]
            )
            secrets.append(secret)
        else:
            secret = f"hunter{rng.randrange(10**6)}planted"
            name = rng.choice(["API_KEY", "hf-token", "db_password"])
            pairs = [{"name": name, "value": secret}, [name, secret], [f"--{name}", secret, "a"]]
            block()["args"] = rng.choice([[pairs[0]], [pairs[1]], pairs[2]])
            secrets.append(secret)
    for _ in range(rng.randrange(3)):
        block()[rng.choice(["junk", 7, None, "más"])] = rng.choice(JUNK)
    return config, secrets, shaped


def described(config: dict[str, Any]) -> dict[str, Any]:
    ids = [[1], [2], [3]]
    columns = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}
    pairs = Pairs.from_table(make_table(columns))
    method = Method(SeraConfig(), reference_free=False, per_token=False, total=3)
    schedule = Schedule(method.sizes, batch_size=1, accumulation=1)
    return describe_run(config, "dpo", 0.2, method, schedule, pairs, None, [2])


@pytest.mark.parametrize("first", range(0, CASES, 250))
def test_no_planted_secret_is_in_run_json_nor_in_a_message(tmp_path: Path, first: int) -> None:
    any_run = described({})
    for number in range(first, first + 250):
        config, secrets, shaped = case(number)
        run = any_run | {"config": kept(config)}
        write_json(tmp_path / "run.json", run)
        text = (tmp_path / "run.json").read_text()
        shown = [text, quoted(config, 10**6), *(quoted(value, 10**6) for value in shaped)]
        shown += [plain(f"cannot read {value}", 10**6) for value in shaped]
        for secret in secrets:
            assert not [one for one in shown if secret in one], (number, secret)
        again = read_json(tmp_path / "run.json")
        require_same_run(again, run, tmp_path)
        assert kept(again["config"]) == again["config"], number


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_ordinary_configuration_loses_nothing(path: Path) -> None:
    config = read(path)
    assert described(config)["config"] == config
    assert public(config) == config


def test_what_an_older_run_json_had_in_it_does_not_make_it_another_run(tmp_path: Path) -> None:
    now = described({"base_model": "m", "x": {"endpoint": "https://hooks.slack.com/services/a"}})
    old = copy.deepcopy(now)
    old["config"]["x"] = {"endpoint": "https://hooks.slack.com/services/a"}
    require_same_run(old, now, tmp_path)
    with pytest.raises(ValueError, match="base_model"):
        require_same_run(old, described({"base_model": "other"}), tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_masked_where_it_stands_and_the_rest_is_left(shape: str) -> None:
    secret = "pLanted0123456789AbCd"
    value = SHAPES[shape](secret)
    shown = without_credentials(f"before {value} after")
    assert "***" in shown
    for one in (secret, secret.upper(), base64.b64encode(secret.encode()).decode()):
        assert one not in shown
    assert shown.startswith("before ")
    assert "after" in shown or shape in ("header of two words", "cookie")
    assert ("--port 80" in shown) == ("--port 80" in value)


def test_keys_that_are_secret_in_any_spelling() -> None:
    for key in KEYS.split():
        for spelled in (key, key.upper(), key.replace("_", "-"), f"my_{key}", f"my-{key}"):
            assert is_secret(spelled), spelled


#: Values under keys that no schema has: names, places, checksums, words.
ORDINARY = {
    "model": "meta-llama/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
    "name": "Mistral-7B-Instruct-v0.2-sera-r0.7-b0.3-seed42",
    "class": "LlamaForSequenceClassificationWithRewardHead",
    "target": "model.layers.0.self_attn.q_proj",
    "place": "/data/models--a--b/snapshots/0123456789abcdef0123456789abcdef01234567",
    "below": "./outputs/0123456789abcdef0123456789abcdef01234567/policy",
    "url": "https://example.org:8080/v1/models/trl-lib/ultrafeedback_binarized",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "sha256": "0f" * 32,
    "date": "2025-01-01T12:00:00+00:00",
    "text": "A basic answer: the key is patience, and a token of thanks. Basic English will do.",
    "max_tokens": 2048,
    "stop_token": "<|im_end|>",
    "cosine": 0.1234567890123,
    "layers": ["q_proj", "key", "value", "query_key_value", "embed_tokens"],
    "special_tokens": {"bos_token": "<|begin_of_text|>", "pad_token": "</s>"},
    "options": "--max-model-len 4096 --dtype=bfloat16 lr=1e-5 eos_token=</s>",
    "prompt_cache_key": "mine",
    "tool_call_token": "<|call|>",
    "fim_prefix_token": "\u2581<PRE>",
    "rank_pattern": {"embed_tokens": 8},
    "adapter": "/m/sk-learn-Adapter-2024-X",
    "output": "outputs/lr=1e-4,key=3",
    "file": "/d/data-7f3a9c1e5b2d8f4a6c0e9b7d1f3a5c8e.parquet",
    "schema": {"properties": {"token": {"type": "string"}, "key": {"type": "integer"}}},
}


def test_the_names_of_the_schema_name_one_secret() -> None:
    def secret(known: Any) -> set[str]:
        return {key for key in known if is_secret(key)}.union(*map(secret, known.values()))

    assert secret(known_keys()) == {"comet_api_key", "hf_use_auth_token"}  # one is a switch
    assert known_keys()["datasets"]["path"] == {}  # type: ignore[comparison-overlap]
    assert "lr_scheduler_kwargs" not in known_keys()


@pytest.mark.parametrize(
    "part", ["://", "://a:", "=a:a", "sk-", "key=", "x.webhook.", "-", "a:", '"', " "]
)
def test_a_long_value_of_any_kind_is_judged_at_once(part: str) -> None:
    """A pattern that looks at each place from each place would take minutes for this one."""
    text = part * (2 * 10**5 // len(part))
    assert len(public({"x": text})["x"]) > 0


def test_what_is_ordinary_stays_under_keys_that_nobody_knows() -> None:
    assert public(ORDINARY) == ORDINARY
    assert public({"kwargs": [ORDINARY]}, known_keys()) == {"kwargs": [ORDINARY]}
