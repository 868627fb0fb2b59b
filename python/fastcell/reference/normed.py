"""LSTM and GRU with layer normalisation: one layer, one direction, forward and backward.

A norm of n numbers v with gain γ, and backward with d the gradient of what it gives:

    LN(v) = γ * v̂        v̂ = (v - mean v) ρ        ρ = 1 / √(mean (v - mean v)² + 1e-5)

    dγ = Σ d * v̂         dv = ρ (γ d - mean(γ d) - v̂ mean(γ d * v̂))

A step, with x = LN(x_t Wᵀ; norm_ih) + b and u = LN(h' Uᵀ; norm_hh) + d, gate by gate; LSTM over all
four gates together, GRU over r and z together and over n apart:

    LSTM   i = σ(x_i + u_i + p_i * c')    f = σ(x_f + u_f + p_f * c')    g = tanh(x_g + u_g)
           c = f * c' + i * g             o = σ(x_o + u_o + p_o * c)
           h = o * tanh(LN(c; γ_c) + β_c)             γ_c, β_c: the rows of norm_c
           without peepholes p = 0; with coupled gates f = 1 - i; a projection takes that h
    GRU    the step of ``cells.GRU`` with gx = x, gh = u

Source: Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450 (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cells import GRU, Array, Weights, blocks, sigmoid

_EPSILON = 1e-5
_GRU = GRU("gru")


def norm(v: Array, gain: Array) -> tuple[Array, tuple[Array, Array]]:
    """LN(v) over the last axis, and v̂ and ρ."""
    centred = v - v.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + _EPSILON)
    normed = centred * scale
    return gain * normed, (normed, scale)


def norm_backward(grad: Array, gain: Array, saved: tuple[Array, Array]) -> tuple[Array, Array]:
    """dv, and d * v̂, whose sum over the samples is dγ."""
    normed, scale = saved
    d = grad * gain
    along = (d * normed).mean(-1, keepdims=True)
    return scale * (d - d.mean(-1, keepdims=True) - normed * along), grad * normed


def _parts(cell: str, v: Array) -> list[Array]:
    """What is normalised together."""
    return np.split(v, [v.shape[-1] // 3 * 2], -1) if cell == "gru" else [v]


def _norms(cell: str, v: Array, gain: Array) -> tuple[Array, list[tuple[Array, Array]]]:
    found = [norm(a, g) for a, g in zip(_parts(cell, v), _parts(cell, gain), strict=True)]
    return np.concatenate([f[0] for f in found], -1), [f[1] for f in found]


def _norms_backward(
    cell: str, grad: Array, gain: Array, saved: list[tuple[Array, Array]]
) -> tuple[Array, Array]:
    pieces = zip(_parts(cell, grad), _parts(cell, gain), saved, strict=True)
    found = [norm_backward(d, g, s) for d, g, s in pieces]
    return np.concatenate([f[0] for f in found], -1), np.concatenate([f[1] for f in found], -1)


class _Lstm:
    """What follows the norms of the terms, and comes before the projection."""

    def __init__(self, cell: str, w: Weights) -> None:
        self.coupled, self.norm_c = "coupled" in cell, w["norm_c"]
        self.peepholes = w.get("weight_peephole")

    def _seen(self, row: int, c: Array) -> Array | float:
        return 0.0 if self.peepholes is None else self.peepholes[row] * c

    def step(self, a: Array, c_prev: Array) -> tuple[Array, Array, tuple[Any, ...]]:
        """(o * tanh of the normalised c, c, what ``step_backward`` needs)."""
        a_i, *a_f, a_g, a_o = blocks(a, 3 if self.coupled else 4)
        i = sigmoid(a_i + self._seen(0, c_prev))
        f = 1 - i if self.coupled else sigmoid(a_f[0] + self._seen(1, c_prev))
        g = np.tanh(a_g)
        c = f * c_prev + i * g
        o = sigmoid(a_o + self._seen(-1, c))
        normed_c, of_c = norm(c, self.norm_c[0])
        tanh_c = np.tanh(normed_c + self.norm_c[1])
        return o * tanh_c, c, (c_prev, i, f, g, o, c, tanh_c, of_c)

    def step_backward(
        self, grad_m: Array, grad_c: Array, saved: tuple[Any, ...], total: dict[str, Array]
    ) -> tuple[Array, Array]:
        """Gradients of the gates' arguments and of c_{t-1}; those of weights join ``total``."""
        c_prev, i, f, g, o, c, tanh_c, of_c = saved
        grad_n = grad_m * o * (1 - tanh_c * tanh_c)
        through_norm, along = norm_backward(grad_n, self.norm_c[0], of_c)
        total["norm_c"] += np.stack([along.sum(0), grad_n.sum(0)])
        d_o = grad_m * tanh_c * o * (1 - o)
        grad_c = grad_c + through_norm + self._seen(-1, d_o)
        d_i = grad_c * (g - c_prev if self.coupled else g) * i * (1 - i)
        d_f = [] if self.coupled else [grad_c * c_prev * f * (1 - f)]
        grad_prev = grad_c * f + self._seen(0, d_i)
        if d_f:
            grad_prev = grad_prev + self._seen(1, d_f[0])
        if self.peepholes is not None:
            rows = [d_i * c_prev, *[d * c_prev for d in d_f], d_o * c]
            total["weight_peephole"] += np.stack([row.sum(0) for row in rows])
        return np.concatenate([d_i, *d_f, grad_c * i * (1 - g * g), d_o], axis=1), grad_prev


