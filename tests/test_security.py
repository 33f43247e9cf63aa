"""What docs/security.md promises."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sera_plugin.algorithm.method import Method, SamplingSettings, Schedule
from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.config.credentials import is_secret, public, without_credentials
from sera_plugin.config.quoting import plain, printable, quoted, without_secret
from sera_plugin.config.sera import SeraConfig
from sera_plugin.data.files import load_failure, source_name
from sera_plugin.host.run import describe_run
from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import RunStore, make_table
from sera_plugin.sampling import child, samplers, vllm
from sera_plugin.sampling.child import SamplingFailed
from sera_plugin.sampling.servers import VllmServerSampler
from tests.conftest import adapter
from tests.servers import KEY, vllm_server

PACKAGE = Path(__file__).parents[1] / "sera_plugin"

#: What ruff has no rule for. The rest of the promise is `make lint`.
UNSAFE = re.compile(
    r"\b(shell|trust_remote_code|allow_pickle)=(?!False\b)|(?<![.\w])(compile|__import__)\("
)


RUFF_FINDS = {
    "TID251": [
        "import pickle", "from pickle import loads as read", "def f():\n    import shelve",
        *(f"import {name}" for name in ("marshal", "dill", "cloudpickle", "joblib")),
        "import torch\ntorch.load(path)", "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load\nload(path)", "import yaml\nyaml.full_load(text)",
        "import yaml\nyaml.unsafe_load(text)", "import os\nos.popen(command)",
    ],
    "S307": ["eval('1')"],
    "S102": ["exec(text)"],
    "S506": ["import yaml\nyaml.load(text, Loader=yaml.Loader)"],
    "S602": ["import subprocess\nsubprocess.run('ls', shell=True)"],
    "S605": ["import os\nos.system(command)"],
}  # fmt: skip


@pytest.mark.parametrize("rule", RUFF_FINDS)
def test_what_is_planted_is_found(rule, tmp_path):
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    command += ["--stdin-filename", str(PACKAGE / "sampling/planted.py"), "-"]
    for planted in RUFF_FINDS[rule]:
        done = subprocess.run(command, input=planted, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert rule in re.findall(r": (S\d+|TID251) ", done.stdout), planted


def test_nothing_in_the_package_runs_what_it_reads():
    """What ruff has no rule for is found, and nothing of it is there."""
    for planted in (
        "subprocess.run('ls', shell=wanted)",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "compile(text, '', 'exec')",
        "__import__(name)",
    ):
        assert UNSAFE.search(planted)
    assert not UNSAFE.search("f(trust_remote_code=False, shell=False); re.compile('a')")
    for path in PACKAGE.rglob("*.py"):
        assert not UNSAFE.search(path.read_text()), path


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_policy_is_read_from_safetensors_only_and_runs_nothing(world, tmp_path, kind):
    from peft import LoraConfig, get_peft_model

    from sera_plugin.model.policies import PolicyHistory
    from sera_plugin.tools.demo.base_model import load_model

    model, tokenizer = load_model(world.base)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    store = RunStore(tmp_path)
    history = PolicyHistory(model, store, str(world.base), tokenizer)
    history.keep_current(1)
    policy, mark, probe = store.policy(2), tmp_path / "ran", tmp_path / "probe"
    pickle.loads(pickle.dumps(Bomb(probe)))
    assert probe.exists()
    (policy / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nModel = Config = 0\n")
    code = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    name = "adapter_config.json" if kind == "lora" else "config.json"
    config = json.loads((policy / name).read_text()) if (policy / name).exists() else {}
    (policy / name).write_text(json.dumps(config | {"auto_map": code}))
    stem = "adapter_model" if kind == "lora" else "pytorch_model"
    (policy / f"{stem}.bin").write_bytes(pickle.dumps(Bomb(mark)))
    seal(policy)  # whoever plants files writes their checksums too
    # With safetensors beside it the pickle is not looked at, and the weights are right.
    read = history._load(1)
    assert all((read[name] == weight).all() for name, weight in history._snapshots[1].items())
    # Without it, nothing is.
    for path in policy.glob("*.safetensors"):
        path.unlink()
    seal(policy)
    with pytest.raises(OSError, match="safetensors"):
        history._load(1)
    assert not mark.exists()


SECRET_KEYS = """
    api_key apiKey comet_api_key X-Api-Key WANDB_API_KEY openai_key key
    aws_secret_access_key token hub_token HF_TOKEN access-token password db_password
    Authorization client_secret credentials
"""
SETTINGS = """
    tokens special_tokens max_new_tokens eot_tokens added_tokens_overrides tokenizer_type
    bos_token eos_token pad_token image_token add_bos_token pose_split_on_token_ids
    template_thinking_key comet_experiment_key keep_policies monkey lora_target_modules
