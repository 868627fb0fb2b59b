"""Which engine runs a call: by the device of its input.

An engine is a module with ``forward``, ``backward``, ``new_reserve`` and ``DTYPES``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import cpu, cuda

# A meta tensor has no kernels to run; sizes are then the CPU's.
ENGINES: dict[str, Any] = {"cpu": cpu, "meta": cpu, "cuda": cuda}


def engine_of(input: Tensor) -> Any:
    """The engine for tensors where ``input`` is."""
    return ENGINES[input.device.type]
