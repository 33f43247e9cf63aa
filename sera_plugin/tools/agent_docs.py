"""One page for coding agents: `axolotl sera agent-docs`, and docs/agents.md.

Keys, refusals and commands are read from the code that has them, so the page cannot go stale.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sera_plugin.config.host_keys import HOST_KEYS
from sera_plugin.config.sera import SeraConfig
from sera_plugin.host.keys import REFUSALS

_HEAD = """\
# rl: sera, for coding agents

`axolotl sera agent-docs` prints this page (the host's own `axolotl agent-docs` has fixed topics, to
which a plugin can add none). SeRA trains on preference pairs in iterations, one per
epoch: from the second on it keeps the pairs that the policy's implicit reward ranks best, and
adds pairs sampled from the policy. A YAML for `rl: dpo` becomes one for `rl: sera` by the lines
`plugins`, `rl` and `sera`; everything else in it stays. A whole one:

```yaml
base_model: mistralai/Mistral-7B-Instruct-v0.2
plugins:
  - sera_plugin.SeraPlugin
rl: sera
sera:
  selection_ratio: 0.7
  bootstrap_ratio: 0.3
datasets:
  - path: pairs.jsonl          # rows of prompt, chosen, rejected (text or messages)
    ds_type: json
num_epochs: 3                  # the iterations
sequence_len: 2048
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
optimizer: adamw_torch
bf16: true
output_dir: ./outputs/my-run
```

## In this order

1. `python -m sera_plugin plan config.yaml --json`: checks the YAML and the data without loading
   weights. Exit code 0: it fits, or there is no GPU here (then give `--gpu GIB`); 1: it does
   not fit into the GPU's memory; 2: the YAML or the data cannot be used, the last line says why.
2. `axolotl train config.yaml --launcher python`. With `auto_resume_from_checkpoints: true` in the
   YAML the same command continues after a crash.
3. `python -m sera_plugin report outputs/my-run --json`: the figures of a run, also of one that is
   going on.
4. `python -m sera_plugin eval outputs/my-run --prompts prompts.jsonl --judge judge.yaml --json`:
   win rates; with `--check checks.py:function` the share that passes; with `--rewards
   pairs.jsonl`, in place of prompts, how well its implicit rewards rank pairs.

`python -m sera_plugin COMMAND` is `axolotl sera COMMAND` without the host's banner on standard
output.

## Where results are

The policy is in `output_dir`: an adapter or whole weights. `output_dir/sera/` has `run.json`,
`report.html`, and per iteration `summary.json`, `offline.parquet`, `candidates.parquet` and
`bootstrapped.parquet`; run-directory.md has every column. Read `summary.json`: `pairs`,
`evaluation.accuracy` (of held-out pairs), `reward` (a `by_chance` below 0.05 means that it ranks
better than a coin), `lengths`. Write nothing there.

## How to read errors

A mistake ends the output with `Error: ` and a sentence that names the key or row, its value, what
is allowed and what to do. Do that. A traceback means a fault of the code; `SERA_TRACEBACK=1` shows
one for mistakes too. Warnings `dropped N row(s): REASON (FILE rows ...)`
name rows by their place from 0. Alarms in the log name the key to change (alarms.md). Exit codes
of `axolotl sera`: 0 done, 1 failed, 2 wrong usage; `axolotl train` ends with 1 whatever went
wrong.
"""


def text() -> str:
    """The page as Markdown."""
    return "\n".join([_HEAD, *_commands(), "", *_keys(), "", *_host_keys(), "", *_refused(), ""])


def _commands() -> Iterator[str]:
    from sera_plugin.cli import sera

    yield "## Commands\n\nEach has `--help`.\n"
    for name, command in sorted(sera.commands.items()):
        yield f"- `axolotl sera {name}`: {command.get_short_help_str(200)}"


def _keys() -> Iterator[str]:
    yield "## Keys inside `sera:`\n\nAny other is an error. With default, and what is allowed.\n"
    for name, field in SeraConfig.model_json_schema()["properties"].items():
        allowed = " or ".join(_allowed(field))
        default = "unset" if field["default"] is None else _written(field["default"])
        whole = " ".join(field["description"].split())
        meaning = whole if "enum" in field else _first_sentence(whole)
        yield f"- `{name}` ({default}; {allowed}): {meaning}"


def _allowed(field: Mapping[str, Any]) -> Iterator[str]:
    """What a key takes, from its JSON Schema."""
    for one in field.get("anyOf", [field]):
        limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
        bounds = [f"{sign} {one[key]:.12g}" for key, sign in limits.items() if key in one]
        if "enum" in one:
            yield ", ".join(map(str, one["enum"]))
        elif one.get("type") != "null":
            yield " ".join([one.get("type", "a block of keys"), *bounds])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _host_keys() -> Iterator[str]:
    yield "## Keys of the host that mean something of their own here\n"
    for keys, meaning in HOST_KEYS.items():
        yield f"- `{keys}`: {_first_sentence(meaning)}"


def _refused() -> Iterator[str]:
    yield "## Refused before a model is loaded\n"
    for refusal in REFUSALS:
        values = f" ({refusal.values})" if refusal.values else ""
        yield f"- `{refusal.keys}`{values}: {refusal.remedy.format(key='it')}."


def _first_sentence(meaning: str) -> str:
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", " ".join(meaning.split()))[0]
