"""`axolotl sera schema`: what an editor is told of a YAML."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from sera_plugin.cli import sera
from sera_plugin.config.host_keys import HOST_KEYS
from sera_plugin.config.sera import SeraConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "example_yamls").glob("*.yaml"))


class Loader(yaml.SafeLoader):
    """1e-5 is a number, as in YAML 1.2, which editors read."""


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


@pytest.fixture(scope="module")
def schema() -> dict:
    from sera_plugin.tools.schema import config_schema

    return json.loads(json.dumps(config_schema()))


@pytest.fixture(scope="module")
def problem(schema):
    """What an editor underlines first: "path of the value: message", or nothing."""

    def problem(keys: dict) -> str:
        error = best_match(Draft202012Validator(schema).iter_errors(keys))
        return f"{'.'.join(map(str, error.absolute_path))}: {error.message}" if error else ""

    return problem


@pytest.fixture
def good() -> dict:
    return yaml.safe_load((ROOT / "example_yamls/mistral-7b-lora.yaml").read_text())


def test_every_shipped_yaml_and_the_hosts_own_are_right(problem):
    """Ours, and those that the host's package holds; they train in other ways."""
    import axolotl.integrations as host

    found = sorted(Path(next(iter(host.__path__))).glob("*/examples/*.yaml"))
    assert found
    assert FILES
    for path in FILES + found:
        assert problem(yaml.load(path.read_text(), Loader)) == "", path


def test_short_forms_of_the_block_are_right_too(problem, good):
    block = {"labeler": "function", "score_columns": ["id"], "function": "checks.py:score"}
    for keys in (block, {"prompts": {"path": "p.jsonl"}}, {"prompts": [{"path": "p.jsonl"}]}):
        assert problem({**good, "sera": keys, "apply_chat_template": True}) == ""


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        ({"sera": {"selecton_ratio": 0.7}}, "sera", "'selecton_ratio' was unexpected"),
        ({"sera": {"selection_ratio": 1.5}}, "sera.selection_ratio", "the maximum of 1"),
        ({"sera": {"selection_ratio": True}}, "sera.selection_ratio", "not of type 'number'"),
        ({"sera": {"temperature": 0}}, "sera.temperature", "equal to the minimum of 0"),
        ({"sera": {"candidates": 2.5}}, "sera.candidates", "2.5 is not of type 'integer'"),
        ({"sera": {"candidates": 0}}, "sera.candidates", "0 is less than the minimum of 1"),
        ({"sera": {"loss": "dp0"}}, "sera.loss", "'dp0' is not one of ['dpo', 'ipo', 'slic'"),
        ({"sera": {"keep_policies": "yes"}}, "sera.keep_policies", "not of type 'boolean'"),
        ({"sera": {"score_columns": "x"}}, "sera.score_columns", "'x' is not of type 'array'"),
        ({"micro_batch_sise": 2}, "", "'micro_batch_sise' was unexpected"),
        ({"beta": 0.3}, "", "'beta' was unexpected"),
        ({"selection_ratio": 0.5}, "", "'selection_ratio' was unexpected"),
        ({"micro_batch_size": "two"}, "micro_batch_size", "'two' is not valid under any"),
        ({"rl": "seraa", "sera": None}, "rl", "'seraa' is not "),
        ({"rl": "dpo"}, "rl", "'sera' was expected"),
        ({"plugins": []}, "plugins", "[] does not contain items matching the given schema"),
        ({"gradient_checkpointing": "of"}, "gradient_checkpointing", "'of' is not one of"),
        *(
            ({missing: None}, "", f"'{missing}' is a required property")
            for missing in ("plugins", "datasets", "base_model", "learning_rate")
        ),
    ],
)
def test_a_slip_is_underlined(change, where, said, good, problem):
    found = problem({key: value for key, value in (good | change).items() if value is not None})
    assert found.startswith(f"{where}: ")
    assert said in found


def test_plugins_decide_which_keys_are_known(good, problem):
    assert problem(good | {"their_key": 1})
    good["plugins"].append("axolotl.integrations.liger.LigerPlugin")
    assert not problem(good | {"liger_rope": True})
    assert problem(good | {"liger_rope": "always"})
    # A key may have its alias or its name.
    names = ("type_of_model", "model_type", "revision_of_model")
    assert not problem(good | dict.fromkeys(names, "x") | {"overrides_of_model_config": {}})
    good["plugins"].append("their_package.TheirPlugin")
    assert not problem(good | {"their_key": 1})
    # What is known still is.
    assert problem(good | {"their_key": 1, "sera": {"gama": 0.3}})
    # Without `rl: sera` the schema is the host's.
    del good["sera"], good["plugins"]
    assert not problem(good | {"rl": "dpo"})
    assert problem(good | {"rl": "dpo", "sera": {}})


def test_every_key_of_sera_is_explained_and_what_it_does_with_the_hosts(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    block, keys = schema["$defs"]["SeraConfig"], schema["properties"]
    assert block["additionalProperties"] is False
    for name, field in SeraConfig.model_fields.items():
        assert block["properties"][name]["description"] == " ".join(str(field.description).split())
    assert "`rl: sera`" in keys["sera"]["description"]
    for names, meaning in HOST_KEYS.items():
        for name in names.split(", "):
            if "." not in name:
                assert keys[name]["description"].endswith(f"With rl: sera: {meaning}")
    for name, said in (("group_by_length", "no effect: "), ("lisa_n_layers", "refused: the host")):
        assert f"With rl: sera: {said}" in keys[name]["description"]
    assert keys["sequence_len"]["description"].startswith("The maximum length")
    explained = [key for key in keys.values() if key.get("description")]
    assert len(explained) > 0.6 * len(keys)
    (items,) = [one["items"] for one in keys["plugins"]["anyOf"] if "items" in one]
    assert "sera_plugin.SeraPlugin" in items["examples"]


def test_it_is_printed_or_written_and_overwrites_nothing_but_itself(tmp_path, schema):
    path = tmp_path / "schema.json"
    command = partial(CliRunner().invoke, sera, ["schema", "--output", str(path)])
    assert json.loads(CliRunner().invoke(sera, ["schema"]).stdout) == schema
    for _ in range(2):
        written = command()
        assert (written.exit_code, written.stdout) == (0, f"{path}\n")
        assert json.loads(path.read_text()) == schema
    assert list(tmp_path.iterdir()) == [path]
    for text in ("base_model: x\n", "{}", "[]", '{"$comment": "mine"}'):
        path.write_text(text)
        result = command()
        assert result.exit_code == 2
        assert "is not a schema of this command" in result.output
        assert path.read_text() == text
