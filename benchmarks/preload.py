"""What the fork server imports once, so that fresh processes start in a second."""

import axolotl.cli.train  # noqa: F401
import bitsandbytes  # noqa: F401
import trl.trainer.dpo_trainer  # noqa: F401

import sera_plugin.host.trainer  # noqa: F401
