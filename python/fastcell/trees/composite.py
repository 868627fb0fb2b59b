"""Trees in plain, differentiable torch operations, level by level.

It serves where no kernel does: derivatives of derivatives, forward mode, torch.func.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..autocast import without_autocast
from .cells import SPECS, Config
from .forest import Schedule


class _Children(NamedTuple):
    """The children of a level's nodes.

    ``h``, ``c``: child-sum: those that there are, (children, H) each, and ``owner`` (children,),
    whose they are; N-ary: by position, (nodes, N, H), zero where there is none.
    """

    h: Tensor
    c: Tensor
    owner: Tensor | None


def run(
    config: Config, schedule: Schedule, input: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The states of all nodes, each (nodes, H)."""
    with without_autocast(input):
        return _run(config, schedule, input, weights)


def _run(
    config: Config, schedule: Schedule, input: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    w_ih, w_hh, *biases = weights
    terms = linear(input, w_ih, biases[0] + biases[1] if biases else None)
    count, hidden = SPECS[config.cell].states, w_hh.shape[1] // config.positions
    if input.shape[0] == 0:
        return (terms[:, :hidden],) * count
    zero = terms.new_zeros(hidden)
    order, level_offsets, child_offsets, children, positions = [
        t.tolist() for t in (schedule.order, schedule.level_offsets, schedule.child_offsets,
                             schedule.children, schedule.positions)
    ]  # fmt: skip

    # Rows of their own: to gather a level's children from all nodes so far, or from as many as
    # are open, would take quadratic time in a deep tree.
    states: list[tuple[Tensor, ...]] = [()] * len(order)

    def gather(nodes: list[int]) -> _Children | None:
        below = [children[child_offsets[n] : child_offsets[n + 1]] for n in nodes]
        if not any(below):
            return None
        if config.arity == 0:
            owner = [i for i, ks in enumerate(below) for _ in ks]
            found = [states[k] for ks in below for k in ks]
            h, c = stacked(found, (len(found), hidden))
            return _Children(h, c, torch.tensor(owner, device=input.device))
        at = [{positions[k]: k for k in ks} for ks in below]
        nothing = (zero,) * count
        found = [states[k[p]] if p in k else nothing for k in at for p in range(config.arity)]
        h, c = stacked(found, (len(nodes), config.arity, hidden))
        return _Children(h, c, None)

    def stacked(rows: list[tuple[Tensor, ...]], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        h = torch.stack([row[0] for row in rows]).reshape(shape)
        return h, h if count == 1 else torch.stack([row[1] for row in rows]).reshape(shape)

    sizes = [end - begin for begin, end in itertools.pairwise(level_offsets)]
    in_order = terms.index_select(0, schedule.order.to(input.device))
    for begin, rows in zip(level_offsets, torch.split(in_order, sizes), strict=False):
        nodes = order[begin : begin + len(rows)]
        new = _step(config, rows, w_hh, gather(nodes))
        for node, *state in zip(nodes, *[s.unbind(0) for s in new], strict=True):
            states[node] = tuple(state)
    return tuple(torch.stack([s[i] for s in states]) for i in range(count))


def _step(config: Config, x: Tensor, w_hh: Tensor, below: _Children | None) -> tuple[Tensor, ...]:
    """The states of some nodes; x: their input terms, biases included."""
    if config.cell != "tree_lstm":
        a = x if below is None else x + linear(_operand(x, below), w_hh)
        return (torch.tanh(a) if config.cell.endswith("tanh") else torch.relu(a),)
    i, f, g, o = x.chunk(4, 1)
    kept = None
    if below is not None:
        u_i, *u_f, u_g, u_o = w_hh.chunk(3 + config.positions, 0)
        seen = _operand(x, below)
        i, g, o = i + linear(seen, u_i), g + linear(seen, u_g), o + linear(seen, u_o)
        if below.owner is not None:
            forget = torch.sigmoid(f.index_select(0, below.owner) + linear(below.h, u_f[0]))
            kept = torch.zeros_like(g).index_add(0, below.owner, forget * below.c)
        else:
            forget = torch.sigmoid(f[:, None] + torch.stack([linear(seen, u) for u in u_f], 1))
            kept = (forget * below.c).sum(1)
    c = torch.sigmoid(i) * torch.tanh(g)
    if kept is not None:
        c = c + kept
    return torch.sigmoid(o) * torch.tanh(c), c


def _operand(x: Tensor, below: _Children) -> Tensor:
    """What a node's gates see of its children: (nodes, H) or (nodes, N*H)."""
    if below.owner is None:
        return below.h.flatten(1)
    zeros = below.h.new_zeros((x.shape[0], below.h.shape[1]))
    return zeros.index_add(0, below.owner, below.h)
