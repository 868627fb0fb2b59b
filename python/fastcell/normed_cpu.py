"""A layer with layer normalisation by the kernels of csrc/cpu/normed.h: tensors to pointers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _core, normed_composite, transforms
from .cells import spec_of
from .cpu import scratch
from .cpu_time import row_offsets
from .double_backward import gradients_with_graph
from .normed_composite import Call, States
from .packing import dense

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def layer(
    call: Call, rows: Tensor, hx: Sequence[Tensor | None], *weights: Tensor | None
) -> tuple[Tensor, States]:
    """As ``normed_composite.layer``; rows whose samples have lengths are packed."""
    assert call.lengths is None
    tensors = (rows, *hx, *weights)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        output, *states = _Layer.apply(call, *tensors)  # type: ignore[no-untyped-call]
    else:
        output, states, _ = _Run(call, tensors).forward(keep=call.cells)
    return output, tuple(states)


@lru_cache(maxsize=256)
def _kernel(
    cell: str,
    float64: bool,
    features: int,
    hidden: int,
    output: int,
    projected: bool,
    reverse: bool,
) -> Any:
    return _core.Normed(cell, float64, features, hidden, output, projected, reverse)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Run:
    """Tensors of a call as the kernel takes them: (x, *hx, *weights of Norms)."""

    def __init__(self, call: Call, tensors: Sequence[Tensor | None]) -> None:
        cell, sizes, reset, reverse, *_ = call
        x, *rest = [t if t is None else dense(t) for t in tensors]
        assert x is not None
        self.x, self.sizes, self.cells = x, sizes, call.cells
        spec = spec_of(cell)
        self.hx, self.weights = rest[: spec.states], rest[spec.states :]
        _, w_hh, _, _, projection, *_ = self.weights
        assert w_hh is not None
        self.output, self.hidden = w_hh.shape[1], w_hh.shape[0] // spec.gates
        self.reset = None if reset is None else dense(reset)
        float64 = x.dtype is torch.float64
        projected = projection is not None
        self.kernel = _kernel(
            cell, float64, x.shape[1], self.hidden, self.output, projected=projected,
            reverse=reverse,
        )  # fmt: skip
        # Steps of as many samples each need no table of their rows.
        ragged = sizes[0] != sizes[-1]
        self.offsets = row_offsets(torch.tensor(sizes, device="cpu")) if ragged else None

    def forward(self, keep: bool) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Output rows, final states (and c of all steps), and what ``backward`` needs."""
        rows = self.x.shape[0]
        output = self.x.new_empty(rows, self.output)
        widths = (self.output, self.hidden)[: len(self.hx)]
        states = [self.x.new_empty(self.sizes[0], width) for width in widths]
        kept = self.x.new_empty(rows, self.kernel.kept_elements) if keep else None
        self._run(states, output, kept, [])
        if self.cells:
            assert kept is not None
            at = self.kernel.cells_at
            states.append(kept[:, at : at + self.hidden].contiguous())
        return output, states, kept

    def backward(
        self,
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
        output: Tensor,
        kept: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of the tensors that there are and that ``needs`` asks for."""
        d_output, *d_states = [None if g is None else dense(g) for g in grads]
        d_cells = d_states.pop() if self.cells else None
        tensors = (self.x, *self.hx, *self.weights)
        found = [
            torch.empty_like(t) if need and t is not None else None
            for t, need in zip(tensors, needs, strict=True)
        ]
        d_x, *rest = found
        d_hx, d_weights = rest[: len(self.hx)], rest[len(self.hx) :]
        of_weights = _by_place(d_weights)
        gradients = (d_output, *_two(d_states), *_two(d_hx), d_x, *of_weights, d_cells)
        self._run((), output, kept, gradients)
        return found

    def _run(
        self,
        states: Sequence[Tensor],
        output: Tensor,
        kept: Tensor | None,
        gradients: Sequence[Tensor | None],
    ) -> None:
        steps, batch, rows = len(self.sizes), self.sizes[0], self.x.shape[0]
        threads = torch.get_num_threads()
        workspace, _fresh = scratch(
            self.kernel.workspace(steps, batch, rows, kept is not None, len(gradients) > 0, threads)
        )
        tensors = (
            self.offsets, self.x, *_by_place(self.weights), *_two(self.hx), *_two(states),
            self.reset, output, kept,
        )  # fmt: skip
        pointers = [*map(_pointer, tensors), workspace]
        self.kernel.run(steps, batch, rows, pointers, [_pointer(g) for g in gradients], threads)


def _two(states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*states, None, None)[:2]


def _by_place(weights: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """From the order of Norms to that of csrc/common/normed.h."""
    w_ih, w_hh, b_ih, b_hh, projection, parameters, norm_ih, norm_hh, norm_c = weights
    return w_ih, w_hh, norm_ih, norm_hh, b_ih, b_hh, norm_c, projection, parameters


class _Layer(Function):
    """(x, *hx, *weights) -> (output, *final states, and with ``call.cells`` c of all steps)."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        output, states, kept = _Run(call, tensors).forward(keep=True)
        ctx.call = call._replace(reset=None)
        ctx.set_materialize_grads(False)
        # A copy: the caller may change his output in place.
        ctx.save_for_backward(call.reset, kept, output.clone(), *tensors)
        return output, *states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        reset, kept, output, *tensors = ctx.saved_tensors
        call, needs = ctx.call._replace(reset=reset), ctx.needs_input_grad[1:]
        if (
            torch.is_grad_enabled()
            or transforms.transformed()
            or any([g is not None and _is_legacy_batched(g) for g in grads])
        ):

            def outputs_of(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
                count = spec_of(call.cell).states
                output, states = normed_composite.layer(call, x, rest[:count], *rest[count:])
                return output, *states

            found = gradients_with_graph(outputs_of, tensors, grads, needs)
        else:
            found = _Run(call, tensors).backward(grads, needs, output, kept)
        return None, *found
