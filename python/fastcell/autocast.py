"""Turning autocast off where dtypes were chosen already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_autocast(input: Tensor) -> AbstractContextManager[Any]:
    """Here the caller has chosen the dtypes already."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def runs_without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` within ``without_autocast`` of the first tensor among its arguments."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with without_autocast(next(a for a in args if isinstance(a, Tensor))):
            return function(*args, **kwargs)

    return call
