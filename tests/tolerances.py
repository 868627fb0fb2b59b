"""The tolerance policy of all tests. No test holds a constant of its own.

Two computations of one recurrent network in the same dtype differ by rounding alone. A value after
``steps`` steps, each with sums of ``length`` terms, is the end of a chain of K*T roundings, which
blocked, vectorised and fused summation orders shorten to about log2(K*T) that do not average out.
Stable recurrences (tanh, gates, weights of torch's initial size) do not amplify what came before.
Hence

    tolerance = 4 * ceil(log2(K * T)) * eps(dtype)

and an element passes if

    |actual - expected| <= tolerance * max(|expected|, scale of the tensor) + K * smallest normal

The last term lets values underflow. The scale is there because rounding errors follow the size of
the terms of a sum, and terms may cancel to anything. With rms the root mean square of the finite
elements of ``expected`` that are not zero, it is

    max(rms, min(unit, rms / sqrt(tolerance)))

where ``unit`` = 1, the size of gates and states, and of the inputs, parameters and incoming
gradients that tests draw. So a tensor of large values is held to its own size, one of small values
to the unit, since its terms may well have been of that size; but where all values are tiny, the
second term of ``min`` still holds the tensor to half of the digits that the tolerance asks for. The
comparison of a tensor with an unrelated one therefore fails whatever its size.

What to pass:
    steps   T, times the number of layers that the value has passed through
    length  longest sum of one step: I + H for outputs and states (of the widest layer); for
            gradients the largest of I + H, G*H (dh = da U) and B (the weights' gradients sum
            over T*B rows); ``accumulation_length`` computes that
    dtype   the lower of the two precisions, if they differ
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def eps_of(dtype: Any) -> float:
    """Distance from 1 to the next number of a NumPy or torch dtype, or of one's name."""
    if _name(dtype) == "bfloat16":  # NumPy has none; 8 bits of significand
        return 2.0**-7
    return float(np.finfo(_name(dtype)).eps)


def accumulation_length(
    input_size: int, hidden_size: int, *, gates: int = 0, batch: int = 0
) -> int:
    """``length`` of a layer: of its outputs, or with ``gates`` and ``batch`` of its gradients."""
    return max(input_size + hidden_size, gates * hidden_size, batch)


def tolerance(dtype: Any, steps: int, length: int) -> float:
    """4 * ceil(log2(length * steps)) * eps; at least one doubling is counted."""
    return 4 * math.ceil(math.log2(max(2, length * steps))) * eps_of(dtype)


def assert_close(
    actual: Any,
    expected: Any,
    *,
    dtype: Any,
    steps: int,
    length: int,
    unit: float = 1.0,
    name: str = "value",
) -> None:
    """Compare two NumPy arrays or torch tensors under the policy of this file.

    Shapes must be equal, NaN must stand in the same places, and infinities too with the same sign.
    The finite rest is compared in float64, in longdouble if either is one.

    Args:
        actual, expected: of any floating dtype; torch tensors on any device, with or without grad.
        dtype, steps, length: see the head of this file.
        unit: natural size of the terms that were summed, where a test draws others than of size 1.
        name: what the message calls the value.

    Raises:
        AssertionError: says how many elements differ, and where and by what the worst does.
    """
    actual, expected = _wide(actual), _wide(expected)
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    for what, mine, theirs in (
        ("NaN", np.isnan(actual), np.isnan(expected)),
        ("+inf", np.isposinf(actual), np.isposinf(expected)),
        ("-inf", np.isneginf(actual), np.isneginf(expected)),
    ):
        wrong = np.argwhere(mine != theirs)
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name}: {what} in other places than expected, {len(wrong)} of {mine.size}; "
                f"first at {at}: {actual[at]!s}, expected {expected[at]!s}"
            )
    finite = np.isfinite(expected)
    relative = tolerance(dtype, steps, length)
    difference = np.zeros(expected.shape, expected.dtype)
    np.subtract(actual, expected, out=difference, where=finite)
    difference = np.abs(difference)
    size = np.where(finite, np.abs(expected), 0)
    smallest = float(np.finfo("float32" if _name(dtype) == "bfloat16" else _name(dtype)).tiny)
    allowed = relative * np.maximum(size, _scale(size, relative, unit)) + length * smallest
    wrong = difference > allowed
    if wrong.any():
        worst = np.argmax(difference / allowed)
        at = tuple(int(k) for k in np.unravel_index(worst, wrong.shape))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements differ by more than the tolerance "
            f"{relative:.3g} ({dtype}, steps {steps}, length {length}); worst at {at}: "
            f"{actual[at]!s}, expected {expected[at]!s}, difference {difference[at]:.3g}, "
            f"allowed {allowed[at]:.3g}"
        )


def finite_difference_tolerance(dtype: Any) -> float:
    """Tolerance of a central difference of step eps^(1/3) along a direction of length 1.

    Relative to the larger of the function's value and the length of its gradient: truncation,
    O(step²), and rounding, O(eps / step), are then both about eps^(2/3); the factor of 32 is for
    the third derivative and for the roundings inside of the function.
    """
    return float(32 * eps_of(dtype) ** (2 / 3))


def _name(dtype: Any) -> str:
    """Name of a dtype of NumPy (class or instance) or torch, or given as a name."""
    text = str(dtype).removeprefix("torch.")
    return text if text == "bfloat16" or text != str(dtype) else np.dtype(dtype).name


def _scale(size: np.ndarray, relative: float, unit: float) -> float:
    nonzero = size[size > 0]
    if not nonzero.size:
        return 0.0  # nothing but zeros is expected, as of padding or dead units: those are exact
    largest = nonzero.max()  # divided out, so that squares do not overflow
    rms = float(largest * np.sqrt(np.mean((nonzero / largest) ** 2)))
    return max(rms, min(unit, rms / math.sqrt(relative)))


def _wide(value: Any) -> np.ndarray:
    """As a NumPy array of float64, or of longdouble if it is that."""
    if hasattr(value, "detach"):  # torch; bfloat16 has no NumPy dtype, and double holds all
        value = value.detach().double().cpu().numpy()
    array = np.asarray(value)
    return array.astype(np.promote_types(array.dtype, np.float64))
