"""Results equal within tolerance, or no time is printed.

The truth of a row is torch.nn in float64, on the same float32 values, in a process that is never
timed; fastcell and every peer are held against it, so that a difference has an author.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.problem import Array


@dataclass(frozen=True)
class Verdict:
    """How far a contender is from the truth: the largest error of the worst of its arrays."""

    equal: bool
    error: float | None
    tolerance: float
    sentence: str = ""


def tolerance(case: Case) -> float:
    """`4*ceil(log2(K))*eps`, K the longest chain of additions behind one number: I + H terms per
    step over T steps, and in training a weight's gradient also sums over the batch."""
    chain = (max(case.layer_inputs) + case.H) * case.T * (case.B if case.training else 1)
    return 4 * math.ceil(math.log2(max(chain, 2))) * float(np.finfo(case.dtype).eps)


def judge(case: Case, found: Mapping[str, Array], truth: Mapping[str, Array]) -> Verdict:
    """Compare each array: max|found - truth| / max|truth| against the tolerance."""
    allowed = tolerance(case)
    missing = sorted(truth.keys() - found.keys())
    if missing:
        return Verdict(False, None, allowed, f"gave no {', '.join(missing)}")
    worst, worst_name = 0.0, ""
    for name, expected in truth.items():
        got = found[name]
        if got.shape != expected.shape:
            sentence = f"{name} has shape {got.shape}, not {expected.shape}"
            return Verdict(False, None, allowed, sentence)
        if str(got.dtype) != case.dtype:
            return Verdict(False, None, allowed, f"{name} is {got.dtype}, not {case.dtype}")
        if not np.isfinite(got).all():
            return Verdict(False, None, allowed, f"{name} is not finite everywhere")
        scale = float(np.abs(expected).max(initial=0.0)) or 1.0
        error = float(np.abs(got - expected).max(initial=0.0)) / scale
        if error >= worst:
            worst, worst_name = error, name
    if worst > allowed:
        sentence = f"{worst_name} is off by {worst:.1e} of its largest value; {allowed:.1e} allowed"
        return Verdict(False, worst, allowed, sentence)
    return Verdict(True, worst, allowed)
