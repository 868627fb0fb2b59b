"""What the sizes of a call's weights say about it, worked out once per set of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core
from .cells import delay_of, options_of, remembered_of, spec_of, weights_per_direction

Shapes = tuple[tuple[int, ...], ...]


class Config(NamedTuple):
    """The part of a call that is no tensor.

    ``products``: what the forward pass multiplies: ``"exact"`` (numbers of the call's dtype),
    ``"bfloat16"`` (rounded to that) or ``"int8"`` (quantized; the weights are given as integers,
    each matrix's scales behind the other weights of its layer and direction).
    """

    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    products: str = "exact"


class Extras(NamedTuple):
    """The tensors of a call that no gradient flows to; each may be None. L layers, D directions.

    ``dropout``: factors of the outputs between layers, (L-1, T, B, D*P) or packed (L-1, rows, D*P).
    ``recurrent``: factors of h_{t-1} in the recurrent products, (L*D, B, P). Factors of an input of
    16 bits may be, and drawn ones are, float32: 1/(1 - p) has no exact form in so few.
    ``reset``: bool, (T, B) or packed (rows,): where the states before a step are zero.
    ``seed``: int64, (1,): from which zoneout draws; without one it takes the expectation.
    """

    dropout: Tensor | None = None
    recurrent: Tensor | None = None
    reset: Tensor | None = None
    seed: Tensor | None = None


EXTRAS_SCHEMA = ", ".join(f"Tensor? {name}" for name in Extras._fields)
NO_EXTRAS = Extras()


class Plan(NamedTuple):
    """The kernels bound to a stack's sizes, and the sizes of what they return."""

    stack: Any  # _core.Stack
    stacked: int  # layers times directions
    width: int  # features of the output, of both directions
    state_sizes: tuple[int, ...]  # of h: P or H; of c: H


def plan_for(config: Config, input: Tensor, weights: Sequence[Tensor]) -> Plan:
    """The plan of a call; raises if the weights do not fit each other or the input."""
    shapes = tuple([w.shape for w in weights])
    return _plan(config, input.dtype is torch.float64, input.shape[-1], shapes)


def plan_for_symbolic(config: Config, input: Tensor, weights: Sequence[Tensor]) -> Plan:
    """``plan_for`` where sizes may be symbols: those of features and weights become constants."""
    shapes = tuple([tuple([int(n) for n in w.shape]) for w in weights])
    return _plan(config, input.dtype is torch.float64, int(input.shape[-1]), shapes)


def bound_stack(config: Config, input: Tensor, weights: Sequence[Tensor]) -> Any:
    """The kernels bound to the sizes of these tensors."""
    return plan_for(config, input, weights).stack


@lru_cache(maxsize=256)
def _plan(config: Config, float64: bool, input_size: int, shapes: Shapes) -> Plan:
    hidden, proj = _checked_sizes(config, input_size, shapes)
    directions = 2 if config.bidirectional else 1
    spec = spec_of(config.cell)
    stack = _core.Stack(
        spec.name, "float64" if float64 else "float32", config.products, input_size, hidden, proj,
        config.num_layers, directions, config.bias, options_of(config.cell), delay_of(config.cell),
    )  # fmt: skip
    output = proj or hidden
    sizes = (output, hidden)[: spec.states]
    return Plan(stack, config.num_layers * directions, directions * output, sizes)


def state_shapes(config: Config, plan: Plan, batch: Any) -> list[tuple[Any, ...]]:
    """Of the states of a call; ``batch`` may be a symbol."""
    rows = (remembered_of(config.cell) * batch, batch)
    return [(plan.stacked, n, size) for n, size in zip(rows, plan.state_sizes, strict=False)]


def _checked_sizes(config: Config, input_size: int, shapes: Shapes) -> tuple[int, int]:
    """(hidden, proj) of weights of these shapes, or an error that names the first wrong one."""
    spec = spec_of(config.cell)
    if config.num_layers < 1:
        raise ValueError(f"num_layers must be positive, got {config.num_layers}")
    directions = 2 if config.bidirectional else 1
    quantized = config.products == "int8"
    rows = spec.rows
    more = delay_of(config.cell) > 0
    plain = weights_per_direction(config.bias, False, quantized, rows) + more
    projected = weights_per_direction(config.bias, True, quantized, rows) + more
    each, rest = divmod(len(shapes), config.num_layers * directions)
    if rest or (each != plain and not (each == projected and spec.projection)):
        raise ValueError(
            f"{config.cell} with {config.num_layers} layer(s), {directions} direction(s) and "
            f"bias={config.bias} takes {plain} tensors per layer and direction"
            f"{f' ({projected} with a projection)' if spec.projection else ''}, got {len(shapes)}"
        )
    hidden = shapes[0][0] // spec.gates if shapes[0] else 0
    last = weights_per_direction(config.bias, True) - 1
    proj = shapes[last][0] if each > plain else 0
    if hidden == 0:
        raise ValueError(f"weights need at least one hidden unit, got shape {tuple(shapes[0])}")
    for i, (given, expected) in enumerate(
        zip(shapes, _expected_shapes(config, input_size, hidden, proj), strict=True)
    ):
        if given != expected:
            raise RuntimeError(
                f"weight {i} of {config.cell} has shape {tuple(given)}, expected {expected} for "
                f"input size {input_size} and hidden size {hidden}"
            )
    return hidden, proj


def _expected_shapes(
    config: Config, input_size: int, hidden: int, proj: int
) -> list[tuple[int, ...]]:
    spec = spec_of(config.cell)
    gates, parameters = spec.gates * hidden, spec.rows
    directions = 2 if config.bidirectional else 1
    output = proj or hidden
    shapes: list[tuple[int, ...]] = []
    for layer in range(config.num_layers):
        features = input_size if layer == 0 else directions * output
        recurrent = gates if spec.recurrent else spec.parameters
        one: list[tuple[int, ...]] = [(gates, features), (recurrent, output)]
        if config.bias:
            one += [(gates,), (gates,)]
        if proj:
            one += [(output, hidden)]
        if parameters:
            one += [(parameters, hidden)]
        if config.products == "int8":
            one += [(gates,), (gates,), *([(output,)] if proj else [])]
        if delay_of(config.cell):
            one += [(gates, output)]
        shapes += one * directions
    return shapes
