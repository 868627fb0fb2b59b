"""What the tests of torch's machinery share: a case as the flat arguments of fastcell::sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcell import ops
from support import Case, Problem

# Small: every cell, both layouts, packed, a projection, directions, layers, with and without bias.
SMALL = {"T": 3, "B": 2, "I": 3, "H": 4, "dtype": torch.float64}
CASES = [
    Case("rnn_tanh", **SMALL),
    Case("rnn_relu", bidirectional=True, batch_first=True, hx=False, **SMALL),
    Case("lstm", bias=False, **SMALL),
    Case("lstm", layers=2, bidirectional=True, projected=True, batch_first=True, **SMALL),
    Case("lstm", form="sorted", projected=True, hx=False, **SMALL),
    Case("gru", layers=2, form="sorted", bidirectional=True, **SMALL),
    Case("gru", hx=False, batch_first=True, **SMALL),
]


class Operands(NamedTuple):
    """The arguments of ``torch.ops.fastcell.sequence``, in order."""

    input: Tensor
    hx: list[Tensor]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    dropout: Tensor | None
    recurrent: Tensor | None
    reset: Tensor | None
    seed: Tensor | None
    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    products: str = "exact"

    @property
    def config(self) -> tuple[Any, ...]:
        return self[8:]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.input, *self.hx, *self.weights]

    def with_leaves(self, leaves: Sequence[Tensor]) -> Operands:
        count = 1 + len(self.hx)
        return self._replace(
            input=leaves[0], hx=list(leaves[1:count]), weights=list(leaves[count:])
        )


def operands(case: Case, *, masks: bool = False, requires_grad: bool = True) -> Operands:
    """The problem of ``case`` as operands; ``masks``: with dropout of one half between layers."""
    problem = Problem(case)
    x, batch_sizes = problem.to_caller(problem.x), None
    if case.packed:
        assert case.form == "sorted", "operands are in sorted order"
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.from_numpy(problem.lengths), batch_first=case.batch_first
        )
        x, batch_sizes = packed.data, packed.batch_sizes
    factors = None
    if masks:
        rows = (len(x),) if case.packed else (case.T, case.B)
        shape = (case.layers - 1, *rows, case.directions * case.output)
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(0, 2, shape, generator=generator).to(case.dtype) * 2
    found = Operands(
        x,
        [torch.tensor(state, dtype=case.dtype) for state in problem.states or ()],
        [torch.tensor(weight, dtype=case.dtype) for weight in problem.weights],
        batch_sizes,
        factors,
        None,
        None,
        None,
        case.cell,
        case.layers,
        case.bidirectional,
        case.bias,
        case.batch_first,
    )
    for leaf in found.leaves:
        leaf.requires_grad_(requires_grad)
    return found


def run_operator(o: Operands) -> tuple[Tensor, ...]:
    """Output and final states through the operator."""
    output, states = torch.ops.fastcell.sequence(*o)
    return output, *states


def run_kernel(o: Operands) -> tuple[Tensor, ...]:
    """Output and final states straight from the kernels."""
    assert ops.route(o.input, o.weights) == "kernel"
    return run_layer(o)


def run_layer(o: Operands) -> tuple[Tensor, ...]:
    """Output and final states as a layer's call has them, on the path that it chooses."""
    assert o.dropout is None
    output, states = ops.sequence(
        o.cell,
        o.input,
        o.hx or None,
        o.weights,
        o.batch_sizes,
        num_layers=o.num_layers,
        bidirectional=o.bidirectional,
        bias=o.bias,
        batch_first=o.batch_first,
        dropout=0.0,
        training=True,
    )
    return output, *states


def as_function(run: Callable[[Operands], Any], o: Operands) -> Callable[..., Any]:
    """``run`` as a function of the operands' leaves."""
    return lambda *leaves: run(o.with_leaves(leaves))
