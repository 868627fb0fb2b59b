"""vmap of the kernel calls: a mapped input is more batch; mapped weights run one after another.

The rules take the flat arguments of the functions in ``autograd.py`` and the dimension along which
each is mapped, or None. What they call may itself be under further transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS
from .plan import Config

Dims = Sequence[Any]
Call = Callable[..., Sequence[Tensor]]
Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def forward(
    call: Call,
    size: int,
    in_dims: Dims,
    config: Config,
    state_count: int,
    batch_sizes: Tensor | None,
    masks: Tensor | None,
    input: Tensor,
    *tensors: Tensor,
) -> Mapped:
    """``call`` (its first results: output and final states) mapped over ``size`` elements.

    With unmapped weights it is one call on a batch ``size`` times as large. Further results then
    belong to that whole batch: they come back unmapped.
    """
    args = (config, state_count, batch_sizes, masks, input, *tensors)
    if batch_sizes is not None or any([d is not None for d in in_dims[5 + state_count :]]):
        return _one_by_one(call, size, in_dims, args)
    axis = 0 if config.batch_first else 1
    hx, weights = tensors[:state_count], tensors[state_count:]
    results = call(
        config,
        state_count,
        None,
        _fold(masks, in_dims[3], size, 2),
        _fold(input, in_dims[4], size, axis),
        *[_fold(h, d, size, 1) for h, d in zip(hx, in_dims[5:], strict=False)],
        *weights,
    )
    states = CELLS[config.cell].states
    axes = (axis, *[1] * states, *[None] * (len(results) - 1 - states))
    return _unfold(results, axes, size)


def backward(
    call: Call,
    call_forward: Call,
    size: int,
    in_dims: Dims,
    config: Config,
    state_count: int,
    needs: Sequence[bool],
    batch_sizes: Tensor | None,
    masks: Tensor | None,
    output: Tensor | None,
    reserve: Tensor,
    *tensors: Any,
) -> Mapped:
    """The backward call, mapped.

    Each element's own gradients of shared weights cannot come from one call, which sums them over
    its batch: the elements run one by one, and so does their forward call once more, since what
    it kept is that of the whole batch.
    """
    args = (config, state_count, needs, batch_sizes, masks, output, reserve, *tensors)
    if in_dims[6] is not None or in_dims[5] is None:  # kept for each element, or none is mapped
        return _one_by_one(call, size, in_dims, args)
    grads = 1 + CELLS[config.cell].states
    if any(needs[1 + state_count :]):

        def recompute(*one: Any) -> Sequence[Tensor]:
            config, state_count, needs, batch_sizes, masks, _, _, *tensors = one
            output, *_, reserve = call_forward(
                config, state_count, batch_sizes, masks, *tensors[grads:]
            )
            return call(config, state_count, needs, batch_sizes, masks, output, reserve, *tensors)

        return _one_by_one(recompute, size, in_dims, args)

    axis = 0 if config.batch_first else 1
    # Of (gradients of output and states, input, *hx): where the batch is in each.
    axes = (axis, *[1] * (grads - 1), axis, *[1] * state_count)
    folded = [_fold(t, d, size, a) for t, d, a in zip(tensors, in_dims[7:], axes, strict=False)]
    results = call(
        config,
        state_count,
        needs,
        None,
        _fold(masks, in_dims[4], size, 2),
        _fold(output, in_dims[5], size, axis),
        reserve,
        *folded,
        *tensors[len(folded) :],
    )
    wanted = [a for a, need in zip(axes[grads:], needs, strict=False) if need]
    return _unfold(results, wanted, size)


def _fold(t: Tensor | None, dim: int | None, size: int, axis: int) -> Any:
    """Merges the mapped dimension into the batch at ``axis``; repeats what is not mapped."""
    if t is None:
        return None
    t = t.unsqueeze(axis) if dim is None else t.movedim(dim, axis)
    shape = list(t.shape)
    shape[axis] = size
    t = t.expand(shape)
    return t.reshape(*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :])


def _unfold(results: Sequence[Tensor], axes: Sequence[int | None], size: int) -> Mapped:
    unfolded = [
        t if a is None else t.reshape(*t.shape[:a], size, t.shape[a] // size, *t.shape[a + 1 :])
        for t, a in zip(results, axes, strict=True)
    ]
    return tuple(unfolded), tuple(axes)


def _one_by_one(call: Call, size: int, in_dims: Dims, args: Sequence[Any]) -> Mapped:
    def one(i: int) -> Sequence[Tensor]:
        return call(
            *[
                a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                for a, d in zip(args, in_dims, strict=True)
            ]
        )

    results = tuple(
        torch.stack(parts) for parts in zip(*[one(i) for i in range(size)], strict=True)
    )
    return results, (0,) * len(results)
