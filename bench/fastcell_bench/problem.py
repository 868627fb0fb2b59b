"""The numbers of a case, drawn from a seed in every process alike, never sent through a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcell_bench.cases import Case

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """What every contender of a row is given.

    weights: torch's parameter names to arrays: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H),
             bias_ih_l0 and bias_hh_l0 (G*H,), then `_reverse`, then the next layers.
    input:   (T, B, I), zero where a sample has ended.
    output_gradient: (T, B, D*H), the gradient with respect to the output, zero likewise.
    lengths: (B,) int64, longest first.
    """

    weights: dict[str, Array]
    input: Array
    output_gradient: Array
    lengths: Array


def make_problem(case: Case, seed: int = 20) -> Problem:
    """Values that float32 represents, so that the float64 judge sees the very same problem."""
    rng = np.random.default_rng(seed)
    bound = np.float32(1.0 / np.sqrt(case.H))

    def uniform(*shape: int) -> Array:
        values = (rng.random(shape, dtype=np.float32) * 2 - 1) * bound
        return values.astype(case.dtype)

    def normal(*shape: int) -> Array:
        values = rng.standard_normal(shape, dtype=np.float32).astype(case.dtype)
        lengths_in_time = np.arange(case.T)[:, None] < lengths[None, :]
        return np.where(lengths_in_time[:, :, None], values, np.zeros((), values.dtype))

    lengths = np.asarray(case.lengths, dtype=np.int64)
    rows = case.gates * case.H
    weights: dict[str, Array] = {}
    for layer, width in enumerate(case.layer_inputs):
        for suffix in ("", "_reverse")[: case.directions]:
            weights[f"weight_ih_l{layer}{suffix}"] = uniform(rows, width)
            weights[f"weight_hh_l{layer}{suffix}"] = uniform(rows, case.H)
            weights[f"bias_ih_l{layer}{suffix}"] = uniform(rows)
            weights[f"bias_hh_l{layer}{suffix}"] = uniform(rows)
    return Problem(
        weights=weights,
        input=normal(case.T, case.B, case.I),
        output_gradient=normal(case.T, case.B, case.directions * case.H),
        lengths=lengths,
    )


def pack(padded: Array, lengths: Array) -> Array:
    """(T, B, ...) to the rows that exist, (sum of lengths, ...), step by step, longest first."""
    alive = np.arange(padded.shape[0])[:, None] < lengths[None, :]
    packed: Array = padded[alive]
    return packed
