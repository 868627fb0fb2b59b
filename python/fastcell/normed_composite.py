"""A layer with layer normalisation, step by step in torch's operations.

For devices without kernels, under torch.compile and transforms, and for derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .cells import spec_of

States = tuple[Tensor, ...]
_EPSILON = 1e-5  # as in csrc/cpu/norm.h


class Call(NamedTuple):
    """Of a layer and direction, what is no tensor to be differentiated."""

    cell: str
    sizes: tuple[int, ...]  # samples of each step
    reset: Tensor | None  # (rows,)
    reverse: bool
    lengths: Tensor | None  # of the samples, where rows are not packed
    dtype: torch.dtype  # of the rows
    cells: bool  # whether c of all steps is asked for, of a cell that has one

    @property
    def real(self) -> torch.dtype:
        """The dtype of a GPU's sums, norms and states between steps."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


def parts_of(cell: str) -> tuple[int, ...]:
    """Gates whose terms are normalised together."""
    return (2, 1) if cell == "gru" else (spec_of(cell).gates,)


def norm(x: Tensor, gain: Tensor, parts: Sequence[int], hidden: int) -> Tensor:
    widths = [n * hidden for n in parts]
    pieces = zip(torch.split(x, widths, -1), torch.split(gain, widths), strict=True)
    return torch.cat([layer_norm(a, g.shape, g, None, _EPSILON) for a, g in pieces], -1)


def layer(
    call: Call,
    rows: Tensor,
    hx: Sequence[Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    projection: Tensor | None,
    parameters: Tensor | None,
    norm_ih: Tensor,
    norm_hh: Tensor,
    norm_c: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer and direction: output rows, and the final states.

    ``hx``: each (B, .), None: zeros. With ``call.cells`` c of all steps, (rows, H), is one more
    state at the end.
    """
    parts = parts_of(call.cell)
    terms = norm(linear(rows, w_ih), norm_ih, parts, w_hh.shape[0] // sum(parts))
    terms = terms if b_ih is None else terms + b_ih
    return steps(call, terms, hx, w_hh, b_hh, projection, parameters, norm_hh, norm_c)


def steps(
    call: Call,
    terms: Tensor,
    hx: Sequence[Tensor | None],
    w_hh: Tensor,
    b_hh: Tensor | None,
    projection: Tensor | None,
    parameters: Tensor | None,
    norm_hh: Tensor,
    norm_c: Tensor | None,
) -> tuple[Tensor, States]:
    """The steps alone; ``terms``: the gates' input terms (rows, G*H)."""
    cell, sizes, reset, reverse, lengths, *_ = call
    parts, output = parts_of(cell), w_hh.shape[1]
    hidden = w_hh.shape[0] // sum(parts)
    given = torch.split(terms, list(sizes))
    anew = None if reset is None else torch.split(reset, list(sizes))
    state: States = tuple(
        [
            terms.new_zeros((sizes[0], width)) if h is None else h
            for h, width in zip(hx, (output, hidden), strict=False)
        ]
    )
    outputs, cells = [terms] * len(sizes), [terms] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n, x = sizes[t], given[t]
        now = tuple([s[:n] for s in state])
        if anew is not None:
            now = tuple([s.masked_fill(anew[t][:, None], 0) for s in now])
        u = norm(linear(now[0], w_hh), norm_hh, parts, hidden)
        u = u if b_hh is None else u + b_hh
        new: States
        if cell == "gru":
            (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u.chunk(3, -1)
            z = torch.sigmoid(x_z + u_z)
            candidate = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
            new = ((1 - z) * candidate + z * now[0],)
        else:
            assert norm_c is not None
            new = _lstm((x + u).chunk(sum(parts), -1), now[1], parameters, norm_c)
            if projection is not None:
                new = linear(new[0], projection), new[1]
        outputs[t], cells[t] = new[0], new[-1]
        if lengths is not None:
            alive = (t < lengths)[:, None]
            outputs[t], cells[t] = new[0].where(alive, 0), new[-1].where(alive, 0)
            new = tuple([a.where(alive, s) for a, s in zip(new, state, strict=True)])
        state = tuple([torch.cat((a, s[n:])) for a, s in zip(new, state, strict=True)])
    return torch.cat(outputs), (*state, torch.cat(cells)) if call.cells else state


def _lstm(
    a: Sequence[Tensor], before: Tensor, peepholes: Tensor | None, norm_c: Tensor
) -> tuple[Tensor, Tensor]:
    """h and c of the arguments of the gates i, f, g, o, or of i, g, o where f = 1 - i."""
    p = None if peepholes is None else peepholes.unbind(0)
    *forgetting, a_g, a_o = a
    gates = [torch.sigmoid(v if p is None else v + p[k] * before) for k, v in enumerate(forgetting)]
    i, f = gates if len(gates) == 2 else (gates[0], 1 - gates[0])
    c = f * before + i * torch.tanh(a_g)
    o = torch.sigmoid(a_o if p is None else a_o + p[-1] * c)
    m = layer_norm(c, (c.shape[-1],), norm_c[0], norm_c[1], _EPSILON)
    return o * torch.tanh(m), c
