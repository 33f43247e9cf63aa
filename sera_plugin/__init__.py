"""SeRA for Axolotl: self-reviewing and alignment with implicit reward margins.

`plugins: [sera_plugin.SeraPlugin]` and `rl: sera` in an Axolotl configuration train a policy for
T iterations, one per epoch. Between epochs the run keeps the preference pairs with the largest
margin of the policy's own implicit reward and adds pairs sampled from the policy itself (Ko et al.,
"SeRA: Self-Reviewing and Alignment of Large Language Models using Implicit Reward Margins", ICLR
2025).

The map; a room imports only rooms above it:

- `config`      the `sera:` block
- `rundir`      the run directory
- `algorithm`   read first: Algorithm 1 and all that it is made of, on arrays and tables
- `data`        rows to exact token ids
- `model`       log-probabilities, policies, losses, the step
- `sampling`    who answers
- `labeling`    who ranks answers
- `host`        Axolotl alone
- `tools`       what people run by hand
- `cli`         the commands

The names below are loaded on first use: the host imports this package while it reads the
configuration, and an import error there would surface as a confusing message about `rl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SeraPlugin", "__version__"]

if TYPE_CHECKING:
    from sera_plugin.host.plugin import SeraPlugin


def __getattr__(name: str) -> Any:
    if name == "SeraPlugin":
        from sera_plugin.host.plugin import SeraPlugin

        return SeraPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
