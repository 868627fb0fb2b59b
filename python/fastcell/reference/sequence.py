"""The time loop of one layer in one direction, forward and backpropagation through time.

Samples of unequal length are packed: the rows of step t, one for each sample that is still
running, lie behind those of step t - 1, and samples are sorted by falling length, so that those
running at step t are the first ``batch_sizes[t]`` (packing.py). A batch of equal lengths is the
case in which all batch sizes are the same.

One rule serves both directions: a step replaces the states of the samples it runs and leaves the
others alone. Forward, a sample that has ended keeps its final state; in reverse, a sample keeps its
initial state until the loop comes down to its last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .cells import Array, Cell, Weights, linear, linear_gradients


class SequenceTape(NamedTuple):
    """What the backward pass of one layer and direction needs."""

    cell: Cell
    rows: Array
    weights: Weights
    batch_sizes: Sequence[int]
    reverse: bool
    saved: list[tuple[Array, ...]]  # of each step, in the order of time


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
    for t, step in _steps(batch_sizes, reverse):
        running = batch_sizes[t]
        new, kept = cell.step(gx[step], [state[:running] for state in current], weights)
        output[step] = new[0]
        current = [_replace_rows(old, part) for old, part in zip(current, new, strict=True)]
        if save:
            saved[t] = kept
    tape = SequenceTape(cell, rows, given, batch_sizes, reverse, saved) if save else None
    return output, current, tape


def backward(
    tape: SequenceTape, grad_output: Array, grad_states: Sequence[Array]
) -> SequenceGradients:
    """Gradients from those of the packed outputs and of the final states."""
    cell, rows, weights, batch_sizes, reverse, saved = tape
    current = list(grad_states)
    factors: list[dict[str, Array]] = [{}] * len(batch_sizes)
    for t, step in _steps(batch_sizes, not reverse):
        grads = [grad[: batch_sizes[t]] for grad in current]
        grads[0] = grads[0] + grad_output[step]
        previous, factors[t] = cell.step_backward(grads, saved[t], weights)
        current = [_replace_rows(old, part) for old, part in zip(current, previous, strict=True)]
    whole = {name: np.concatenate([f[name] for f in factors]) for name in factors[0]}
    gradients = linear_gradients(whole["gx"], rows, weights, "ih")
    gradients |= cell.weight_gradients(whole, weights)
    return SequenceGradients(whole["gx"] @ weights["weight_ih"], current, gradients)


def _steps(batch_sizes: Sequence[int], reverse: bool) -> Iterator[tuple[int, slice]]:
    """Each step and its rows, in the order in which the direction visits them."""
    ends = np.cumsum(batch_sizes).tolist()
    order = range(len(ends))
    for t in reversed(order) if reverse else order:
        yield t, slice(ends[t] - batch_sizes[t], ends[t])


def _replace_rows(old: Array, first: Array) -> Array:
    """``old`` with its first rows replaced. A new array, because the tape may hold the old one."""
    return first if len(first) == len(old) else np.concatenate([first, old[len(first) :]])
