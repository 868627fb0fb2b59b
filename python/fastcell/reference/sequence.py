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

A step follows the one before it, or with a delay of d steps (``skip``) the one d steps before, so
that h' and c' are what that left; or it follows the one before it and its argument also has

    delayed   gx += h_{t-d} U_sᵀ, where no reset is since that step    dU_s = Σ dgxᵀ h_{t-d}

so that a sample has the states of its last d steps, forward those before its first one.

Sources: mask: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent
neural networks", arXiv:1512.05287 (2016); delays: Lin et al., "Learning long-term dependencies in
NARX recurrent neural networks", IEEE Trans. Neural Networks 7 (1996); Chang et al., "Dilated
recurrent neural networks", NIPS (2017); hold: Krueger et al., "Zoneout: regularizing RNNs by
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
    skip: int = 1


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
    delayed: list[Array]  # h_{t-d} of each step, if it is a term beside
    hidden: list[list[NDArray[np.bool_]]]  # of each step, as ``_Resets.hidden``
    gone: NDArray[np.bool_]  # as ``_Resets.gone``


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
    """Run the packed input ``rows`` (Σ batch_sizes, I) from ``states``.

    Each of these is (d, B, size), of the d steps before, the oldest first; (1, B, size) is enough
    of those that no delay looks at. Returns the packed outputs (Σ batch_sizes, P), the final
    states, and the tape if ``save``.
    """
    skip, beside = extras.skip, "weight_skip" in weights
    seen = -1 if beside else 0
    gx = linear(rows, weights["weight_ih"], weights.get("bias_ih"))
    # Every step multiplies by transposed weights, which BLAS reads up to twice as fast row by row.
    given = weights
    if len(batch_sizes) > 1:
        weights = {name: np.asfortranarray(weight) for name, weight in weights.items()}
    output = np.empty((len(rows), states[0].shape[2]), rows.dtype)
    past = list(states)
    resets = _Resets(extras.reset, states[0].shape[1], skip)
    saved: list[tuple[Array, ...]] = [()] * len(batch_sizes)
    multiplied: list[Array] = [states[0][0]] * len(batch_sizes)
    delayed: list[Array] = [states[0][0]] * len(batch_sizes) if beside else []
    hidden: list[list[NDArray[np.bool_]]] = [[]] * len(batch_sizes)
    for t, step in _steps(batch_sizes, reverse):
        running = batch_sizes[t]
        hidden[t] = resets.step(step)
        before = [_cleared(state[seen, :running], hidden[t][seen]) for state in past]
        q = before[0] if extras.mask is None else before[0] * extras.mask[:running]
        gh = _recurrent_term(cell, q, weights)
        argument = gx[step]
        if beside:
            delayed[t] = _cleared(past[0][0, :running], hidden[t][0])
            argument = argument + delayed[t] @ weights["weight_skip"].T
        new, kept = cell.step(argument, gh, [*before, q] if cell.takes_q else before, weights)
        new = [
            after if hold is None else hold[step] * old + (1 - hold[step]) * after
            for hold, old, after in zip(extras.holds, before, new, strict=True)
        ]
        output[step] = new[0]
        past = [_appended(old, part) for old, part in zip(past, new, strict=True)]
        if save:
            saved[t], multiplied[t] = kept, q
    gone = resets.gone()
    past = [_cleared(state, gone[-len(state) :]) for state in past]
    if not save:
        return output, past, None
    tape = SequenceTape(
        cell, rows, given, batch_sizes, reverse, extras, saved, multiplied, delayed, hidden, gone
    )
    return output, past, tape


