"""SeRA for Axolotl: self-reviewing and alignment with implicit reward margins.

`plugins: [sera_plugin.SeraPlugin]` and `rl: sera` in an Axolotl configuration train a policy for
T iterations, one per epoch. Between epochs the run keeps the preference pairs on which the
policy's own implicit reward is most decided and adds pairs sampled from the policy itself (Ko et
al., "SeRA: Self-Reviewing and Alignment of Large Language Models using Implicit Reward Margins",
ICLR 2025).

The map, in reading order:

- `iteration`   Algorithm 1 on one screen; `method`, `offline`   its records, its offline half
- `rewards`, `selection`, `bootstrap`, `length_control`   the method: pure functions of arrays
- `facts`, `label_noise`   what the dataset says of its pairs; labels swapped on purpose
- `labeling`, `labelers`   who ranks a prompt's samples: the reward, a model, a judge, the policy
- `losses`      the direct alignment losses: pure functions of log-probabilities
- `args`        the `sera:` block
- `rows`, `templates`, `fields`, `encoding`, `dataset`   from the host's rows to exact token ids,
  which `tokens` keeps in flat arrays
- `schedule`    steps of iterations of unequal length
- `logprobs`, `policies`, `adapters`, `scoring`   what needs the model: log-probabilities,
  snapshots, PEFT, scoring under any policy
- `forward`, `packing`, `budget`, `limits`   one forward pass, and how much is put into it
- `sampling`, `samplers`, `offload`   who samples, and room for an engine beside the training run
- `ranks`, `distributed`, `sharding`   the same in several processes
- `objective`, `gate`   one training step, and the check before an iteration's first
- `loop`        the iterations of one run in order
- `store`, `run`, `summary`, `alarms`   the run directory, what a run is, what an iteration did,
  what to worry about
- `checksums`, `checkpoints`, `journal`   what is whole, and where a run continues
- `trainer`     everything that touches the host's private seams
- `plugin`, `cli`   the host's public hooks
- `progress`    how far a phase is
- `planning`    what a run will take, before it starts
- `schema`, `convert`   what an editor knows of a YAML; a YAML that comes from LLaMA-Factory
- `report`      what a run did to its data, for people
- `judging`, `evaluation`   who says which answer is better; which policy that makes the best
- `demo`        a small world with a known true reward

The names below are loaded on first use: the host imports this package while it reads the
configuration, and an import error there would surface as a confusing message about `rl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SeraPlugin", "__version__"]

if TYPE_CHECKING:
    from sera_plugin.plugin import SeraPlugin


def __getattr__(name: str) -> Any:
    if name == "SeraPlugin":
        from sera_plugin.plugin import SeraPlugin

        return SeraPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
