"""`axolotl train` under FSDP2 for processes on a machine without an accelerator.

axolotl 0.19 asks for a mesh of CUDA devices, whatever there is, and accelerate 1.13 knows FSDP on
accelerators alone. Everything behind these two, from torch's `fully_shard` to the checkpoints of
the host, is the real thing over gloo.
"""

import os
import sys
from typing import Any

import axolotl.loaders.model as host
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from axolotl.cli.train import do_cli

_init = AcceleratorState.__init__


def _init_on_cpu(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    # Without a mesh of the host accelerate shards over all processes, which is the same mesh.
    host.build_parallelism_config = lambda cfg: (None, None)
    AcceleratorState.__init__ = _init_on_cpu
    do_cli(sys.argv[1])
