"""`axolotl train` with `use_ray: true` for workers on a machine without an accelerator.

axolotl 0.19 asks Ray for a GPU per worker whatever `resources_per_worker` says, and Ray then takes
NCCL. Everything else is the real thing, over gloo.
"""

import sys
from typing import Any

import ray.train
from axolotl.cli.train import do_cli

_ScalingConfig = ray.train.ScalingConfig


def _on_cpus(use_gpu: bool, **keys: Any) -> Any:
    assert use_gpu  # else this file is not needed any more
    return _ScalingConfig(use_gpu=False, **keys)


if __name__ == "__main__":
    ray.train.ScalingConfig = _on_cpus
    do_cli(sys.argv[1])
