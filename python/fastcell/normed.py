"""LSTM and GRU with layer normalisation: a stack, layer by layer and direction by direction.

Source: J. Ba, J. Kiros, G. Hinton, "Layer normalization", arXiv:1607.06450 (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, normed_cpu, normed_cuda, transforms
from .cells import spec_of
from .engines import engine_of, why_no_kernels
from .normed_composite import Call, States
from .operators import is_plain

Run = Callable[..., tuple[Tensor, States]]


class Norms(NamedTuple):
    """The weights of a layer and direction."""

    w_ih: Tensor  # (G*H, I)
    w_hh: Tensor  # (G*H, P)
    b_ih: Tensor | None  # (G*H,)
    b_hh: Tensor | None
    projection: Tensor | None  # (P, H)
    parameters: Tensor | None  # the cell's vectors, (., H)
    norm_ih: Tensor  # (G*H,)
    norm_hh: Tensor
    norm_c: Tensor | None  # (2, H)


def weights_each(cell: str, bias: bool, projected: bool) -> int:
    """How many weights a layer and direction has."""
    spec = spec_of(cell)
    return 4 + 2 * bias + projected + (spec.parameters > 0) + (spec.states > 1)


def split(cell: str, weights: Sequence[Tensor], bias: bool, projected: bool) -> list[Norms]:
    """Layer by layer, from one flat list in the order of ``parameters()``."""
    spec, each = spec_of(cell), weights_each(cell, bias, projected)
    found = []
    for k in range(0, len(weights), each):
        own = iter(weights[k : k + each])
        there = (True, True, bias, bias, projected, spec.parameters > 0, True, True)
        values: list[Any] = [next(own) if some else None for some in (*there, spec.states > 1)]
        found.append(Norms(*values))
    return found


def stack(
    call: Call,
    rows: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Norms],
    directions: int,
    dropout: float,
    layer: Run,
) -> tuple[list[Tensor], list[Tensor], States]:
    """A stack on the rows of ``call``: of each layer the output rows, of each c of all steps.

    ``hx``: each (L*D, B, .); ``layer``: as :func:`engine` finds it, or that of
    ``normed_composite``. The final states come last.
    """
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    finals: list[States] = []
    for k in range(0, len(weights), directions):
        if k:
            rows = torch.nn.functional.dropout(rows, dropout)
        sides: list[Tensor] = []
        sides_c: list[Tensor] = []
        for d in range(directions):
            own = [None] * spec_of(call.cell).states if hx is None else [h[k + d] for h in hx]
            output, states = layer(call._replace(reverse=d == 1), rows, own, *weights[k + d])
            sides.append(output)
            if call.cells:
                sides_c.append(states[-1])
            finals.append(states[: len(own)])
        rows = sides[0] if directions == 1 else torch.cat(sides, -1)
        if call.cells:
            cells.append(torch.cat(sides_c, -1))
        outputs.append(rows)
    return outputs, cells, tuple([torch.stack(parts) for parts in zip(*finals, strict=True)])


def engine(rows: Tensor) -> Run | None:
    """The kernels' way to run a layer and direction; None where they cannot be called."""
    if torch.compiler.is_compiling() or not is_plain(rows) or transforms.transformed():
        return None
    if why_no_kernels(rows.device) or rows.dtype not in engine_of(rows).DTYPES:
        return None
    return normed_cuda.layer if engine_of(rows) is cuda else normed_cpu.layer
