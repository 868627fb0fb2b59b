"""LSTM and GRU with layer normalisation: one layer, one direction, forward and backward.

A norm of n numbers v with gain γ, and backward with d the gradient of what it gives:

    LN(v) = γ * v̂        v̂ = (v - mean v) ρ        ρ = 1 / √(mean (v - mean v)² + 1e-5)

    dγ = Σ d * v̂         dv = ρ (γ d - mean(γ d) - v̂ mean(γ d * v̂))

A step, with x = LN(x_t Wᵀ; norm_ih) + b and u = LN(h' Uᵀ; norm_hh) + d, gate by gate; LSTM over all
four gates together, GRU over r and z together and over n apart:

    LSTM   c = σ(x_f + u_f) * c' + σ(x_i + u_i) * tanh(x_g + u_g)
           h = σ(x_o + u_o) * tanh(LN(c; γ_c) + β_c)             γ_c, β_c: the rows of norm_c
    GRU    the step of ``cells.GRU`` with gx = x, gh = u

Source: Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450 (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cells import GRU, Array, Weights, blocks, sigmoid

PARTS = {"lstm": (4,), "gru": (2, 1)}
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
    hidden = v.shape[-1] // sum(PARTS[cell])
    return np.split(v, [n * hidden for n in np.cumsum(PARTS[cell])[:-1]], -1)


def _norms(cell: str, v: Array, gain: Array) -> tuple[Array, list[tuple[Array, Array]]]:
    found = [norm(a, g) for a, g in zip(_parts(cell, v), _parts(cell, gain), strict=True)]
    return np.concatenate([f[0] for f in found], -1), [f[1] for f in found]


def _norms_backward(
    cell: str, grad: Array, gain: Array, saved: list[tuple[Array, Array]]
) -> tuple[Array, Array]:
    pieces = zip(_parts(cell, grad), _parts(cell, gain), saved, strict=True)
    found = [norm_backward(d, g, s) for d, g, s in pieces]
    return np.concatenate([f[0] for f in found], -1), np.concatenate([f[1] for f in found], -1)


def forward(
    cell: str, x: Array, states: list[Array], w: Weights
) -> tuple[Array, list[Array], list[Any]]:
    """Outputs (T, B, H) of x (T, B, I) from states (B, H), the final states, and the tape.

    ``w``: weight_ih, weight_hh, bias_ih, bias_hh, norm_ih, norm_hh and for "lstm" norm_c.
    """
    tape, outputs = [], []
    for x_t in x:
        h_prev = states[0]
        terms, of_x = _norms(cell, x_t @ w["weight_ih"].T, w["norm_ih"])
        recurrent, of_h = _norms(cell, h_prev @ w["weight_hh"].T, w["norm_hh"])
        gx, gh = terms + w["bias_ih"], recurrent + w["bias_hh"]
        saved: tuple[Any, ...]
        if cell == "lstm":
            a_i, a_f, a_g, a_o = blocks(gx + gh, 4)
            i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
            c = f * states[1] + i * g
            normed_c, of_c = norm(c, w["norm_c"][0])
            tanh_c = np.tanh(normed_c + w["norm_c"][1])
            saved = (states[1], i, f, g, o, tanh_c, of_c)
            states = [o * tanh_c, c]
        else:
            states, saved = _GRU.step(gx, gh, states, w)
        tape.append((x_t, h_prev, of_x, of_h, saved))
        outputs.append(states[0])
    return np.stack(outputs), states, tape


def backward(
    cell: str, tape: list[Any], w: Weights, grad_output: Array, grad_states: list[Array]
) -> tuple[Array, list[Array], Mapping[str, Array]]:
    """Gradients of x, of the initial states and of the weights."""
    total = {name: np.zeros_like(weight) for name, weight in w.items()}
    grads, grad_x = list(grad_states), np.empty((len(tape), *tape[0][0].shape), grad_output.dtype)
    for t in reversed(range(len(tape))):
        x_t, h_prev, of_x, of_h, saved = tape[t]
        grad_h = grads[0] + grad_output[t]
        direct: Array | float = 0.0
        if cell == "lstm":
            c_prev, i, f, g, o, tanh_c, of_c = saved
            grad_n = grad_h * o * (1 - tanh_c * tanh_c)
            grad_c, along = norm_backward(grad_n, w["norm_c"][0], of_c)
            grad_c = grad_c + grads[1]
            total["norm_c"] += np.stack([along.sum(0), grad_n.sum(0)])
            grad_gx = grad_gh = np.concatenate(
                [
                    grad_c * g * i * (1 - i),
                    grad_c * c_prev * f * (1 - f),
                    grad_c * i * (1 - g * g),
                    grad_h * tanh_c * o * (1 - o),
                ],
                axis=1,
            )
            grads = [grad_h, grad_c * f]
        else:
            (direct,), factors = _GRU.step_backward([grad_h], saved, w)  # type: ignore[assignment]
            grad_gx, grad_gh = factors["gx"], factors["gh"]
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
