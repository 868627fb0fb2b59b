"""Which of torch's function transforms surround a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_TRANSFORM = torch._C._functorch.TransformType
_peek = torch._C._functorch.peek_interpreter_stack


def transformed() -> bool:
    """Whether any does: one of torch.func, or forward-mode differentiation."""
    return _peek() is not None or forward_ad._current_level >= 0


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return transformed() and gradient_levels() < 0


def gradient_levels() -> int:
    """Levels of torch.func's reverse mode around this call; -1 with any of forward mode."""
    if forward_ad._current_level >= 0:
        return -1
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    if any([kind not in (_TRANSFORM.Vmap, _TRANSFORM.Grad) for kind in kinds]):
        return -1
    return kinds.count(_TRANSFORM.Grad)
