"""From tensors to the kernels for trees and back: allocation, pointers. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..cpu import scratch
from ..packing import dense
from .cells import SPECS, Config
from .forest import Forest


@lru_cache(maxsize=256)
def _bound(config: Config, dtype: torch.dtype, input_size: int, hidden_size: int) -> Any:
    name = str(dtype).removeprefix("torch.")
    return _core.Tree(config.cell, name, input_size, hidden_size, config.arity)


def kept_elements(config: Config, dtype: torch.dtype, input_size: int, hidden_size: int) -> int:
    """Numbers per node that a forward call keeps for its backward call, beside the states."""
    return int(_bound(config, dtype, input_size, hidden_size).kept_elements)


def forward(
    config: Config, forest: Forest, x: Tensor, weights: Sequence[Tensor], keep: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The states of all nodes, each (nodes, H), and what the backward call needs or None.

    The arguments are taken as checked: ``x`` (nodes, I) in float32 or float64.
    """
    schedule = forest.schedule
    nodes, hidden = x.shape[0], weights[1].shape[1] // config.positions
    tree = _bound(config, x.dtype, x.shape[1], hidden)
    x, weights = dense(x), [dense(w) for w in weights]
    states = [x.new_empty((nodes, hidden)) for _ in range(SPECS[config.cell].states)]
    kept = x.new_empty(nodes * tree.kept_elements) if keep else None
    workspace, _fresh = scratch(tree.forward_workspace(nodes, keep))
    tree.forward(
        [t.data_ptr() for t in schedule], nodes, len(schedule.level_offsets) - 1, x.data_ptr(),
        _four(weights), states[0].data_ptr(), states[-1].data_ptr(), _pointer(kept), workspace,
        torch.get_num_threads(),
    )  # fmt: skip
    return states, kept


def backward(
    config: Config,
    forest: Forest,
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    kept: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of [x, *weights] from those of the states; None where ``needs`` says so."""
    schedule = forest.schedule
    nodes, hidden = x.shape[0], weights[1].shape[1] // config.positions
    if nodes == 0:
        return [
            torch.zeros_like(t) if n else None for t, n in zip((x, *weights), needs, strict=True)
        ]
    tree = _bound(config, x.dtype, x.shape[1], hidden)
    x, weights = dense(x), [dense(w) for w in weights]
    incoming = [None if g is None else dense(g) for g in grads]
    d_x = torch.empty_like(x) if needs[0] else None
    d_w_ih = torch.empty_like(weights[0]) if needs[1] else None
    rows = weights[1].shape[0]
    d_w_hh = x.new_empty((config.positions, rows, hidden)) if needs[2] else None
    d_bias = torch.empty_like(weights[2]) if any(needs[3:]) else None
    threads = torch.get_num_threads()
    workspace, _fresh = scratch(tree.backward_workspace(nodes, threads))
    tree.backward(
        [t.data_ptr() for t in schedule], nodes, len(schedule.level_offsets) - 1, x.data_ptr(),
        _four(weights), states[0].data_ptr(), states[-1].data_ptr(), kept.data_ptr(),
        [
            _pointer(t)
            for t in (incoming[0], (*incoming, None)[1], d_x, d_w_ih, d_w_hh, d_bias)
        ],
        workspace, threads,
    )  # fmt: skip
    found = [d_x, d_w_ih, None if d_w_hh is None else d_w_hh.transpose(0, 1).reshape(rows, -1)]
    if config.bias:
        # Both biases are added to the same sums. Two tensors, since a caller may change one.
        both = all(needs[3:])
        found += [d_bias, d_bias.clone() if both and d_bias is not None else d_bias]
    return [g if need else None for g, need in zip(found, needs, strict=True)]


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _four(weights: Sequence[Tensor]) -> list[int]:
    """Pointers of weights and biases, none for those that are missing."""
    return [*[w.data_ptr() for w in weights], 0, 0][:4]
