"""A reservoir's units, run by a kernel:

    v = tanh(W_in x + b + W h')        h = (1 - leak) * h' + leak * v

with h' the state before the step. The maths is LeakyRNN's, whose alpha is 1 - leak. Which kernel
runs depends on the weights alone, so that results never depend on how they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _core, functional
from ..cpu import scratch
from .weights import Array, Weights

# Part of W that is not 0 from which the dense kernel is the faster one for few sequences
# (docs/reservoir.md, "Sparse or dense").
DENSE_FROM = {np.dtype(np.float32): 0.15, np.dtype(np.float64): 0.25}


class Units(Protocol):
    """What runs a reservoir."""

    def run(
        self, sequences: Sequence[Array], state: Array, keep: bool
    ) -> tuple[list[Array], Array]:
        """States of each sequence, each (T, H), and the final states (B, H).

        Args:
            sequences: B arrays (T, I), T >= 1, C-contiguous, of the weights' dtype.
            state: (B, H), before the first step.
            keep: whether states are wanted; else the list is empty.
        """

    def stepper(self, x: Array, state: Array) -> Callable[[], None]:
        """What takes ``state`` (B, H) one step on by the inputs x (B, I), in place, at each call.

        Both are C-contiguous arrays of the weights' dtype, to be written between the calls.
        """


def units_of(weights: Weights) -> Units:
    """The kernel for these weights."""
    part = weights.recurrent.nnz / len(weights.bias) ** 2
    return DenseUnits(weights) if part >= DENSE_FROM[weights.bias.dtype] else SparseUnits(weights)


def _empty(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    # torch's, as all memory that a kernel fills.
    found: NDArray[Any] = torch.empty(
        shape, dtype=getattr(torch, np.dtype(dtype).name), device="cpu"
    ).numpy()
    return found


def _in_slices(rows: NDArray[Any], lanes: int) -> NDArray[Any]:
    """(H, K) -> [slice][K][lane], padded with zeros."""
    units, width = rows.shape
    slices = -(-units // lanes)
    padded = np.zeros((slices * lanes, width), rows.dtype)
    padded[:units] = rows
    return np.ascontiguousarray(padded.reshape(slices, lanes, width).transpose(0, 2, 1))


class SparseUnits:
    """By the sparse kernel: csrc/cpu/reservoir.h, whose layout this packs."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        matrix, self._dtype = weights.recurrent, weights.bias.dtype
        float64 = self._dtype == np.float64
        units, inputs = weights.input.shape
        lanes = _core.reservoir_lanes(float64)
        fan_in = np.diff(matrix.indptr)
        fan_in = np.concatenate([fan_in, np.zeros(-units % lanes, fan_in.dtype)])
        widths = fan_in.reshape(-1, lanes).max(axis=1)
        offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        # An entry without a connection: weight 0 from the unit itself.
        lane = np.arange(lanes, dtype=np.int32)
        slice_of_entry = np.repeat(np.arange(len(widths), dtype=np.int32), widths)
        columns = slice_of_entry[:, None] * lanes + lane
        values = np.zeros(columns.shape, self._dtype)
        row = np.repeat(np.arange(units), np.diff(matrix.indptr))
        entry = offsets[row // lanes] + np.arange(matrix.nnz) - matrix.indptr[row]
        columns[entry, row % lanes] = matrix.indices
        values[entry, row % lanes] = matrix.data
        alpha = 1 - weights.leak
        self._packed = (
            offsets,
            columns,
            values,
            _in_slices(weights.input, lanes),
            _in_slices(weights.bias[:, None], lanes),
            _in_slices(alpha[:, None], lanes),
        )
        self.bound = _core.Reservoir(
            float64, units, inputs, *[_core.address(array) for array in self._packed]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The packed weights are for this machine's instruction set.
        return SparseUnits, (self._weights,)

    def run(
        self, sequences: Sequence[Array], state: Array, keep: bool
    ) -> tuple[list[Array], Array]:
        units = state.shape[1]
        order = sorted(range(len(sequences)), key=lambda b: -len(sequences[b]))
        lengths = [len(sequences[b]) for b in order]
        final = np.ascontiguousarray(state[order])
        states: list[Array] = []
        if keep:
            states = [_empty((length, units), self._dtype) for length in lengths]
        threads = torch.get_num_threads()
        workspace, _fresh = scratch(self.bound.workspace_bytes(len(order), threads))
        self.bound.run(
            lengths,
            [_core.address(sequences[b]) for b in order],
            [_core.address(array) for array in states],
            _core.address(final),
            workspace,
            threads,
        )
        back = np.argsort(order)
        return [states[i] for i in back] if keep else [], final[back]

    def stepper(self, x: Array, state: Array) -> Callable[[], None]:
        samples, threads = len(x), torch.get_num_threads()
        # Not the calling thread's scratch: the caller may be another thread next time.
        workspace = torch.empty(
            self.bound.workspace_bytes(samples, threads), dtype=torch.uint8, device="cpu"
        )
        rows = [_core.address(row) for row in x]
        arguments: Any = (
            [1] * samples,
            rows,
            [],
            _core.address(state),
            workspace.data_ptr(),
            threads,
        )

        def step(keep: tuple[Any, ...] = (x, state, workspace)) -> None:
            self.bound.run(*arguments)

        return step


class DenseUnits:
    """By LeakyRNN's kernel."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        arrays = (
            weights.input,
            weights.recurrent.toarray(),
            weights.bias,
            np.zeros_like(weights.bias),
            1 - weights.leak[None],
        )
        self._tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseUnits, (self._weights,)

    def run(
        self, sequences: Sequence[Array], state: Array, keep: bool
    ) -> tuple[list[Array], Array]:
        lengths = [len(sequence) for sequence in sequences]
        equal = len(set(lengths)) == 1
        # (A tensor of memory that must not be written warns.)
        writable = [np.require(sequence, requirements="W") for sequence in sequences]
        x = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in writable])
        with torch.no_grad():
            output, final = functional.leaky_rnn(
                x,
                torch.from_numpy(np.ascontiguousarray(state))[None],
                self._tensors,
                lengths=None if equal else torch.tensor(lengths),
            )
        states = [output[:length, b].numpy() for b, length in enumerate(lengths)] if keep else []
        return states, final[0].numpy()

    def stepper(self, x: Array, state: Array) -> Callable[[], None]:
        def step() -> None:
            state[:] = self.run(list(x[:, None]), state, False)[1]

        return step
