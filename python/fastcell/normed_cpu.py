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
from .cpu import row_offsets, scratch
from .double_backward import gradients_with_graph
from .packing import dense

_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def layer(
    cell: str,
    sizes: Sequence[int],
    reset: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    rows: Tensor,
    hx: Sequence[Tensor | None],
    *weights: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As ``normed_composite.layer``; rows whose samples have lengths are packed."""
    assert lengths is None
    tensors = (rows, *hx, *weights)
    given = cell, tuple(sizes), reset, reverse
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        output, *states = _Layer.apply(*given, *tensors)  # type: ignore[no-untyped-call]
    else:
        output, states, _ = _Call(*given, tensors).forward(keep=False)
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


class _Call:
    """Tensors of a call as the kernel takes them: (x, *hx, *weights of Norms)."""

    def __init__(
        self,
        cell: str,
        sizes: tuple[int, ...],
        reset: Tensor | None,
        reverse: bool,
        tensors: Sequence[Tensor | None],
    ) -> None:
        x, *rest = [t if t is None else dense(t) for t in tensors]
        assert x is not None
        self.x, self.sizes = x, sizes
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
        """Output rows, final states, and what ``backward`` needs."""
        rows = self.x.shape[0]
        output = self.x.new_empty(rows, self.output)
        widths = (self.output, self.hidden)[: len(self.hx)]
        states = [self.x.new_empty(self.sizes[0], width) for width in widths]
        kept = self.x.new_empty(rows, self.kernel.kept_elements) if keep else None
        self._run(states, output, kept, [])
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
        tensors = (self.x, *self.hx, *self.weights)
        found = [
            torch.empty_like(t) if need and t is not None else None
            for t, need in zip(tensors, needs, strict=True)
        ]
        d_x, *rest = found
        d_hx, d_weights = rest[: len(self.hx)], rest[len(self.hx) :]
        gradients = (d_output, *_two(d_states), *_two(d_hx), d_x, *_by_place(d_weights))
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
    """(x, *hx, *weights) -> (output, *final states)."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        sizes: tuple[int, ...],
        reset: Tensor | None,
        reverse: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        output, states, kept = _Call(cell, sizes, reset, reverse, tensors).forward(keep=True)
        ctx.call = cell, sizes, reverse
        ctx.set_materialize_grads(False)
        # A copy: the caller may change his output in place.
        ctx.save_for_backward(reset, kept, output.clone(), *tensors)
        return output, *states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        cell, sizes, reverse = ctx.call
        reset, kept, output, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        if (
            torch.is_grad_enabled()
            or transforms.transformed()
            or any([g is not None and _is_legacy_batched(g) for g in grads])
        ):

            def outputs_of(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
                count = spec_of(cell).states
                hx, weights = rest[:count], rest[count:]
                output, states = normed_composite.layer(
                    cell, sizes, reset, reverse, None, x, hx, *weights
                )
                return output, *states

            found = gradients_with_graph(outputs_of, tensors, grads, needs)
        else:
            call = _Call(cell, sizes, reset, reverse, tensors)
            found = call.backward(grads, needs, output, kept)
        return None, None, None, None, *found