def backward(
    tape: SequenceTape, grad_output: Array, grad_states: Sequence[Array]
) -> SequenceGradients:
    """Gradients from those of the packed outputs and of the final states."""
    cell, weights, batch_sizes, extras = tape.cell, tape.weights, tape.batch_sizes, tape.extras
    delayed, hidden = tape.delayed, tape.hidden
    seen = -1 if delayed else 0
    past = [_cleared(grad, tape.gone[-len(grad) :]) for grad in grad_states]
    factors: list[dict[str, Array]] = [{}] * len(batch_sizes)
    for t, step in _steps(batch_sizes, not tape.reverse):
        running = batch_sizes[t]
        grads = [grad[-1, :running] for grad in past]
        grads[0] = grads[0] + grad_output[step]
        parts = [hold if hold is None else hold[step] for hold in extras.holds]
        news = [g if p is None else g * (1 - p) for g, p in zip(grads, parts, strict=True)]
        direct, factors[t] = cell.step_backward(news, tape.saved[t], weights)
        olds = [None if p is None else g * p for g, p in zip(grads, parts, strict=True)]
        through: list[Array | None] = [None] * len(grads)
        if cell.recurrent:
            grad_q = _grad_gh(factors[t]) @ weights["weight_hh"]
            if cell.takes_q:
                *direct, of_q = direct
                assert of_q is not None
                grad_q = grad_q + of_q
            through[0] = grad_q if extras.mask is None else grad_q * extras.mask[:running]
        previous = [
            sum((term for term in terms if term is not None), np.zeros_like(grad))
            for grad, *terms in zip(grads, direct, olds, through, strict=True)
        ]
        past = [_without_last(grad, running) for grad in past]
        for grad, part in zip(past, previous, strict=True):
            grad[seen, :running] += _cleared(part, hidden[t][seen])
        if delayed:
            past[0][0, :running] += _cleared(
                factors[t]["gx"] @ weights["weight_skip"], hidden[t][0]
            )
    whole = {name: np.concatenate([f[name] for f in factors]) for name in factors[0]}
    gradients = linear_gradients(whole["gx"], tape.rows, weights, "ih")
    recurrent = linear_gradients(_grad_gh(whole), np.concatenate(tape.multiplied), weights, "hh")
    if not cell.recurrent:
        del recurrent["weight_hh"]  # there is no such product
    gradients |= recurrent | cell.weight_gradients(whole, weights)
    if delayed:
        gradients["weight_skip"] = whole["gx"].T @ np.concatenate(delayed)
    return SequenceGradients(whole["gx"] @ weights["weight_ih"], past, gradients)


class _Resets:
    """How long each sample's last reset is ago, as the loop goes through time."""

    def __init__(self, reset: NDArray[np.bool_] | None, batch: int, skip: int) -> None:
        self.reset, self.skip = reset, skip
        self.since = np.full(batch, skip)  # steps; so many: none that matters

    def step(self, step: slice) -> list[NDArray[np.bool_]]:
        """Of the states of the last d steps, the oldest first: which samples do not see them."""
        count = step.stop - step.start
        self.since[:count] += 1
        if self.reset is not None:
            self.since[:count][self.reset[step]] = 0
        return [self.since[:count] < age for age in range(self.skip, 0, -1)]

    def gone(self) -> NDArray[np.bool_]:
        """(d, B): which of these states, at the end, are from before the last reset."""
        return self.since + 1 < np.arange(self.skip, 0, -1)[:, None]


def _recurrent_term(cell: Cell, q: Array, weights: Weights) -> Array:
    if cell.recurrent:
        return linear(q, weights["weight_hh"], weights.get("bias_hh"))
    return weights.get("bias_hh", np.zeros(1, q.dtype))


def _grad_gh(factors: Mapping[str, Array]) -> Array:
    """dgh, which most cells do not tell apart from dgx."""
    return factors.get("gh", factors["gx"])


def _cleared(states: Array, where: NDArray[np.bool_]) -> Array:
    """States, or gradients, with zeros in some rows."""
    return np.where(where[..., None], states.dtype.type(0), states)


def _steps(batch_sizes: Sequence[int], reverse: bool) -> Iterator[tuple[int, slice]]:
    """Each step and its rows, in the order in which the direction visits them."""
    ends = np.cumsum(batch_sizes).tolist()
    order = range(len(ends))
    for t in reversed(order) if reverse else order:
        yield t, slice(ends[t] - batch_sizes[t], ends[t])


def _appended(past: Array, new: Array) -> Array:
    """The states of the last steps after one more. A new array: the tape may hold the old one."""
    past = past.copy()
    past[:-1, : len(new)] = past[1:, : len(new)]
    past[-1, : len(new)] = new
    return past


def _without_last(grads: Array, running: int) -> Array:
    """The gradients of the states before a step, as far as the step left these as they were."""
    grads = grads.copy()
    grads[1:, :running] = grads[:-1, :running]
    grads[0, :running] = 0
    return grads
