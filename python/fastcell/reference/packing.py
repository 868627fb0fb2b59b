"""Batches of unequal lengths: padded (T, B, F) to packed rows (Σ lengths, F) and back."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .cells import Array

Integers = NDArray[np.integer[Any]]
Scalar = TypeVar("Scalar", bound=np.generic)


class Packing(NamedTuple):
    """The layout of torch's PackedSequence: time-major rows, samples sorted by falling length.

    Padding is left out, not masked: whatever it holds, NaN included, has no influence.
    """

    steps: int
    batch: int
    batch_sizes: list[int]  # (T,) samples that run at each step
    order: Integers | None  # (B,) samples by falling length; None: all of them run all T steps

    @classmethod
    def of(cls, steps: int, batch: int, lengths: Integers | None) -> Packing:
        """Layout for ``lengths`` (B,), each between 0 and T, or for full length if None."""
        if lengths is None:
            return cls(steps, batch, [batch] * steps, None)
        running = np.arange(steps)[:, None] < lengths
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        return cls(steps, batch, running.sum(axis=1).tolist(), order)

    def pack(self, padded: NDArray[Scalar]) -> NDArray[Scalar]:
        """(T, B, F) -> (Σ lengths, F)."""
        if self.order is None:
            return padded.reshape(self.steps * self.batch, padded.shape[2])
        rows: NDArray[Scalar] = padded[self._places()]
        return rows

    def unpack(self, rows: Array) -> Array:
        """(Σ lengths, F) -> (T, B, F), zero past each sample's length."""
        if self.order is None:
            return rows.reshape(self.steps, self.batch, rows.shape[1])
        padded = np.zeros((self.steps, self.batch, rows.shape[1]), rows.dtype)
        padded[self._places()] = rows
        return padded

    def sort(self, states: Array) -> Array:
        """(K, B, F) with the samples in the order of the packed rows."""
        return states if self.order is None else states[:, self.order]

    def unsort(self, states: Array) -> Array:
        """The inverse of ``sort``."""
        return states if self.order is None else states[:, np.argsort(self.order)]

    def _places(self) -> tuple[Integers, Integers]:
        """Time and sample of every row."""
        assert self.order is not None
        time, rank = np.nonzero(np.arange(self.batch) < np.array(self.batch_sizes)[:, None])
        return time, self.order[rank]
