"""Turning autocast off where dtypes were chosen already."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(input: Tensor) -> AbstractContextManager[Any]:
    """Here the caller has chosen the dtypes already."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