def forward(
    cell: str, x: Array, states: list[Array], w: Weights
) -> tuple[Array, list[Array], list[Any]]:
    """Outputs (T, B, P) of x (T, B, I) from states (B, .), the final states, and the tape.

    ``w``: weight_ih, weight_hh, bias_ih, bias_hh, norm_ih, norm_hh, for an LSTM norm_c and, where
    it has some, weight_hr and weight_peephole.
    """
    tape, outputs = [], []
    for x_t in x:
        h_prev = states[0]
        terms, of_x = _norms(cell, x_t @ w["weight_ih"].T, w["norm_ih"])
        recurrent, of_h = _norms(cell, h_prev @ w["weight_hh"].T, w["norm_hh"])
        gx, gh = terms + w["bias_ih"], recurrent + w["bias_hh"]
        m = None
        if cell == "gru":
            states, saved = _GRU.step(gx, gh, states, w)
        else:
            m, c, saved = _Lstm(cell, w).step(gx + gh, states[1])
            states = [m @ w["weight_hr"].T if "weight_hr" in w else m, c]
        tape.append((x_t, h_prev, of_x, of_h, m, saved))
        outputs.append(states[0])
    return np.stack(outputs), states, tape


def backward(
    cell: str, tape: list[Any], w: Weights, grad_output: Array, grad_states: list[Array]
) -> tuple[Array, list[Array], Mapping[str, Array]]:
    """Gradients of x, of the initial states and of the weights."""
    total = {name: np.zeros_like(weight) for name, weight in w.items()}
    grads, grad_x = list(grad_states), np.empty((len(tape), *tape[0][0].shape), grad_output.dtype)
    for t in reversed(range(len(tape))):
        x_t, h_prev, of_x, of_h, m, saved = tape[t]
        grad_h = grads[0] + grad_output[t]
        direct: Array | float = 0.0
        if cell == "gru":
            (direct,), factors = _GRU.step_backward([grad_h], saved, w)  # type: ignore[assignment]
            grad_gx, grad_gh = factors["gx"], factors["gh"]
        else:
            if "weight_hr" in w:
                total["weight_hr"] += grad_h.T @ m
                grad_h = grad_h @ w["weight_hr"]
            grad_gx, grads[1] = _Lstm(cell, w).step_backward(grad_h, grads[1], saved, total)
            grad_gh = grad_gx
        of_terms, along_x = _norms_backward(cell, grad_gx, w["norm_ih"], of_x)
        of_sums, along_h = _norms_backward(cell, grad_gh, w["norm_hh"], of_h)
        total["bias_ih"] += grad_gx.sum(0)
        total["bias_hh"] += grad_gh.sum(0)
        total["norm_ih"] += along_x.sum(0)
        total["norm_hh"] += along_h.sum(0)
        total["weight_ih"] += of_terms.T @ x_t
        total["weight_hh"] += of_sums.T @ h_prev
        grad_x[t] = of_terms @ w["weight_ih"]
        grads[0] = direct + of_sums @ w["weight_hh"]
    return grad_x, grads, total
