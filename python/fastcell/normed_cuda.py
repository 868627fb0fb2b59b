"""Layers with layer normalisation on a GPU: a layer and direction at a time.

The input terms of all steps are one product and one norm, in torch's operations. The steps are
kernels (csrc/cuda/normed.h), two launches each or, with a projection, three, all of one call out of
C++. Gradients of weights are products over the whole sequence again. For derivatives of derivatives
the steps run in torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import cuda, transforms
from .autocast import without_autocast
from .cells import spec_of
from .cuda_weights import pack, round_tf32
from .double_backward import gradients_with_graph
from .normed_composite import Call, States, norm, parts_of, steps
from .packing import dense

Given = Sequence[Tensor | None]
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def layer(
    call: Call, rows: Tensor, hx: Sequence[Tensor | None], *weights: Any
) -> tuple[Tensor, States]:
    """As ``normed_composite.layer``."""
    w_ih, w_hh, b_ih, b_hh, w_hr, parameters, norm_ih, norm_hh, norm_c = weights
    reset, lengths = (None if t is None else dense(t) for t in (call.reset, call.lengths))
    call = call._replace(reset=reset, lengths=lengths)
    with without_autocast(rows):
        sums = _Product.apply(rows, w_ih, call.real)  # type: ignore[no-untyped-call]
        terms = norm(sums, norm_ih.to(call.real), parts_of(call.cell), _hidden(call, w_hh))
        if b_ih is not None:
            terms = terms + b_ih.to(call.real)
        tensors = (terms, *(*hx, None)[:2], w_hh, w_hr, norm_hh, b_hh, norm_c, parameters)
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
            output, *final = _Steps.apply(call, *tensors)  # type: ignore[no-untyped-call]
        else:
            output, final, _ = _forward(call, tensors, keep=call.cells)
    return output, tuple(final)


def _hidden(call: Call, w_hh: Tensor) -> int:
    return w_hh.shape[0] // spec_of(call.cell).gates


class _Product(Function):
    """rows @ weight.t(), with result and sums in another dtype than that of both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, real: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return cuda.product(dense(rows), dense(weight).t(), real)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        with without_autocast(rows):
            grad = grad.to(rows.dtype)
            needs = ctx.needs_input_grad
            return grad @ weight if needs[0] else None, grad.t() @ rows if needs[1] else None, None


