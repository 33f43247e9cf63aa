"""What the server of processes imports once, so that no run has to."""

import gc
import importlib

for _module in (
    "axolotl.cli.config",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.train",
    "benchmarks.claims.measure",
    "bitsandbytes",
    "peft.peft_model",
    "sera_plugin.tools.demo.base_model",
    "sera_plugin.host.plugin",
    "sera_plugin.tools.report.page",
    "sera_plugin.host.trainer",
    "trackio",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
):
    importlib.import_module(_module)
# The host collects garbage often, and each time would look through all that was imported.
gc.freeze()
