"""`axolotl train` under FSDP2 or DeepSpeed for processes on a machine without an accelerator.

axolotl 0.19 asks for a mesh of CUDA devices, whatever there is, and accelerate 1.13 knows FSDP and
DeepSpeed on accelerators alone. Everything behind these two, from torch's `fully_shard` and
DeepSpeed's engine to the checkpoints of the host, is the real thing over gloo.
"""

import os
import sys
from typing import Any

import axolotl.loaders.model as host
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from axolotl.cli.train import do_cli
from transformers import training_args

_init, _init_process = AcceleratorState.__init__, PartialState.__init__


def _init_process_on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
    _init_process(self, *args, **kwargs)
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if asked and self.distributed_type == DistributedType.MULTI_CPU:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        # Over gloo torch 2.13 splits the output, and ZeRO-1's is a view of weights with gradients.
        deepspeed.comm.has_all_gather_into_tensor = lambda: False
        self.distributed_type = DistributedType.DEEPSPEED


def _init_on_cpu(
    self: Any, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **kwargs: Any
) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
    if deepspeed_plugin is not None and self.deepspeed_plugins is None:
        # As accelerate does on an accelerator.
        deepspeed_plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
        deepspeed_plugin.select(_from_accelerator_state=True)
        self.deepspeed_plugins = deepspeed_plugin


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Without a mesh of the host accelerate shards over all processes, which is the same mesh.
    host.build_parallelism_config = lambda cfg: (None, None)
    # It asks for a GPU that can.
    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState.__init__, AcceleratorState.__init__ = _init_process_on_cpu, _init_on_cpu
    do_cli(sys.argv[1])