class _Steps(Function):
    """(terms, h, c, w_hh, w_hr, gain, bias, norm_c, parameters) -> (output, *states).

    States as those of ``layer``.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        output, final, kept = _forward(call, tensors, keep=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # A copy: the caller may change his output in place.
        ctx.save_for_backward(call.reset, call.lengths, output.clone(), *kept, *tensors)
        return output, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        reset, lengths, *saved = ctx.saved_tensors  # which refuses what has been changed
        call, needs = ctx.call._replace(reset=reset, lengths=lengths), ctx.needs_input_grad[1:]
        kept, tensors = saved[:_KEPT], saved[_KEPT:]
        again = torch.is_grad_enabled() or transforms.transformed()
        again = again or any([g is not None and _is_legacy_batched(g) for g in grads])
        with without_autocast(tensors[0]):
            found = (_differentiable if again else _backward)(call, tensors, kept, grads, needs)
        return None, *[g if need else None for g, need in zip(found, needs, strict=True)]


class _Run:
    """The launches of a pass: plan, packed weights and what passes from step to step."""

    def __init__(self, call: Call, w_hh: Tensor, w_hr: Tensor | None, backward: bool) -> None:
        self.call, self.device = call, w_hh.device
        self.hidden, self.output = _hidden(call, w_hh), w_hh.shape[1]
        self.batch, index = call.sizes[0], w_hh.device.index or 0
        products = cuda.products_of(call.dtype, index)
        self.plan = cuda.device_code.CudaNormedPlan(
            index, call.cell, products, backward, len(call.sizes), self.batch, self.hidden,
            0 if w_hr is None else self.output,
        )  # fmt: skip
        self.weights: list[Tensor] = []
        self.operands: list[Tensor] = []  # of each product
        matrices = [dense(w) for w in (w_hh, w_hr) if w is not None]
        for matrix, (samples, width, columns) in zip(matrices, self.plan.products, strict=True):
            multiplied = matrix.t() if backward else matrix
            self.weights.append(pack(multiplied[None], width, columns, products))
            self.operands.append(w_hh.new_zeros((samples, width)))
        sums = self.hidden if backward else w_hh.shape[0]
        self.sums = w_hh.new_empty((self.batch, sums), dtype=call.real)
        self.tf32 = products == "tf32"

    def begin(self, given: Given, states: int) -> list[Tensor]:
        """States, or their gradients, as the steps carry them."""
        real, widths = self.call.real, (self.output, self.hidden)
        return [
            torch.zeros((self.batch, width), dtype=real, device=self.device)
            if t is None
            else t.to(real, copy=True, memory_format=torch.contiguous_format)
            for t, width in zip(given[:states], widths, strict=False)
        ]

    def run(self, **tensors: Tensor | None) -> None:
        """``tensors``: of csrc/cuda/normed_step.h, by name."""
        tensors |= {
            "lengths": self.call.lengths, "reset": self.call.reset, "sums": self.sums,
            **dict(zip(("operand", "projected"), self.operands, strict=False)),
        }  # fmt: skip
        w_hh, w_hr = (*[w.data_ptr() for w in self.weights], 0)[:2]
        pointers = [tensors.get(name) for name in _POINTERS]
        self.plan.run(
            cuda.stream_of(self.device), self.call.reverse, self.call.sizes, w_hh, w_hr,
            [0 if t is None else t.data_ptr() for t in pointers],
        )  # fmt: skip


_POINTERS = (
    "lengths", "reset", "terms", "gain", "bias", "cell_norm", "carry_h", "carry_c", "sums",
    "operand", "y", "normed", "gates", "cells", "scales", "state_h", "state_c", "d_y", "d_terms",
    "d_normed", "d_sums", "d_cell", "before", "parameters", "d_parameters",
    "d_cells", "projected", "cell_output", "d_output",
)  # fmt: skip
_KEPT = 5  # output, normed, gates, cells, scales


def _reals(call: Call, tensors: Given) -> list[Tensor | None]:
    """Vectors in the dtype of the cell's maths."""
    return [None if t is None else dense(t.to(call.real)) for t in tensors]


