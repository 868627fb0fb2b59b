"""Padded batches whose samples end at lengths of their own.

The kernels read lengths where the input is: those on a GPU stay there, and nothing waits for the
device. For what takes rows alone (layer normalisation on a CPU, recomputation), and for lengths on
the CPU of input on a GPU, the rows that exist are picked out, run as packed ones, and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core, transforms

States = tuple[Tensor, ...]
# (rows that exist, states of the samples that have some or None, batch_sizes, reset of the rows or
# None) -> (output rows, states)
RunPacked = Callable[[Tensor, States | None, Tensor, Tensor | None], tuple[Tensor, States]]


def checked_lengths(lengths: Tensor, batch: int, steps: int, device: torch.device) -> Tensor:
    """``lengths`` as int64, after refusing what no lengths of a (steps, batch) input can be.

    Values on a GPU are not looked at: one above ``steps`` counts as ``steps`` there, one below 0 as
    0.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not one per sample, or (on the CPU) a value below 0 or above ``steps``.
        RuntimeError: neither on the CPU nor on ``device``, the input's.
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of integers, got {got}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")
    if not lengths.is_cpu and lengths.device != device:
        raise RuntimeError(
            f"lengths must be on the CPU or the input's device, got {lengths.device} and {device}"
        )
    lengths = lengths.long()  # in 8 bits a number of steps may not exist
    values = values_of(lengths)
    if values and (min(values) < 0 or max(values) > steps):
        raise ValueError(
            f"lengths must be from 0 to {steps} steps, got {min(values)} to {max(values)}"
        )
    return lengths


def values_of(lengths: Tensor) -> list[int] | None:
    """The numbers, where they can be read without waiting for a GPU or breaking a graph."""
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or not lengths.is_cpu:
        return None
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(lengths)
    if wrapped or torch._C._get_tracing_state() is not None:
        return None
    values: list[int] = lengths.tolist()
    return values


class _Rows(NamedTuple):
    """Of a padded batch: the rows that exist, in a packed sequence's order."""

    rows: Tensor  # of the input as one matrix
    batch_sizes: Tensor
    order: Tensor  # of the samples that have steps
    rank: Tensor | None  # of each sample in that order, if all have some


def _rows(lengths: Tensor, steps: int, batch_first: bool) -> _Rows:
    batch = lengths.shape[0]
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        ordered, order = torch.sort(lengths, descending=True, stable=True)
        some = int((ordered > 0).sum())
        order, ordered = order[:some], ordered[:some]
        alive = torch.arange(steps, device="cpu")[:, None] < ordered
        step, rank = alive.nonzero(as_tuple=True)
        sizes = alive.sum(1)
        sample = order[rank]
        rows = sample * steps + step if batch_first else step * batch + sample
        return _Rows(rows, sizes[sizes > 0], order, order.argsort() if some == batch else None)
    lengths = lengths.contiguous()
    values = lengths.tolist()
    some = batch - values.count(0)
    order, rank = torch.empty_like(lengths), torch.empty_like(lengths)
    sizes, rows = lengths.new_empty(max(values)), lengths.new_empty(sum(values))
    _core.ragged_rows(
        steps, batch, lengths.data_ptr(), batch_first, order.data_ptr(), rank.data_ptr(),
        sizes.data_ptr(), rows.data_ptr(),
    )  # fmt: skip
    return _Rows(rows, sizes, order[:some], rank if some == batch else None)


def run_ragged(
    input: Tensor,
    states: Sequence[Tensor] | None,
    lengths: Tensor,
    batch_first: bool,
    reset: Tensor | None,
    run: RunPacked,
) -> tuple[Tensor, States]:
    """A padded batch by way of its packed rows; output is zero behind each sample's end.

    ``states``: (L*D, B, .) each, which a sample without steps keeps, or None for zeros; ``reset``:
    (T, B).
    """
    first, second, features = input.shape
    steps, batch = (second, first) if batch_first else (first, second)
    rows, batch_sizes, order, rank = _rows(lengths, steps, batch_first)
    if reset is not None:
        at = rows % steps * batch + rows // steps if batch_first else rows
        reset = reset.reshape(-1)[at.to(reset.device)]
    rows, order = rows.to(input.device), order.to(input.device)
    output, finals = run(
        take_rows(input.reshape(first * second, features), rows),
        None if states is None else tuple([state.index_select(1, order) for state in states]),
        batch_sizes,
        reset,
    )
    padded = put_rows(output, rows, first * second).view(first, second, -1)
    if rank is not None:
        rank = rank.to(input.device)
        return padded, tuple([f.index_select(1, rank) for f in finals])
    if states is None:
        states = [f.new_zeros((f.shape[0], batch, f.shape[2])) for f in finals]
    return padded, tuple(
        [s.to(f.dtype).index_copy(1, order, f) for s, f in zip(states, finals, strict=True)]
    )


def take_rows(t: Tensor, rows: Tensor) -> Tensor:
    """``t[rows]`` for rows that differ, whose gradient is put and not added: far quicker."""
    if torch.compiler.is_compiling() or not t.requires_grad:
        return t.index_select(0, rows)
    taken: Tensor = _Take.apply(t, rows)  # type: ignore[no-untyped-call]
    return taken


def put_rows(t: Tensor, rows: Tensor, count: int) -> Tensor:
    """``count`` rows of zeros with ``t`` at ``rows``."""
    zeros = t.new_zeros((count, t.shape[-1]))
    if torch.compiler.is_compiling() or transforms.transformed():
        return zeros.index_copy(0, rows, t)
    return zeros.index_copy_(0, rows, t)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = t.shape[0]
        return t.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return put_rows(grad, rows, ctx.count), None
