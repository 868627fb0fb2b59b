"""From tensors to the CPU kernels and back: allocation, pointers, strides. No autograd."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import remembered_of, spec_of
from .cpu_time import strides, time_of
from .packing import dense, packed_weights
from .plan import (
    NO_EXTRAS,
    Config,
    Extras,
    bound_stack,
    plan_for,
    plan_for_symbolic,
    state_shapes,
)

__all__ = [
    "DTYPES", "Config", "backward", "bound_stack", "forward", "new_reserve", "with_cells",
]  # fmt: skip

# A thread keeps this much for its small calls: enough for a step of most layers, and its gradients.
_SCRATCH_BYTES = 1 << 20

DTYPES = (torch.float32, torch.float64)
# How the kernels read input and write output of other dtypes, which they compute in float32.
_NO_POINTERS = (0,) * len(NO_EXTRAS)
_STORAGE = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _dense_rows(x: Tensor) -> Tensor:
    if x.is_neg():  # a view that only says that its numbers are negated
        x = x.resolve_neg()
    return x if x.stride()[-1] == 1 else x.contiguous()


def _new(like: Tensor, rows: int, batch: int, width: int) -> Tensor:
    # A third faster than new_empty.
    return like.new_empty_strided((rows, batch, width), (batch * width, width, 1))


_scratch = threading.local()


def scratch(size: int) -> tuple[int, Tensor]:
    """Memory for one call, as address and owner.

    The calling thread's own if it is little, which saves an allocation.
    """
    if size > _SCRATCH_BYTES:
        fresh = torch.empty(size, dtype=torch.uint8, device="cpu")
        return fresh.data_ptr(), fresh
    try:
        return _scratch.pointer, _scratch.memory
    except AttributeError:
        _scratch.memory = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
        _scratch.pointer = _scratch.memory.data_ptr()
        return _scratch.pointer, _scratch.memory


def forward(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
    output: Tensor | None = None,
    cells: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Runs the stack: (output, final states, what the backward call needs or None).

    ``batch_sizes``: of packed input, or of padded input the lengths of its samples. ``output``:
    where to write it, steps of a tensor that an earlier call could have returned. ``cells``: where
    to write c of all rows, (rows, D*H), of one layer, if nothing is kept.
    The arguments are taken as checked. Input and states may have 16 bits, then the results have
    too; the factors of ``extras`` are float32 then.
    """
    threads = torch.get_num_threads()
    storage = _STORAGE.get(x.dtype, "same")
    plan, packed_w = packed_weights(config, x, weights, threads)
    stack, count, width, sizes = plan
    x = _dense_rows(x)
    time = time_of(config, x, batch_sizes)
    rows, samples = time.rows, time.samples
    if output is not None:
        y = output
    elif x.dim() == 2:
        y = x.new_empty((rows, width))
    elif config.batch_first:
        y = _padded_like_output(x, width)
    else:
        y = _new(x, x.shape[0], samples, width)
    if rows == 0 and samples > 0:
        return _nothing(y, hx, state_shapes(config, plan, samples), keep)
    extras = time.of_rows(extras)

    like = x
    if storage != "same":
        like = x.new_empty(0, dtype=torch.float32)
        hx = None if hx is None else [h.float() for h in hx]
    h_final = _new(like, count, samples * remembered_of(config.cell), sizes[0])
    c_final = _new(like, count, samples, sizes[1]) if len(sizes) > 1 else None
    reserve = like.new_empty(rows * stack.reserve_row_elements) if keep else None
    workspace, _fresh = scratch(
        stack.forward_workspace(
            time.steps,
            time.batch,
            rows,
            keep,
            extras.dropout is not None,
            extras.recurrent is not None,
            storage != "same",
            threads,
        )
    )
    h = c = None
    if hx is not None:
        h = dense(hx[0])
        c = None if c_final is None else dense(hx[1])
    pointers, _kept = _pointers(extras)
    stack.forward(
        time.steps,
        time.batch,
        rows,
        time.offsets_pointer,
        time.padding,
        x.data_ptr(),
        *strides(config, x),
        0 if h is None else h.data_ptr(),
        0 if c is None else c.data_ptr(),
        y.data_ptr(),
        0 if cells is None else cells.data_ptr(),
        h_final.data_ptr(),
        0 if c_final is None else c_final.data_ptr(),
        pointers,
        packed_w.data_ptr(),
        0 if reserve is None else reserve.data_ptr(),
        workspace,
        storage,
        threads,
    )
    states = [h_final] if c_final is None else [h_final, c_final]
    return y, states if storage == "same" else [s.to(x.dtype) for s in states], reserve


