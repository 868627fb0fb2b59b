"""The random bits of csrc/common/noise.h in torch operations, for the path without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _times(x: Tensor, factor: int) -> Tensor:
    # The high half apart: the product of two 32-bit numbers does not fit a signed 64-bit one.
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + ((x * high & 0xFFFF) << 16)) & _MASK


def _mix(x: Tensor) -> Tensor:
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def held(seed: Tensor, layer: int, state: int, rows: Tensor, units: int, p: float) -> Tensor:
    """Which units keep their state: bool (rows, units), each with probability ``p``.

    ``seed``: (1,) int64; ``layer``: index of layer and direction; ``state``: 0 for h, 1 for c;
    ``rows``: int64 numbers of the rows (t, b) in the order of time.
    """
    key = _mix(seed & _MASK)
    key = _mix(key ^ (seed >> 32 & _MASK))
    key = _mix(key ^ (2 * layer + state))
    key = _mix(key ^ (rows & _MASK))
    key = _mix(key ^ (rows >> 32))[:, None]
    unit = torch.arange(units, device=rows.device)
    drawn = _mix(_times(unit, 0x9E3779B9) ^ key)
    return drawn < (_MASK if p >= 1 else int(p * 2.0**32))
