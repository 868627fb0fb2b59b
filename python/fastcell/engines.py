"""Which engine runs a call: by the device of its input.

An engine is a module with ``forward``, ``with_cells``, ``backward``, ``new_reserve``, ``DTYPES``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda

# A meta tensor has no kernels to run; sizes are then the CPU's.
ENGINES: dict[str, Any] = {"cpu": cpu, "meta": cpu, "cuda": cuda}


def engine_of(input: Tensor) -> Any:
    """The engine for tensors where ``input`` is."""
    return ENGINES[input.device.type]


def why_no_kernels(device: torch.device) -> str:
    """What has no kernels where tensors are on this device; nothing where there are some."""
    if device.type not in ENGINES:
        return f"device type '{device.type}'"
    if device.type == "cuda" and not cuda.built():
        return "CUDA devices in this build, which was made without them"
    return ""
