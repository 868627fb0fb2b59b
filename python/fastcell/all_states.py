"""Every state of every step: what ``return_states=True`` gives.

h_t of a layer is its output. c_t is kept for the backward pass anyhow: here it becomes a result of
its own, whose gradient joins that which comes from the step after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import composite, transforms
from .double_backward import gradients_with_graph
from .engines import engine_of
from .plan import Config, Extras

_EXTRAS = len(Extras._fields)


def layer_with_cells(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    kernels: bool,
    gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """One LSTM layer: output, final states, and c of all steps, shaped as the output.

    ``kernels``: whether they take these tensors; ``gradient``: whether one may be wanted.
    """
    if not kernels:
        return _composite(config, input, hx, weights, batch_sizes, extras)
    if not gradient:
        output, states, _, cells = engine_of(input).with_cells(
            config, input, hx, weights, batch_sizes, extras, False
        )
        return output, tuple(states), cells
    hx = tuple(hx or ())
    output, h, c, cells = _LayerWithCells.apply(  # type: ignore[no-untyped-call]
        config, len(hx), batch_sizes, *extras, input, *hx, *weights
    )
    return output, (h, c), cells


def _composite(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    cells: list[Tensor] = []
    output, states = composite.sequence(config, input, hx, weights, batch_sizes, extras, cells)
    rows = torch.cat(cells, -1)
    if input.dim() == 2:
        return output, states, rows
    first, second = input.shape[:2]
    if config.batch_first:
        return output, states, rows.view(second, first, -1).transpose(0, 1)
    return output, states, rows.view(first, second, -1)


class _LayerWithCells(Function):
    """(input, *hx, *weights) -> (output, h_n, c_n, c of all steps)."""

    @staticmethod
    def forward(
        ctx: Any, config: Config, state_count: int, batch_sizes: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        extras, (input, *rest) = Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS:]
        hx, weights = rest[:state_count] or None, rest[state_count:]
        output, states, reserve, cells = engine_of(input).with_cells(
            config, input, hx, weights, batch_sizes, extras, True
        )
        ctx.config, ctx.state_count = config, state_count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, reserve, *tensors)
        return output, *states, cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        batch_sizes, reserve, *tensors = ctx.saved_tensors
        extras, (input, *rest) = Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS:]
        hx, weights = rest[: ctx.state_count] or None, rest[ctx.state_count :]
        needs = ctx.needs_input_grad[3 + _EXTRAS :]
        d_output, d_h, d_c, d_cells = grads
        if torch.is_grad_enabled() or transforms.transformed():
            count = 1 + ctx.state_count

            def outputs_of(*own: Tensor) -> tuple[Tensor, ...]:
                output, states, cells = _composite(
                    ctx.config, own[0], own[1:count] or None, own[count:], batch_sizes, extras
                )
                return output, *states, cells

            found = gradients_with_graph(outputs_of, (input, *rest), grads, needs)
        else:
            found = engine_of(input).backward(
                ctx.config, d_output, [d_h, d_c], input, hx, weights, batch_sizes, extras, reserve,
                needs, d_cells=d_cells,
            )  # fmt: skip
        return *(None,) * (3 + _EXTRAS), *found
