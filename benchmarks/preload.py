"""What the fork server imports once, so that fresh processes start in a second.

bitsandbytes 0.50 and torchao 0.17 ask for the GPU's compute capability while they are imported.
That would initialise CUDA, which does not survive a fork, so here the driver's library answers.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.device_interface import CudaInterface


def _capability(device: Any = None) -> tuple[int, int]:
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:  # an answer all the same: that CUDA is in use then is found out
        return _asked[0](device)
    pynvml.nvmlInit()
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
    return int(major), int(minor)


def _properties(device: Any = None) -> SimpleNamespace:
    major, minor = _capability()
    return SimpleNamespace(major=major, minor=minor)


_asked = torch.cuda.get_device_capability, CudaInterface.Worker.get_device_properties
torch.cuda.get_device_capability = _capability
CudaInterface.Worker.get_device_properties = staticmethod(_properties)  # type: ignore[assignment]
try:
    import sera_plugin.host.trainer  # noqa: F401
finally:
    torch.cuda.get_device_capability = _asked[0]
    CudaInterface.Worker.get_device_properties = staticmethod(_asked[1])  # type: ignore[assignment]
