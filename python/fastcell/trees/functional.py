"""Recursive networks as functions: no state, no parameters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import Config
from .checks import check_dtypes, check_operands
from .forest import Trees

__all__ = ["tree_lstm", "tree_rnn"]

States = tuple[Tensor, Tensor]


def tree_lstm(
    input: Tensor,
    trees: Trees | Tensor | Any,
    weights: Sequence[Tensor],
    *,
    arity: int | None = None,
) -> tuple[States, States]:
    """Long short-term memory over trees: see :class:`fastcell.TreeLSTM`.

    Args:
        input: (nodes, I), the rows of all trees one behind the other.
        trees: a :class:`fastcell.Trees`, or the parents of one tree.
        weights: weight_ih (4*H, I), weight_hh, and bias_ih, bias_hh (4*H,) or no biases. With
            ``arity`` None weight_hh is (4*H, H), with N it is ((3 + N)*H, N*H).
        arity: children of a node at most, told apart by their positions; None: any number, summed.

    Returns:
        ``(h, c), (h_root, c_root)``: of all nodes, (nodes, H), and of the roots, (trees, H).

    Raises:
        TypeError, ValueError: parents that are no tree, input of another rank, too many children.
        RuntimeError: tensors whose sizes, dtypes or devices do not belong together.
    """
    h, c, roots = _run("tree_lstm", input, trees, weights, arity)
    return (h, c), (h.index_select(0, roots), c.index_select(0, roots))


def tree_rnn(
    input: Tensor,
    trees: Trees | Tensor | Any,
    weights: Sequence[Tensor],
    *,
    arity: int | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """A plain recursive network: see :class:`fastcell.TreeRNN`.

    Args:
        weights: weight_ih (H, I), weight_hh (H, H) or with ``arity`` N (H, N*H), and bias_ih,
            bias_hh (H,) or no biases.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        input, trees, arity: as for :func:`tree_lstm`.

    Returns:
        ``h, h_root``: of all nodes, (nodes, H), and of the roots, (trees, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`tree_lstm`, ValueError for another
            nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    h, roots = _run(f"tree_rnn_{nonlinearity}", input, trees, weights, arity)
    return h, h.index_select(0, roots)


def checked_arity(arity: int | None) -> int:
    """The arity as the kernels have it, 0 for sums over the children."""
    if arity is None:
        return 0
    if isinstance(arity, bool) or not isinstance(arity, int) or arity < 1:
        raise ValueError(f"arity must be None or a positive integer, got {arity!r}")
    return arity


def _run(
    cell: str, input: Tensor, trees: Any, weights: Sequence[Tensor], arity: int | None
) -> tuple[Tensor, ...]:
    """The states of all nodes, then the rows of the roots."""
    if not isinstance(trees, Trees):
        trees = Trees(trees)
    config = Config(cell, checked_arity(arity), len(weights) == 4)
    check_operands(config, input, weights, trees.nodes)
    if not torch._C._is_any_autocast_enabled():
        check_dtypes(input, weights)
    if config.arity:
        trees.check_arity(config.arity)
    return *ops.tree(config, input, weights, trees), _roots(trees, input.device)


def _roots(trees: Trees, device: torch.device) -> Tensor:
    """The roots' rows on a device, which is not to be waited for in every call."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return trees.roots.to(device)
    found: Tensor = trees.forest.on(device, "roots", lambda: trees.roots.to(device))
    return found
