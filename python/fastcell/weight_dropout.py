"""Dropout of weights (DropConnect).

On a CPU what is dropped follows from one number, drawn from torch's generator: the backward pass
draws again, which takes less time than keeping a mask of the weights' size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _core, transforms
from .cpu import DTYPES
from .operators import is_plain


def dropped(w: Tensor, probability: float) -> Tensor:
    """Elements of ``w`` zeroed with ``probability``, the others scaled by 1 / (1 - probability)."""
    if (
        torch.compiler.is_compiling()
        or not w.is_cpu
        or not is_plain(w)
        or w.dtype not in DTYPES
        or torch._C._get_tracing_state() is not None
        or transforms.transformed()
    ):
        return torch.nn.functional.dropout(w, probability)
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    result: Tensor = _Dropped.apply(w, probability, seed)  # type: ignore[no-untyped-call]
    return result


class _Dropped(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, probability: float, seed: int) -> Tensor:
        ctx.probability, ctx.seed = probability, seed
        return _drawn(w.resolve_neg().contiguous(), probability, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if transforms.transformed() or torch._C._functorch.is_legacy_batchedtensor(grad):
            ones = torch.ones(grad.shape, dtype=grad.dtype, device="cpu")
            return grad * _drawn(ones, ctx.probability, ctx.seed), None, None
        # The same factors; linear, so that this is its own rule for the next derivative.
        again: Tensor = _Dropped.apply(grad, ctx.probability, ctx.seed)  # type: ignore[no-untyped-call]
        return again, None, None


def _drawn(w: Tensor, probability: float, seed: int) -> Tensor:
    result = torch.empty_like(w)
    _core.drop(
        w.data_ptr(), result.data_ptr(), w.numel(), w.dtype is torch.float64, seed, probability
    )
    return result
