"""JSON Schema of a whole Axolotl configuration with SeRA's keys: what an editor knows of a YAML.

The host's own `axolotl config-schema` knows no plugin's keys, gives up on one of its own types, and
leaves out the names by which its YAMLs mostly call four keys.
"""

import importlib
import json
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl import integrations
from axolotl.integrations.base import BasePlugin
from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from sera_plugin.config.host_keys import HOST_KEYS
from sera_plugin.config.sera import SeraArgs
from sera_plugin.host.keys import REFUSALS, UNUSED
from sera_plugin.host.unused import OF_LM_EVAL
from sera_plugin.rundir.writing import write_text

#: Tells a schema of ours from any other file.
COMMENT = "Written by `axolotl sera schema`, which replaces it."
PLUGIN = "sera_plugin.SeraPlugin"


class _ForEditors(GenerateJsonSchema):
    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: an editor shows the key itself."""
        return False

    def enum_schema(self, schema: Any) -> JsonSchemaValue:
        """By name where members are objects (torch.int4), and then any other spelling too."""
        if all(isinstance(member.value, str | int | float) for member in schema["members"]):
            return super().enum_schema(schema)
        names = [member.name for member in schema["members"]]
        return {"anyOf": [{"enum": names}, {"type": "string"}]}


def config_schema() -> dict[str, Any]:
    """The schema, JSON Schema draft 2020-12.

    It holds the host's keys, SeRA's and those of the host's own plugins that can be imported here.
    A key that none of them has is an error, unless `plugins` names a plugin that is not among them:
    nobody knows its keys. `rl: sera` asks for the plugin's line, and `sera:` for `rl: sera`.
    """
    plugins: dict[str, type[BaseModel]] = {PLUGIN: SeraArgs, **dict(_host_plugins())}
    model = create_model("Configuration", __base__=(AxolotlInputConfig, *plugins.values()))
    schema = model.model_json_schema(schema_generator=_ForEditors)
    keys = schema["properties"]
    for name, field in model.model_fields.items():
        # The host takes a key by its alias and by its name.
        keys.setdefault(name, keys.get(str(field.alias)))
    for names, meaning in (HOST_KEYS | _dead_keys()).items():
        for name in names.split(", "):
            if name in keys:
                host = keys[name].get("description", "")
                keys[name]["description"] = f"{host}\n\nWith rl: sera: {meaning}".lstrip()
    del keys["sera_entries"]  # not for a YAML
    keys |= {name: {"type": "boolean", "description": "Read by lm-eval."} for name in OF_LM_EVAL}
    schema["$defs"]["RLType"]["enum"].append("sera")
    keys["plugins"]["anyOf"][0]["items"]["examples"] = sorted(plugins)  # offered, not demanded
    for definition in schema["$defs"].values():
        # An editor would show these instead of what the key says of itself.
        definition.pop("title", None)
        definition.pop("description", None)
    says_sera = {"properties": {"rl": {"const": "sera"}}, "required": ["rl"]}
    only_known = {"properties": {"plugins": {"items": {"enum": sorted(plugins)}}}}
    loads_plugin = {"properties": {"plugins": {"contains": {"const": PLUGIN}}}}
    no_other_key = {"properties": dict.fromkeys(keys, True), "additionalProperties": False}
    return {
        "$schema": _ForEditors.schema_dialect,
        "$comment": COMMENT,
        "type": "object",
        "properties": keys,
        "required": schema["required"],
        "$defs": schema["$defs"],
        "allOf": [
            {"if": says_sera, "then": {**loads_plugin, "required": ["plugins", "datasets"]}},
            {"if": {"required": ["sera"]}, "then": says_sera},
            {"if": only_known, "then": no_other_key},
        ],
    }


def _dead_keys() -> dict[str, str]:
    """What to say of the host's keys that never mean anything with `rl: sera`."""
    refused = {one.keys: one for one in REFUSALS if not (one.when or one.values)}
    said = {keys: f"refused: {one.remedy.format(key='it')}." for keys, one in refused.items()}
    return said | {keys: f"no effect: {why}." for keys, why in UNUSED.items()}


def _host_plugins() -> Iterator[tuple[str, type[BaseModel]]]:
    """The host's own plugins that have keys: as `plugins:` names them, and their keys' model."""
    for found in pkgutil.iter_modules(integrations.__path__, f"{integrations.__name__}."):
        try:
            members = list(vars(importlib.import_module(found.name)).items())
        except ImportError:  # it needs a library that is not installed
            continue
        for name, member in members:
            plugin = isinstance(member, type) and issubclass(member, BasePlugin)
            if plugin and (args := member().get_input_args()):
                yield f"{found.name}.{name}", pkgutil.resolve_name(args)


def write_schema(text: str, path: Path) -> None:
    """Write a schema to a file; FileExistsError if that holds anything but an earlier one."""
    if os.path.lexists(path):
        try:
            if not path.is_file():
                raise ValueError
            ours = json.loads(path.read_text(encoding="utf-8"))["$comment"] == COMMENT
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise FileExistsError(
                f"{path} exists and is not a schema of this command. Choose another path."
            )
    write_text(path, text + "\n")