def backward(
    config: Config,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    reserve: Tensor,
    needs: Sequence[bool],
    d_x: Tensor | None = None,
    add_to: Sequence[Tensor | None] | None = None,
    d_cells: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of [input, *hx, *weights]; None where ``needs`` says so.

    ``reserve`` is what ``forward`` kept for the other arguments. ``d_x``: where to write the
    input's gradient; ``add_to``: gradients of the weights, to be added to; ``d_cells``: that of
    ``cells``.
    """
    stack = plan_for(config, x, weights).stack
    hx = () if hx is None else [dense(h) for h in hx]
    weights = [dense(w) for w in weights]
    # (empty_like is quicker than new_empty, and of a contiguous tensor it is contiguous.)
    x = _dense_rows(x)
    like = (x if x.is_contiguous() else x.new_empty(x.shape), *hx, *weights)
    given = [d_x, *[None] * len(hx), *(add_to or [None] * len(weights))]
    grads = [
        (torch.empty_like(t) if into is None else into) if need else None
        for t, need, into in zip(like, needs, given, strict=True)
    ]
    d_x, d_hx, d_weights = grads[0], grads[1 : 1 + len(hx)], grads[1 + len(hx) :]
    d_y = None if grad_output is None else _dense_rows(grad_output)
    time = time_of(config, x, batch_sizes)
    steps, batch, rows = time.steps, time.batch, time.rows
    if rows == 0:
        _gradients_of_nothing(grads, d_hx, grad_states)
        return grads

    extras = time.of_rows(extras)
    pointers, _kept = _pointers(extras)
    cell_rows = None
    if d_cells is not None:
        turned = d_cells.transpose(0, 1) if config.batch_first and x.dim() == 3 else d_cells
        cell_rows = turned.reshape(-1, turned.shape[-1])
        if time.order is not None:
            cell_rows = cell_rows.index_select(0, time.padded_rows())
        cell_rows = dense(cell_rows)
    # None also stands for a second state that the cell does not have.
    d_states = [None if g is None else dense(g) for g in grad_states]
    d_h_final, d_c_final = (*d_states, None)[:2]
    h, c = (*hx, None, None)[:2]
    d_h, d_c = (*d_hx, None, None)[:2]
    threads = torch.get_num_threads()
    workspace, _fresh = scratch(
        stack.backward_workspace(
            steps, batch, rows, extras.dropout is not None, extras.recurrent is not None, threads
        )
    )
    stack.backward(
        steps,
        batch,
        rows,
        time.offsets_pointer,
        time.padding,
        x.data_ptr(),
        *strides(config, x),
        0 if d_x is None else d_x.data_ptr(),
        0 if d_y is None else d_y.data_ptr(),
        *strides(config, d_y),
        0 if h is None else h.data_ptr(),
        0 if c is None else c.data_ptr(),
        0 if d_h_final is None else d_h_final.data_ptr(),
        0 if d_c_final is None else d_c_final.data_ptr(),
        0 if d_h is None else d_h.data_ptr(),
        0 if d_c is None else d_c.data_ptr(),
        pointers,
        [w.data_ptr() for w in weights],
        [0 if g is None else g.data_ptr() for g in d_weights],
        reserve.data_ptr(),
        workspace,
        *strides(config, d_x),
        add_to is not None,
        0 if cell_rows is None else cell_rows.data_ptr(),
        threads,
    )
    return grads


def _pointers(extras: Extras) -> tuple[Sequence[int], Sequence[Tensor | None]]:
    """Addresses of dense copies, and these, which must live as long as the call."""
    if extras is NO_EXTRAS or not any([t is not None for t in extras]):
        return _NO_POINTERS, ()
    kept = [None if t is None else dense(t) for t in extras]
    return [0 if t is None else t.data_ptr() for t in kept], kept


def _gradients_of_nothing(
    grads: Sequence[Tensor | None],
    d_hx: Sequence[Tensor | None],
    grad_states: Sequence[Tensor | None],
) -> None:
    """Of a call that has no row: the kernels would write nothing."""
    for grad in grads:
        if grad is not None:
            grad.zero_()
    for grad, given in zip(d_hx, grad_states, strict=False):
        if grad is not None and given is not None:
            grad.copy_(given)


def _nothing(
    y: Tensor,
    hx: Sequence[Tensor] | None,
    shapes: Sequence[Sequence[int]],
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """What ``forward`` returns where all lengths are zero."""
    if hx is None:
        states = [y.new_zeros(shape) for shape in shapes]
    else:
        states = [h.clone(memory_format=torch.contiguous_format) for h in hx]
    return y.zero_(), states, y.new_empty(0) if keep else None


def with_cells(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """``forward`` of one layer, and c of all steps, in the input's layout."""
    time = time_of(config, x, batch_sizes)
    width = weights[0].shape[0] // spec_of(config.cell).gates * (2 if config.bidirectional else 1)
    if x.dim() == 2:
        cells = rows = x.new_empty((time.rows, width))
    elif config.batch_first:
        cells = _padded_like_output(x, width)
        rows = cells.transpose(0, 1).view(-1, width)
    else:
        cells = x.new_empty((*x.shape[:2], width))
        rows = cells.view(-1, width)
    own = rows if time.order is None else x.new_empty((time.rows, width))
    arguments = (config, x, hx, weights, batch_sizes, extras)
    if keep:
        output, states, reserve = forward(*arguments, True)
        assert reserve is not None
        places = plan_for(config, x, weights).stack.cells_at(time.rows)
        parts = [reserve[at : at + time.rows * n].view(time.rows, n) for at, n in places]
        torch.cat(parts, 1, out=own)
    else:
        output, states, reserve = forward(*arguments, False, cells=own)
    if own is not rows:
        rows.zero_().index_copy_(0, time.padded_rows(), own)
    return output, states, reserve, cells


def _padded_like_output(x: Tensor, width: int) -> Tensor:
    """For (B, T, .) input: memory of a (B, T, width) result."""
    # Time-major memory, as torch.nn's; no view, which would refuse in-place changes.
    batch, steps, _ = x.shape
    return x.new_empty_strided((batch, steps, width), (width, batch * width, 1))


def new_reserve(config: Config, input: Tensor, weights: Sequence[Tensor], rows: Any) -> Tensor:
    """Memory for what ``forward`` keeps of ``rows`` rows; sizes may be symbols."""
    stack = plan_for_symbolic(config, input, weights).stack
    return input.new_empty(rows * stack.reserve_row_elements)
