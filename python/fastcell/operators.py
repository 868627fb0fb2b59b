"""The kernels as operators of torch.library: what torch.compile, torch.export and fake tensors see.

``fastcell::sequence_forward`` and ``fastcell::sequence_backward`` are the two kernel calls, each
with a schema and a fake kernel that knows the shapes of the results. They carry no autograd of
their own: ``autograd.py`` holds it, once, for these operators and for direct calls. The operator
that programs see is ``fastcell::sequence`` (``ops.py``); it calls these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import operator_checks
from .engines import engine_of
from .plan import EXTRAS_SCHEMA, Config, Extras, plan_for_symbolic, state_shapes

PLAIN = (Tensor, Parameter)
DEVICES = ("cpu", "cuda")  # whose memory the kernels can read
CONFIG_SCHEMA = (
    "str cell, int num_layers, bool bidirectional, bool bias, bool batch_first, str products"
)
_dispatch_modes = torch._C._len_torch_dispatch_stack


def forward(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """The kernels' forward call, through the operator where torch must see one."""
    if is_plain(input):
        found: tuple[Tensor, Sequence[Tensor], Tensor | None] = engine_of(input).forward(
            config, input, hx, weights, batch_sizes, extras, keep
        )
        return found
    output, states, reserve = torch.ops.fastcell.sequence_forward(
        input, list(hx or ()), list(weights), batch_sizes, *extras, *config, keep
    )
    return output, states, reserve if keep else None


def backward(
    config: Config,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The kernels' backward call: gradients of [input, *hx, *weights], None where not needed."""
    if is_plain(input):
        grads: list[Tensor | None] = engine_of(input).backward(
            config,
            grad_output,
            grad_states,
            input,
            hx,
            weights,
            batch_sizes,
            extras,
            reserve,
            needs,
        )
        return grads
    tensors = (input, list(hx or ()), list(weights), batch_sizes, *extras, reserve)
    found = iter(
        torch.ops.fastcell.sequence_backward(
            grad_output, list(grad_states), *tensors, *config, list(needs)
        )
    )
    return [next(found) if need else None for need in needs]


def is_plain(input: Tensor) -> bool:
    """Whether the kernels can be called on this tensor without an operator in between."""
    return type(input) in PLAIN and input.device.type in DEVICES and not _dispatch_modes()


@torch.library.custom_op(
    "fastcell::sequence_forward",
    mutates_args=(),
    device_types=DEVICES,
    schema=(
        f"(Tensor input, Tensor[] hx, Tensor[] weights, Tensor? batch_sizes, {EXTRAS_SCHEMA}, "
        f"{CONFIG_SCHEMA}, bool keep) -> (Tensor, Tensor[], Tensor)"
    ),
)
def _sequence_forward(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: Tensor | None,
    recurrent: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    cell: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    products: str,
    keep: bool,
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    config = Config(cell, num_layers, bidirectional, bias, batch_first, products)
    extras = Extras(dropout, recurrent, reset, seed)
    operator_checks.check(config, input, hx, weights, batch_sizes, extras)
    output, states, reserve = engine_of(input).forward(
        config, input, hx or None, weights, batch_sizes, extras, keep
    )
    if reserve is None:
        return output, states, input.new_empty(0)
    if batch_sizes is not None and input.dim() == 3 and input.is_cpu:
        # What an operator returns has no size that numbers decide: room for all rows.
        kept, first = reserve, input.shape[0] * input.shape[1]
        reserve = engine_of(input).new_reserve(config, input, weights, first)
        reserve[: len(kept)] = kept
    return output, states, reserve


@_sequence_forward.register_fake
def _(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: Tensor | None,
    recurrent: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    cell: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    products: str,
    keep: bool,
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    config = Config(cell, num_layers, bidirectional, bias, batch_first, products)
    plan = plan_for_symbolic(config, input, weights)
    if input.dim() == 2:
        rows = input.shape[0]
        output = input.new_empty((rows, plan.width))
    else:
        first, second, _ = input.shape
        rows = first * second
        output = input.new_empty((first, second, plan.width))
        if batch_first:
            # As the kernel leaves it: time-major memory.
            output = input.new_empty((second, first, plan.width)).transpose(0, 1)
    if hx:
        states = [h.new_empty(h.shape) for h in hx]
    elif input.dim() == 3:
        batch: int | torch.SymInt = input.shape[0 if batch_first else 1]
        states = [input.new_empty(shape) for shape in state_shapes(config, plan, batch)]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
        states = [input.new_empty(shape) for shape in state_shapes(config, plan, batch)]
    if not keep:
        return output, states, input.new_empty(0)
    return output, states, engine_of(input).new_reserve(config, input, weights, rows)


@torch.library.custom_op(
    "fastcell::sequence_backward",
    mutates_args=(),
    device_types=DEVICES,
    schema=(
        "(Tensor? grad_output, Tensor?[] grad_states, Tensor input, Tensor[] hx, "
        f"Tensor[] weights, Tensor? batch_sizes, {EXTRAS_SCHEMA}, Tensor reserve, "
        f"{CONFIG_SCHEMA}, bool[] needs) -> Tensor[]"
    ),
)
def _sequence_backward(
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: Tensor | None,
    recurrent: Tensor | None,
    reset: Tensor | None,
    seed: Tensor | None,
    reserve: Tensor,
    cell: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    products: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    config = Config(cell, num_layers, bidirectional, bias, batch_first, products)
    extras = Extras(dropout, recurrent, reset, seed)
    operator_checks.check(config, input, hx, weights, batch_sizes, extras)
    operator_checks.check_backward(
        config, grad_output, grad_states, input, hx, weights, batch_sizes, reserve, needs
    )
    grads = engine_of(input).backward(
        config, grad_output, grad_states, input, hx or None, weights, batch_sizes, extras, reserve,
        needs,
    )  # fmt: skip
    return [g for g in grads if g is not None]


@_sequence_backward.register_fake
def _(
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return [
        t.new_empty(t.shape)
        for t, need in zip((input, *hx, *weights), rest[-1], strict=True)
        if need
    ]
