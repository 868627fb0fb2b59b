"""Recursive networks over trees, forward and backpropagation through structure, node by node.

Notation, for one node j with the children 1 .. K (child-sum) or at the positions 1 .. N (N-ary):

    x  (I,)   input of the node            W, U   weight_ih and weight_hh, in blocks of H rows, one
    h_k, c_k  states of child k                   per gate: W_i, W_f, W_g, W_o; U_i, U_f, U_g, U_o
    s  (.,)   what the gates i, g, o see   b, d   bias_ih and bias_hh, in blocks as well
    dv        gradient of the loss by v    *      elementwise product

Child-sum: s = Σ h_k, and f_k sees h_k. N-ary: s = [h_1 .. h_N], zero where there is no child, f_k
sees s too, and there are N blocks U_f, one per position.

    a_i = W_i x + b_i + U_i s + d_i    and so a_g, a_o
    a_fk = W_f x + b_f + d_f + U_f h_k        N-ary: .. + U_fk s

    i = σ(a_i)   f_k = σ(a_fk)   g = tanh(a_g)   o = σ(a_o)
    c = i * g + Σ f_k * c_k      h = o * tanh(c)

The plain cell: h = φ(W x + b + U s + d), φ = tanh or relu.

Backward, from the root down: dh and dc of a node are those that come from outside of the tree plus
what its parent sends,

    dc += dh * o * (1 - tanh(c)²)
    da_i = dc * g * i * (1 - i)      da_g = dc * i * (1 - g²)     da_o = dh * tanh(c) * o * (1 - o)
    da_fk = dc * c_k * f_k * (1 - f_k)                            dc_k = dc * f_k
    ds = U_iᵀ da_i + U_gᵀ da_g + U_oᵀ da_o
    child-sum   dh_k = ds + U_fᵀ da_fk        N-ary   ds += Σ U_fkᵀ da_fk,   [dh_1 .. dh_N] = ds

and with da_f = Σ da_fk, over all nodes

    dx = Wᵀ da      dW = Σ da xᵀ      db = dd = Σ da      dU_i = Σ da_i sᵀ, and so U_g, U_o
    child-sum   dU_f = Σ da_fk h_kᵀ           N-ary   dU_fk = Σ da_fk sᵀ

Sources: Tai, Socher, Manning, "Improved semantic representations from tree-structured long
short-term memory networks", ACL (2015); Socher, Lin, Ng, Manning, "Parsing natural scenes and
natural language with recursive neural networks", ICML (2011); the backward equations: Goller,
Küchler, "Learning task-dependent distributed representations by backpropagation through
structure", ICNN (1996).

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> weights = [rng.normal(size=shape) for shape in [(8, 3), (8, 2), (8,), (8,)]]
>>> (h, c), tape = forward("tree_lstm", rng.normal(size=(4, 3)), [2, 2, -1, 0], weights)
>>> h.shape, backward(tape, [np.ones_like(h), None])[0].shape
((4, 2), (4, 3))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .cells import Array, sigmoid

CELLS = ("tree_lstm", "tree_rnn_tanh", "tree_rnn_relu")


class TreeTape(NamedTuple):
    """What the backward pass needs."""

    cell: str
    arity: int | None
    x: Array
    weights: list[Array]
    order: list[int]  # children before parents
    children: list[dict[int, int]]  # of each node, by position
    states: list[Array]
    saved: list[tuple[Array, ...]]  # of each node


def forward(
    cell: str,
    x: ArrayLike,
    parents: Sequence[int],
    weights: Sequence[ArrayLike],
    arity: int | None = None,
    positions: Sequence[int] | None = None,
) -> tuple[list[Array], TreeTape]:
    """The states of all nodes, [h, c] or [h], each (nodes, H), and the tape.

    Args:
        cell: one of ``CELLS``.
        x: (nodes, I), rows of one tree or several.
        parents: of each node, its parent's row; -1 at a root. They are taken to be trees.
        weights: weight_ih, weight_hh, and bias_ih, bias_hh or no biases.
        arity: N, or None for child-sum.
        positions: of each node among its siblings; None: in the order of the nodes.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    rows = np.asarray(x)
    w = [np.asarray(weight) for weight in weights]
    hidden = w[0].shape[0] // (4 if cell == "tree_lstm" else 1)
    children: list[dict[int, int]] = [{} for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            at = len(children[parent]) if positions is None else int(positions[node])
            children[parent][at] = node
    children = [dict(sorted(below.items())) for below in children]
    order = [node for node, parent in enumerate(parents) if parent < 0]
    for node in order:  # which grows: parents before children
        order += children[node].values()
    order.reverse()
    count = 2 if cell == "tree_lstm" else 1
    states = [np.zeros((len(rows), hidden), rows.dtype) for _ in range(count)]
    tape = TreeTape(cell, arity, rows, w, order, children, states, [()] * len(rows))
    bias = w[2] + w[3] if len(w) > 2 else np.zeros(w[0].shape[0], rows.dtype)
    for node in order:
        step = _lstm if cell == "tree_lstm" else _plain
        step(tape, node, w[0] @ rows[node] + bias)
    return states, tape


def _seen(tape: TreeTape, node: int) -> Array:
    """s of a node."""
    h, below = tape.states[0], tape.children[node]
    none = np.zeros(h.shape[1], h.dtype)
    if tape.arity is None:
        total: Array = sum((h[k] for k in below.values()), none)
        return total
    return np.concatenate([h[below[n]] if n in below else none for n in range(tape.arity)])


def _plain(tape: TreeTape, node: int, gx: Array) -> None:
    a = gx + tape.weights[1] @ _seen(tape, node)
    tape.states[0][node] = np.tanh(a) if tape.cell.endswith("tanh") else np.maximum(a, 0)


def _blocks(tape: TreeTape, rows: Array) -> tuple[Array, list[Array], Array, Array]:
    """The blocks of weight_hh or of its gradient: i, those of f, g, o."""
    i, *f, g, o = np.split(rows, 3 + (tape.arity or 1))
    return i, f, g, o


def _lstm(tape: TreeTape, node: int, gx: Array) -> None:
    h, c = tape.states
    u_i, u_f, u_g, u_o = _blocks(tape, tape.weights[1])
    x_i, x_f, x_g, x_o = np.split(gx, 4)
    s = _seen(tape, node)
    i, g, o = sigmoid(x_i + u_i @ s), np.tanh(x_g + u_g @ s), sigmoid(x_o + u_o @ s)
    c[node] = i * g
    forget = []
    for position, child in tape.children[node].items():
        f = sigmoid(x_f + (u_f[0] @ h[child] if tape.arity is None else u_f[position] @ s))
        c[node] += f * c[child]
        forget.append(f)
    h[node] = o * np.tanh(c[node])
    tape.saved[node] = (i, g, o, *forget)


def backward(tape: TreeTape, grads: Sequence[ArrayLike | None]) -> tuple[Array, list[Array]]:
    """The gradients of x and of each weight, from those of the states (None: zero)."""
    x, w, states = tape.x, tape.weights, tape.states
    d_states = [
        np.zeros_like(state) if grad is None else np.array(grad, state.dtype)
        for state, grad in zip(states, grads, strict=True)
    ]
    d_a = np.zeros((len(x), w[0].shape[0]), x.dtype)
    d_u = np.zeros_like(w[1])
    for node in reversed(tape.order):
        step = _lstm_backward if tape.cell == "tree_lstm" else _plain_backward
        d_a[node], d_s = step(tape, node, d_states, d_u)
        for n, child in tape.children[node].items():
            hidden = states[0].shape[1]
            d_states[0][child] += d_s if tape.arity is None else d_s[n * hidden : (n + 1) * hidden]
    d_bias = [d_a.sum(axis=0)] * (len(w) - 2)
    return d_a @ w[0], [d_a.T @ x, d_u, *d_bias]


def _plain_backward(
    tape: TreeTape, node: int, d_states: list[Array], d_u: Array
) -> tuple[Array, Array]:
    h, d_h = tape.states[0][node], d_states[0][node]
    d_a = d_h * (1 - h * h) if tape.cell.endswith("tanh") else d_h * (h > 0)
    d_u += np.outer(d_a, _seen(tape, node))
    return d_a, tape.weights[1].T @ d_a


def _lstm_backward(
    tape: TreeTape, node: int, d_states: list[Array], d_u: Array
) -> tuple[Array, Array]:
    h, c = tape.states
    d_h, d_c = d_states
    i, g, o, *forget = tape.saved[node]
    u_i, u_f, u_g, u_o = _blocks(tape, tape.weights[1])
    d_u_i, d_u_f, d_u_g, d_u_o = _blocks(tape, d_u)
    s, tanh_c = _seen(tape, node), np.tanh(c[node])
    d_c[node] += d_h[node] * o * (1 - tanh_c * tanh_c)
    d_i = d_c[node] * g * i * (1 - i)
    d_g = d_c[node] * i * (1 - g * g)
    d_o = d_h[node] * tanh_c * o * (1 - o)
    d_s = u_i.T @ d_i + u_g.T @ d_g + u_o.T @ d_o
    for d_block, d_gate in ((d_u_i, d_i), (d_u_g, d_g), (d_u_o, d_o)):
        d_block += np.outer(d_gate, s)
    d_f = np.zeros_like(d_i)
    for (n, child), f in zip(tape.children[node].items(), forget, strict=True):
        d_f_k = d_c[node] * c[child] * f * (1 - f)
        d_c[child] += d_c[node] * f
        d_f += d_f_k
        if tape.arity is None:
            d_h[child] += u_f[0].T @ d_f_k
            d_u_f[0] += np.outer(d_f_k, h[child])
        else:
            d_s += u_f[n].T @ d_f_k
            d_u_f[n] += np.outer(d_f_k, s)
    return np.concatenate([d_i, d_f, d_g, d_o]), d_s