def _forward(
    call: Call, tensors: Given, keep: bool
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """(output, final states, what the backward pass needs)."""
    terms, h, c, w_hh, w_hr, *vectors = tensors
    assert terms is not None
    assert w_hh is not None
    gain, bias, cell_norm, parameters = _reals(call, vectors)
    states = 1 if cell_norm is None else 2
    run = _Run(call, w_hh, w_hr, backward=False)
    rows, hidden, output = terms.shape[0], run.hidden, run.output
    carry = run.begin((h, c), states)
    first = round_tf32(carry[0]) if run.tf32 else carry[0]
    run.operands[0][: run.batch, :output] = first
    y = terms.new_empty((rows, output), dtype=call.dtype)
    kept: list[Tensor | None] = [None] * (_KEPT - 1)
    if keep:
        norms = len(parts_of(call.cell)) + states - 1
        kept = [
            terms.new_empty(terms.shape),
            terms.new_empty((rows, 4 * hidden)),  # (a cell with fewer gates leaves room)
            terms.new_empty((2, rows, hidden)) if states > 1 else None,
            terms.new_empty((rows, norms)),
        ]
    if rows:
        run.run(
            terms=dense(terms), gain=gain, bias=bias, cell_norm=cell_norm, carry_h=carry[0],
            carry_c=carry[1] if states > 1 else None, y=y, normed=kept[0], gates=kept[1],
            cells=kept[2], scales=kept[3], parameters=parameters,
        )  # fmt: skip
    found = [state.to(call.dtype) for state in carry]
    if call.cells:
        assert kept[2] is not None
        found.append(kept[2][0].to(call.dtype, copy=True))
    return y, found, kept


def _backward(
    call: Call, tensors: Given, kept: Given, grads: Given, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``tensors``."""
    terms, h, c, w_hh, w_hr, *vectors = tensors
    assert terms is not None
    assert w_hh is not None
    gain, bias, cell_norm, parameters = _reals(call, vectors)
    states = 1 if cell_norm is None else 2
    y, normed, gates, cells, scales = kept
    assert normed is not None
    run = _Run(call, w_hh, w_hr, backward=True)
    rows, hidden, output = terms.shape[0], run.hidden, run.output
    carry = run.begin((*grads[1:], None), states)
    d_cells = grads[-1] if call.cells else None
    d_terms = torch.empty_like(terms, memory_format=torch.contiguous_format)
    d_normed = d_terms if states > 1 else torch.empty_like(d_terms)
    d_sums = torch.empty_like(d_terms, dtype=call.dtype)
    d_cell = terms.new_empty((rows, hidden)) if states > 1 else None
    before = w_hh.new_empty((rows, output))
    cell_output = d_output = None
    if w_hr is not None:
        cell_output, d_output = w_hh.new_empty((rows, hidden)), w_hh.new_empty((rows, output))
    d_parameters = None
    if parameters is not None:
        d_parameters = terms.new_empty((rows, parameters.numel()))
    if rows:
        run.run(
            gain=gain, bias=bias, cell_norm=cell_norm, carry_h=carry[0],
            carry_c=carry[1] if states > 1 else None, y=y, normed=normed, gates=gates,
            cells=cells, scales=scales, state_h=None if h is None else dense(h),
            state_c=None if c is None else dense(c.to(call.real)),
            d_y=None if grads[0] is None else dense(grads[0]), d_terms=d_terms, d_normed=d_normed,
            d_sums=d_sums, d_cell=d_cell, before=before, parameters=parameters,
            d_parameters=d_parameters,
            d_cells=None if d_cells is None else dense(d_cells.to(call.real)),
            cell_output=cell_output, d_output=d_output,
        )  # fmt: skip
    d_states = [
        None if t is None else d.to(call.dtype) for t, d in zip((h, c), carry, strict=False)
    ]
    d_w_hh = d_sums.t() @ before if needs[3] else None
    d_w_hr = None
    if d_output is not None and cell_output is not None and needs[4]:
        d_w_hr = d_output.t() @ cell_output
    d_gain = (d_normed * normed).sum(0) if needs[5] else None
    d_bias = d_normed.sum(0) if needs[6] else None
    d_norm_c = None
    if d_cell is not None and needs[7]:
        assert cells is not None
        d_norm_c = torch.stack(((d_cell * cells[1]).sum(0), d_cell.sum(0)))
    d_own = None
    if d_parameters is not None and parameters is not None and needs[8]:
        d_own = d_parameters.sum(0).view(parameters.shape)
    found = (d_gain, d_bias, d_norm_c, d_own)
    vectors = [None if d is None else d.to(call.dtype) for d in found]
    return [d_terms, *(*d_states, None)[:2], d_w_hh, d_w_hr, *vectors]


def _differentiable(
    call: Call, tensors: Given, _: Given, grads: Given, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same with a graph of their own, of the steps once more."""

    def outputs_of(*own: Tensor | None) -> Sequence[Tensor]:
        terms, h, c, w_hh, w_hr, gain, bias, norm_c, parameters = [
            None if t is None else t.to(call.real) for t in own
        ]
        assert terms is not None
        assert w_hh is not None
        assert gain is not None
        hx = (h, c)[: 1 if norm_c is None else 2]
        output, states = steps(call, terms, hx, w_hh, bias, w_hr, parameters, gain, norm_c)
        return [t.to(call.dtype) for t in (output, *states)]

    return gradients_with_graph(outputs_of, tensors, grads, needs)
