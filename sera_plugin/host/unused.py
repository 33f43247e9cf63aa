"""Keys that do nothing, in sentences: those of `keys.UNUSED`, and those that nobody knows."""

import dataclasses
import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sera_plugin.config.block import closest
from sera_plugin.config.host_keys import HOST_KEYS
from sera_plugin.config.quoting import as_written
from sera_plugin.host.keys import ENTRY_OF_MESSAGES, ENTRY_UNUSED, MESSAGE_TYPES, REFUSALS, UNUSED
from sera_plugin.host.refused import entry_keys

#: How alike a key must be to be meant: `beta` is `rl_beta`, `eta_min` is nothing.
_ALIKE = 0.7
#: How the host's older YAMLs begin the keys of this block.
_PREFIXES = {"fsdp_config.": "fsdp_"}
#: Keys that never do anything, which nobody is advised to use.
NEVER = {key for one in REFUSALS if not (one.when or one.values) for key in one.keys.split(", ")}
NEVER |= {key for keys in UNUSED for key in keys.split(", ")}
#: Keys that no model of the host's has, and `axolotl lm-eval` reads from the YAML.
OF_LM_EVAL = ("apply_chat_template", "fewshot_as_multiturn")


def unused(cfg: Mapping[str, Any], entries: Mapping[str, Any]) -> Iterator[str]:
    """What to say of keys without effect, a sentence or two for each kind of them.

    A key that is off (false, 0, null) or at its default asks for nothing, and nothing is said.

    Args:
        cfg: the configuration before the host validates it, its plugins registered.
        entries: `datasets` and `test_datasets` as they were written.
    """
    models = known_models(cfg)
    known = _fields(models)
    for keys, why in UNUSED.items():
        named = [name for key in keys.split(", ") for name in _set(cfg, known, key)]
        yield from _no_effect(named, why)
    for where, key, close in _unknown(cfg, models, ""):
        yield _said(where, key, close)
    for key, listed in entries.items():
        for index, entry in enumerate(listed or ()):
            yield from _unused_of_entry(f"{key}[{index}].", entry)
    for index, entry in enumerate((cfg.get("sera") or {}).get("prompts") or ()):
        for key in entry.keys() - entry_keys():
            yield _said(f"sera.prompts[{index}].", key, None)


def known_models(cfg: Mapping[str, Any]) -> list[type[BaseModel]]:
    """The host's model of a YAML and those of the plugins that it names."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig

    listed = cfg.get("plugins") or ()
    plugins = PluginManager.get_instance().plugins.items()
    brought = [plugin.get_input_args() for name, plugin in plugins if name in listed]
    return [AxolotlInputConfig, *(pkgutil.resolve_name(args) for args in brought if args)]


def _unused_of_entry(where: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """A strategy of somebody's own may read what it likes."""
    from axolotl.prompt_strategies import dpo

    kind = entry.get("type")
    names = [module.name for module in pkgutil.iter_modules(dpo.__path__)]
    kind = kind if isinstance(kind, str) else None
    if kind is not None and kind.split(".")[0] not in names:
        return
    known = entry_keys()
    idle = dict(ENTRY_UNUSED)
    if kind not in MESSAGE_TYPES:
        idle[ENTRY_OF_MESSAGES] = (
            "only `type: chat_template.default` and `chat_template.argilla_chat` read it; to name "
            "columns of text, write a block of field names under `type:`"
        )
    elif MESSAGE_TYPES[kind] is None:
        idle["field_messages"] = f"with `type: {kind}` the answers hold the messages"
    if os.path.isfile(str(entry.get("path"))):
        idle["data_files"] = "`path` is a file itself"
    for keys, why in idle.items():
        yield from _no_effect([f"{where}{key}" for key in keys.split(", ") if entry.get(key)], why)
    for key in entry:
        if key not in known:
            yield _said(where, key, None)  # one that resembles another is refused


def _no_effect(named: list[str], why: str) -> Iterator[str]:
    has, them = ("has", "it") if len(named) == 1 else ("have", "them")
    if named:
        yield f"{', '.join(named)} {has} no effect: {why}. Remove {them}."


def _said(where: str, key: object, close: str | None) -> str:
    what = "is not a key of the host or of a plugin under `plugins:`, and does nothing"
    return f"{where}{as_written(key)} {what}. " + (
        f"Did you mean `{close}`?" if close else "Remove it."
    )


def _set(cfg: Mapping[str, Any], fields: Mapping[str, FieldInfo], key: str) -> Iterator[str]:
    """The key, or each of the block that it stands for, where it asks for something."""
    block, _, inner = key.partition(".")
    field = fields.get(block)
    if not inner:
        if _asks(cfg.get(block), field):
            yield key
        return
    given, known = cfg.get(block), _fields(_models(field))
    for name, value in given.items() if isinstance(given, Mapping) else ():
        meant = name == inner or (inner == "*" and name in known and not _is_read(block, name))
        if meant and _asks(value, known.get(name)):
            yield f"{block}.{name}"


def _is_read(block: str, name: str) -> bool:
    return any(f"{block}.{name}" in keys.split(", ") for keys in HOST_KEYS)


def _asks(value: Any, field: FieldInfo | None) -> bool:
    return bool(value) and (field is None or value != field.get_default(call_default_factory=True))


def _unknown(
    block: Mapping[Any, Any], models: Iterable[type[BaseModel]], where: str
) -> Iterator[tuple[str, object, str | None]]:
    """Block and name of each key that the host would drop, and the key that is meant, if any."""
    known = _fields(models)
    for key, value in block.items():
        field = known.get(str(key).removeprefix(_PREFIXES.get(where, "")))
        if field is not None:
            if isinstance(value, Mapping) and (inner := _models(field)):
                yield from _unknown(value, inner, f"{where}{key}.")
        elif value is not None and not _is_ours(f"{where}{key}"):
            close = closest(str(key), [name for name in known if where + name not in NEVER], _ALIKE)
            yield where, key, close


def _is_ours(key: str) -> bool:
    """Of the block, of the tables, or a command's option, which the host puts beside the keys."""
    from axolotl.cli.args import PreprocessCliArgs, TrainerCliArgs

    commands = (PreprocessCliArgs, TrainerCliArgs)
    options = {option.name for command in commands for option in dataclasses.fields(command)}
    return key in {"sera", *options, *NEVER, *OF_LM_EVAL}


def _fields(models: Iterable[type[BaseModel]]) -> dict[str, FieldInfo]:
    """Fields by every name that a YAML may have for them."""
    found: dict[str, FieldInfo] = {}
    for model in models:
        for name, field in model.model_fields.items():
            aliases = getattr(field.validation_alias, "choices", [field.validation_alias])
            found |= {str(each): field for each in (name, *aliases) if each}
    return found


def _models(field: FieldInfo | None) -> list[type[BaseModel]]:
    """The models of a block, none where the host takes any key in it."""
    kind = field.annotation if field else None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]