"""


def test_keys_that_name_secrets_and_keys_that_name_settings():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    named = {key for key in AxolotlInputConfig.model_fields if is_secret(key)}
    assert named == {"comet_api_key", "hf_use_auth_token"}  # the second is true or false
    assert [key for key in SECRET_KEYS.split() if not is_secret(key)] == []
    assert [key for key in [*SETTINGS.split(), ""] if is_secret(key)] == []


def test_secrets_are_left_out_at_any_depth():
    stays = {"hf_use_auth_token": True, "special_tokens": {"eos_token": "</s>"}, "tokens": ["<a>"]}
    config = stays | {
        "comet_api_key": "hidden-1",
        "password": 123456,
        "datasets": [{"path": "s3://b", "storage_options": {"key": "hidden-2", "anon": False}}],
        "headers": {"Authorization": {"scheme": "Bearer", "value": "hidden-3"}},
        "mlflow_tracking_uri": "https://me:hidden-4@tracker:5000/a?b=c@d",
        "proxy": "me:hidden-5@proxy:3128",
        "resume": None,
    }
    assert public(config) == stays | {
        "datasets": [{"path": "s3://b", "storage_options": {"anon": False}}],
        "headers": {},
        "mlflow_tracking_uri": "https://***@tracker:5000/a?***",
        "proxy": "***@proxy:3128",
        "resume": None,
    }


def test_run_json_has_what_is_set_and_no_secret():
    ids = [[1], [2], [3]]
    pairs = Pairs.from_table(
        make_table({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
    )
    method = Method(SeraConfig(), reference_free=False, per_token=False, total=3)
    config = {"base_model": "m", "revision": None, "comet": {"api_key": "x"}, "path": Path("p")}
    schedule = Schedule(method.sizes, batch_size=1, accumulation=1)
    described = describe_run(config, "dpo", 0.2, method, schedule, pairs, None, [2])
    assert described["config"] == {"base_model": "m", "comet": {}, "path": "p"}


SIGNED = "https://bucket.example.org/pairs.jsonl?X-Amz-Signature=planted-1&token=planted-2"


@pytest.mark.parametrize(
    "url",
    [
        *(SIGNED, SIGNED.replace("https", "s3"), SIGNED.replace("?", "?a/b=")),
        "https://me:planted@bucket.example.org/pairs.jsonl",
        "https://" + "planted" * 40 + "@bucket.example.org/pairs.jsonl",
        "https://bucket.example.org/pairs.jsonl#access_token=planted",
        "https://bucket.example.org/" + "deep/" * 50 + "pairs.jsonl?sig=planted",
    ],
)
def test_what_is_secret_in_a_url_is_in_no_message_source_or_run_json(url):
    config = {"datasets": [{"path": url, "data_files": [url]}], "tuple": (url,)}
    error = load_failure("datasets[0]", url, FileNotFoundError(f"403 for {url} (\u202e)"))
    shown = [
        *(quoted(url), quoted(url, 1000), quoted(url.encode()), quoted([url])),
        *(quoted(config, 1000), plain(f"GET {url} failed", 1000), str(error)),
        *(source_name("datasets", 0, url), json.dumps(public(config))),
    ]
    assert not [text for text in shown if "planted" in text]
    if len(url) < 200:
        assert source_name("datasets", 0, url) == "datasets[0] (pairs.jsonl)"
    assert "pairs.jsonl" in json.dumps(public(config))


def test_what_is_no_secret_is_shown_as_it_is_and_plain_text_with_its_escapes():
    for text in ("http://host:80/a@b mail me@host a: b@c <|user|> x org/model@main", "k:v", "/a/b"):
        assert without_credentials(text) == text
    assert quoted({"api_key": "planted", "a": 1, 2: ("x",)}) == "{'a': 1, 2: ('x',)}"
    assert plain('it\'s \\ "fine"\n\u202e\ud800é') == 'it\'s \\ "fine"\\n\\u202e\\ud800\\xe9'
    assert plain("x" * 100) == "x" * 60 + "..."
    for value in ("x" * 100, b"\xff" * 100, [["\u202e"] * 100], {"a": 10**100}):
        assert len(quoted(value)) <= 63
        assert quoted(value).isascii()


def test_a_secret_is_found_however_it_is_quoted():
    for text in (KEY, repr(KEY), json.dumps({"a": KEY})):
        assert "planted" not in without_secret(f"before {text} after", KEY)
    assert without_secret("nothing", "") == "nothing"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/tokenize", "/version", "/v1/load_lora_adapter", "/v1/completions"]
)
def test_no_error_has_the_key_that_a_server_sends_back(world, tmp_path, monkeypatch, path):
    monkeypatch.setenv(vllm.API_KEY, KEY)
    how = SamplingSettings(2, 1.0, 1.0, 4, 48, (2,), seed=3)
    with vllm_server(world.base, fail=path) as server:
        served = ([server.url], "", str(world.base), tmp_path, server.tokenizer, 99)
        sampling = VllmServerSampler(*served).sample([np.arange(2)], how)
        with pytest.raises(SamplingFailed) as failure:
            next(sampling)
    text = str(failure.value)
    assert "planted" not in text
    assert failure.value.__cause__ is None
    assert "\\x1b[2J\\x07Bearer *** second line" in text
    assert text.isprintable()


def test_neither_the_key_nor_a_password_of_the_url_is_in_the_error_of_a_wrong_server(
    world, tmp_path, monkeypatch
):
    monkeypatch.setenv(vllm.API_KEY, KEY)
    with vllm_server(world.base) as server:
        url = server.url.replace("//", "//me:hidden@")
        asked = ([url], "", "another/model", tmp_path, server.tokenizer, 99)
        with pytest.raises(SamplingFailed, match=r"at http://\*\*\*@127.* serves") as wrong:
            VllmServerSampler(*asked).check()
    # A key that cannot be sent is quoted by the HTTP library.
    monkeypatch.setenv(vllm.API_KEY, "one-planted\nkey")
    with pytest.raises(SamplingFailed, match="header") as unsent:
        VllmServerSampler(*asked).check()
    assert "planted" not in f"{wrong.value}{unsent.value}"


@pytest.mark.slow
def test_a_key_is_in_no_file_log_or_tracker_of_a_whole_run(
    base_config, train, world, monkeypatch, capfd, caplog
):
    monkeypatch.setenv(vllm.API_KEY, KEY)
    monkeypatch.setattr(samplers, "LOW_PRECISION_LIMIT", math.inf)  # it serves no policy at all
    base_config["sera"] |= {"sampler": "vllm-server"}
    base_config |= {"num_epochs": 2, **adapter()}
    with vllm_server(world.base) as server:
        result = train(base_config | {"vllm": {"port": server.port}})
    summary = json.loads((result.run / "iteration-02/summary.json").read_text())
    assert summary["sampler"].pop("nats_per_root_token") > 0
    report = {"name": "vllm-server", "version": "1 Bearer ***", "servers": {server.url: 24}}
    assert summary["sampler"] == report
    assert summary["pairs"]["bootstrapped_kept"] > 0
    said = "".join([*capfd.readouterr(), caplog.text])
    assert "kept sera-" in said  # the warning that the adapter was not unloaded
    for text in (said, json.dumps(result.history)):
        assert "planted" not in text
    for path in result.output.rglob("*"):
        assert path.is_dir() or b"planted" not in path.read_bytes(), path


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("\x1b[31mred\x1b[0m plain") == "red plain"
    assert printable("\x1b[2Jclear \x1b]0;title\x07") == "\\x1b[2Jclear \\x1b]0;title\\x07"
    assert printable("a\rb\nc\td\x00\x9b") == "a\\rb\\nc\td\\x00\\x9b"
    assert printable("\u202eturned \u200bhidden") == "\\u202eturned \\u200bhidden"
    assert printable("你好 wörld 🙂") == "你好 wörld 🙂"


def test_the_log_of_an_engine_is_shown_and_not_obeyed(tmp_path):
    printed = "\x1b[36mfine\x1b[0m\n\x1b[2J\x1b]0;mine\x07\nValueError: \x1b[5mno\x00\n"
    text = child.explain("RuntimeError: \x1b[2Ja\n  b\x07", printed, tmp_path / "log")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "stopped: RuntimeError: \\x1b[2Ja b\\x07." in text
    assert "  | fine\n  | \\x1b[2J\\x1b]0;mine\\x07\n" in text
    assert "first error in its log: ValueError: no\\x00" in text


def test_what_a_python_says_that_has_no_vllm_is_shown_and_not_obeyed(tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nprintf '\\033[2Jbroken\\007' >&2\nexit 1\n")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"\\x1b\[2Jbroken\\x07$"):
        child.find_vllm(str(path))


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        (b"\xff\xfe said first\n\nvllm 0.30.0+cpu\n", "0.30.0+cpu"),
        *((printed, None) for printed in (b"vllm\n", b"\xff\n", b"vllm \x1b[2J0.30\n")),
        *((printed, None) for printed in (b"vllm " + b"9" * 10**5, "vllm \u0663".encode(), b"")),
    ],
)
def test_the_version_of_vllm_is_what_looks_like_one(tmp_path, printed, version):
    path = tmp_path / "python"
    (tmp_path / "printed").write_bytes(printed)
    path.write_text(f"#!/bin/sh\ncat {tmp_path}/printed\n")
    path.chmod(0o755)
    if version:
        assert child.find_vllm(str(path)) == version
    else:
        with pytest.raises(RuntimeError, match=r"cannot be imported by .*: it says no version"):
            child.find_vllm(str(path))


def test_only_iterations_are_discarded_and_what_a_link_leads_to_stays(tmp_path):
    store, outside = RunStore(tmp_path / "out"), tmp_path / "outside"
    others = ["iteration-foo", "iteration-03.bak", "iteration-", "iteration-3", "iteration-\u0663"]
    for directory in [outside, *(store.root / name for name in ["iteration-02", *others])]:
        directory.mkdir(parents=True)
        (directory / "file").touch()
    (store.root / "iteration-04").write_text("a file")
    # An iteration that is a link, and one that has a link in it.
    (store.root / "iteration-117").symlink_to(outside)
    store.iteration(3).mkdir()
    (store.iteration(3) / "policy").symlink_to(outside)
    store.discard_after(2)
    assert {path.name for path in store.root.iterdir()} == {"iteration-02", "iteration-04", *others}
    assert (outside / "file").exists()
