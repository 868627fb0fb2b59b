"""The time loop of one layer in one direction, forward and backpropagation through time.

Samples of unequal length are packed: the rows of step t, one for each sample that is still
running, lie behind those of step t - 1, and samples are sorted by falling length, so that those
running at step t are the first ``batch_sizes[t]`` (packing.py). A batch of equal lengths is the
case in which all batch sizes are the same.

One rule serves both directions: a step replaces the states of the samples it runs and leaves the
others alone. Forward, a sample that has ended keeps its final state; in reverse, a sample keeps its
initial state until the loop comes down to its last step.

What a step s' -> s of any cell may have besides, q being what its product with U multiplies:

    reset     where it is true, s' is 0 before the step          ds' = 0 there
    mask      q = h' * mask, which holds for the whole sequence  dh' += (dgh U) * mask
    hold      s = hold * s' + (1 - hold) * new s                 ds' += ds * hold,
                                                                 d(new s) = ds * (1 - hold)

    dU = Σ dghᵀ q    dd = Σ dgh

Sources: mask: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent
neural networks", arXiv:1512.05287 (2016); hold: Krueger et al., "Zoneout: regularizing RNNs by
randomly preserving hidden activations", arXiv:1606.01305 (2016), drawn when training, its
expectation when not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cells import Array, Cell, Weights, linear, linear_gradients


class Extras(NamedTuple):
    """What a layer and direction may have besides its weights."""

    reset: NDArray[np.bool_] | None  # (rows,)
    mask: Array | None  # (B, P)
    holds: Sequence[Array | None]  # of each state: (rows, size)


class SequenceTape(NamedTuple):
    """What the backward pass of one layer and direction needs."""

    cell: Cell
    rows: Array
    weights: Weights
    batch_sizes: Sequence[int]
    reverse: bool
    extras: Extras
    saved: list[tuple[Array, ...]]  # of each step, in the order of time
    multiplied: list[Array]  # q of each step


class SequenceGradients(NamedTuple):
    """Gradients of one layer and direction, shaped as what they belong to."""

    rows: Array
    states: list[Array]
    weights: dict[str, Array]


def forward(
    cell: Cell,
    rows: Array,
    states: Sequence[Array],
    weights: Weights,
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
    extras: Extras,
    save: bool,
) -> tuple[Array, list[Array], SequenceTape | None]:
    """Run the packed input ``rows`` (Σ batch_sizes, I) from ``states``, each (B, size).

    Returns the packed outputs (Σ batch_sizes, P), the final states, and the tape if ``save``.
    """
    gx = linear(rows, weights["weight_ih"], weights.get("bias_ih"))
    # Every step multiplies by transposed weights, which BLAS reads up to twice as fast row by row.
    given = weights
    if len(batch_sizes) > 1:
        weights = {name: np.asfortranarray(weight) for name, weight in weights.items()}
    output = np.empty((len(rows), states[0].shape[1]), rows.dtype)
    current = list(states)
    saved: list[tuple[Array, ...]] = [()] * len(batch_sizes)
    multiplied: list[Array] = [states[0]] * len(batch_sizes)
    for t, step in _steps(batch_sizes, reverse):
        running = batch_sizes[t]
        before = _cleared([state[:running] for state in current], extras.reset, step)
        q = before[0] if extras.mask is None else before[0] * extras.mask[:running]
        gh = _recurrent_term(cell, q, weights)
        new, kept = cell.step(gx[step], gh, before, weights)
        new = [
            after if hold is None else hold[step] * old + (1 - hold[step]) * after
            for hold, old, after in zip(extras.holds, before, new, strict=True)
        ]
        output[step] = new[0]
        current = [_replace_rows(old, part) for old, part in zip(current, new, strict=True)]
        if save:
            saved[t], multiplied[t] = kept, q
    if not save:
        return output, current, None
    tape = SequenceTape(cell, rows, given, batch_sizes, reverse, extras, saved, multiplied)
    return output, current, tape


def backward(
    tape: SequenceTape, grad_output: Array, grad_states: Sequence[Array]
) -> SequenceGradients:
    """Gradients from those of the packed outputs and of the final states."""
    cell, rows, weights, batch_sizes, reverse, extras, saved, multiplied = tape
    current = list(grad_states)
    factors: list[dict[str, Array]] = [{}] * len(batch_sizes)
    for t, step in _steps(batch_sizes, not reverse):
        running = batch_sizes[t]
        grads = [grad[:running] for grad in current]
        grads[0] = grads[0] + grad_output[step]
        parts = [hold if hold is None else hold[step] for hold in extras.holds]
        news = [g if p is None else g * (1 - p) for g, p in zip(grads, parts, strict=True)]
        direct, factors[t] = cell.step_backward(news, saved[t], weights)
        olds = [None if p is None else g * p for g, p in zip(grads, parts, strict=True)]
        through: list[Array | None] = [None] * len(grads)
        if cell.recurrent:
            grad_q = _grad_gh(factors[t]) @ weights["weight_hh"]
            through[0] = grad_q if extras.mask is None else grad_q * extras.mask[:running]
        previous = [
            sum((term for term in terms if term is not None), np.zeros_like(grad))
            for grad, *terms in zip(grads, direct, olds, through, strict=True)
        ]
        previous = _cleared(previous, extras.reset, step)
        current = [_replace_rows(old, part) for old, part in zip(current, previous, strict=True)]
    whole = {name: np.concatenate([f[name] for f in factors]) for name in factors[0]}
    gradients = linear_gradients(whole["gx"], rows, weights, "ih")
    recurrent = linear_gradients(_grad_gh(whole), np.concatenate(multiplied), weights, "hh")
    if not cell.recurrent:
        del recurrent["weight_hh"]  # there is no such product
    gradients |= recurrent | cell.weight_gradients(whole, weights)
    return SequenceGradients(whole["gx"] @ weights["weight_ih"], current, gradients)


def _recurrent_term(cell: Cell, q: Array, weights: Weights) -> Array:
    if cell.recurrent:
        return linear(q, weights["weight_hh"], weights.get("bias_hh"))
    return weights.get("bias_hh", np.zeros(1, q.dtype))


def _grad_gh(factors: Mapping[str, Array]) -> Array:
    """dgh, which most cells do not tell apart from dgx."""
    return factors.get("gh", factors["gx"])


def _cleared(states: Sequence[Array], reset: NDArray[np.bool_] | None, step: slice) -> list[Array]:
    """States, or gradients, with zeros where the step begins anew."""
    if reset is None:
        return list(states)
    return [np.where(reset[step, None], state.dtype.type(0), state) for state in states]


def _steps(batch_sizes: Sequence[int], reverse: bool) -> Iterator[tuple[int, slice]]:
    """Each step and its rows, in the order in which the direction visits them."""
    ends = np.cumsum(batch_sizes).tolist()
    order = range(len(ends))
    for t in reversed(order) if reverse else order:
        yield t, slice(ends[t] - batch_sizes[t], ends[t])


def _replace_rows(old: Array, first: Array) -> Array:
    """``old`` with its first rows replaced. A new array, because the tape may hold the old one."""
    return first if len(first) == len(old) else np.concatenate([first, old[len(first) :]])
