"""vmap of the kernel calls: a mapped input is more batch; mapped weights run one after another.

The rules take the flat arguments of the functions in ``autograd.py`` and the dimension along which
each is mapped, or None. What they call may itself be under further transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import delay_of, spec_of
from .plan import Config

Dims = Sequence[Any]
Call = Callable[..., Sequence[Tensor]]
# Where the batch is in a padded call's Extras: dropout, recurrent, reset, seed.
_EXTRAS: tuple[int | None, ...] = (2, 1, 1, None)
Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def forward(
    call: Call,
    size: int,
    in_dims: Dims,
    config: Config,
    state_count: int,
    batch_sizes: Tensor | None,
    *tensors: Any,
) -> Mapped:
    """``call`` (its first results: output and final states) mapped over ``size`` elements.

    ``tensors``: (*extras, input, *hx, *weights). With unmapped weights it is one call on a batch
    ``size`` times as large. Further results then belong to that whole batch: they come back
    unmapped.
    """
    args = (config, state_count, batch_sizes, *tensors)
    axis = 0 if config.batch_first else 1
    axes = (*_EXTRAS, axis, *[1] * state_count)  # where the batch is, of all that has one
    dims = in_dims[3:]
    weights_mapped = any([d is not None for d in dims[len(axes) :]])
    if batch_sizes is not None or weights_mapped or delay_of(config.cell) or not _foldable(dims):
        return _one_by_one(call, size, in_dims, args)
    folded = [
        t if a is None else _fold(t, d, size, a)
        for t, d, a in zip(tensors, dims, axes, strict=False)
    ]
    results = call(config, state_count, None, *folded, *tensors[len(axes) :])
    states = spec_of(config.cell).states
    return _unfold(results, (axis, *[1] * states, *[None] * (len(results) - 1 - states)), size)


def backward(
    call: Call,
    call_forward: Call,
    size: int,
    in_dims: Dims,
    config: Config,
    state_count: int,
    needs: Sequence[bool],
    batch_sizes: Tensor | None,
    *tensors: Any,
) -> Mapped:
    """The backward call, mapped; ``tensors``: (*extras, output, reserve, *gradients of output and
    states, input, *hx, *weights).

    Each element's own gradients of shared weights cannot come from one call, which sums them over
    its batch: the elements run one by one, and so does their forward call once more, since what
    it kept is that of the whole batch.
    """
    args = (config, state_count, needs, batch_sizes, *tensors)
    dims, kept = in_dims[4:], len(_EXTRAS)
    # Kept for each element, or none is mapped.
    if dims[kept + 1] is not None or dims[kept] is None or delay_of(config.cell):
        return _one_by_one(call, size, in_dims, args)
    grads = 1 + spec_of(config.cell).states
    axis = 0 if config.batch_first else 1
    axes = (*_EXTRAS, axis, None, axis, *[1] * (grads - 1), axis, *[1] * state_count)
    if any(needs[1 + state_count :]) or not _foldable(dims):

        def recompute(*one: Any) -> Sequence[Tensor]:
            config, state_count, needs, batch_sizes, *tensors = one
            extras, rest = tensors[:kept], tensors[kept + 2 :]
            output, *_, reserve = call_forward(
                config, state_count, batch_sizes, *extras, *rest[grads:]
            )
            return call(config, state_count, needs, batch_sizes, *extras, output, reserve, *rest)

        return _one_by_one(recompute, size, in_dims, args)

    folded = [
        t if a is None else _fold(t, d, size, a)
        for t, d, a in zip(tensors, dims, axes, strict=False)
    ]
    results = call(config, state_count, needs, None, *folded, *tensors[len(axes) :])
    wanted = [a for a, need in zip(axes[kept + 2 + grads :], needs, strict=False) if need]
    return _unfold(results, wanted, size)


def _foldable(dims: Dims) -> bool:
    """Whether of the extras nothing is mapped but what has a batch to fold that dimension into."""
    return all([a is not None or d is None for a, d in zip(_EXTRAS, dims, strict=False)])


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
