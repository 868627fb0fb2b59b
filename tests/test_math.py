"""The contract at the head of csrc/cpu/math.h, measured: error in ULP, special values, edges.

An error is counted in units in the last place of the exact result: the distance between the two
numbers of the format that enclose it. Results below the smallest normal number have no contract but
that they stay there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastcell import _core

CONTRACT = 3.0  # ULP
INFINITY_BITS = 0x7F800000
DTYPES = [np.float32, np.float64]
# A wider format, to compute what is exact enough: 53 bits for 24, 64 (or 113) for 53.
WIDER: dict[Any, Any] = {np.float32: np.float64, np.float64: np.longdouble}


@pytest.fixture(autouse=True, params=[False, True], ids=["divided", "estimated"])
def quotients(request):
    """Both ways to divide, whichever this CPU would take."""
    if request.param and _core.isa() != "avx512":
        pytest.skip("only AVX-512 estimates")
    before = _core.estimate_quotients(request.param)
    yield
    _core.estimate_quotients(before)


def kernel(name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    getattr(_core, name)(x.ctypes.data, y.ctypes.data, x.size, x.dtype == np.float64)
    return y


def exact(name: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(WIDER[x.dtype.type])
    with np.errstate(over="ignore"):
        return np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))


def worst_ulp(name: str, x: np.ndarray) -> tuple[float, Any]:
    """The largest error over x where the result is a normal number, and where it is."""
    y, truth = kernel(name, x), exact(name, x)
    size = np.abs(truth)
    ulp = np.spacing(np.maximum(size, np.finfo(x.dtype).tiny).astype(x.dtype))
    normal = size >= np.finfo(x.dtype).tiny
    error = np.where(normal, np.abs(y.astype(truth.dtype) - truth) / ulp, 0)
    # tanh keeps what is smaller than normal: tanh(x) = x there.
    small = np.abs(y) < np.finfo(x.dtype).tiny
    assert np.array_equal(y[~normal], x[~normal]) if name == "tanh" else small[~normal].all()
    at = int(np.argmax(error))
    return float(error[at]), x[at]


def every_float(first: int, last: int, step: int, sign: int) -> Iterator[np.ndarray]:
    """float32 numbers by their bits, in blocks that fit in a cache."""
    block = 1 << 18
    for start in range(first, last, block * step):
        bits = np.arange(start, min(start + block * step, last), step, dtype=np.uint32)
        yield (bits | np.uint32(sign << 31)).view(np.float32)


def measure(name: str, blocks: Iterator[np.ndarray]) -> tuple[float, Any]:
    return max(worst_ulp(name, x) for x in blocks)


def bits_of(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_float32(name, sign):
    """A regular sample of all floats, one in seven where the function is not all but linear."""
    low, high = bits_of(2.0**-13), bits_of(100)
    for first, last, step in [(0, low, 997), (low, high, 7), (high, INFINITY_BITS, 997)]:
        error, x = measure(name, every_float(first, last, step, sign))
        assert error <= CONTRACT, f"{error} ULP at {x!r}"


@pytest.mark.slow
@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_every_float32(name, sign, record_property):
    """All 2^31 floats of a sign but NaN: minutes. `-rA` prints what is measured."""
    error, x = measure(name, every_float(0, INFINITY_BITS, 1, sign))
    print(f"{_core.isa()} {name}: {error:.3f} ULP at {x!r}")
    assert error <= CONTRACT


def structured_doubles() -> np.ndarray:
    """Every exponent, and the multiples of ln 2 / 2 where the reduced argument changes sign."""
    rng = np.random.default_rng(0)
    exponents = np.ldexp(1 + rng.random((64, 2098)), np.arange(-1074, 1024))
    multiples = np.arange(1, 2100) * np.log(2) / 4
    near = multiples[:, None] * (1 + np.arange(-20, 21) * 2.0**-52)
    ranges = [rng.uniform(0, size, 200_000) for size in (1e-3, 0.5, 2, 25, 710)]
    return np.concatenate([exponents.ravel(), near.ravel(), *ranges])


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_float64(name, sign):
    if np.finfo(np.longdouble).nmant <= 60:
        pytest.skip("long double is no wider than double on this machine")
    error, x = worst_ulp(name, sign * structured_doubles())
    print(f"{_core.isa()} {name}: {error:.3f} ULP at {x!r}")
    assert error <= CONTRACT, f"{error} ULP at {x!r}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    tiny = np.finfo(dtype).tiny
    least = np.nextafter(dtype(0), dtype(1))
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, least, -least, tiny, -tiny], dtype)
    tanh, sigmoid = kernel("tanh", x), kernel("sigmoid", x)
    np.testing.assert_array_equal(tanh, [1, -1, np.nan, np.nan, *x[4:]])
    np.testing.assert_array_equal(np.signbit(tanh[4:]), np.signbit(x[4:]))
    np.testing.assert_array_equal(sigmoid, [1, 0, np.nan, np.nan, *[0.5] * 6])
    largest = np.array([np.finfo(dtype).max, -np.finfo(dtype).max], dtype)
    np.testing.assert_array_equal(kernel("tanh", largest), [1, -1])
    np.testing.assert_array_equal(kernel("sigmoid", largest), [1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_range_and_symmetry(dtype):
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-10, 3, 200_000)
    x = np.sort(np.concatenate([size, -size]).astype(dtype))
    tanh, sigmoid = kernel("tanh", x), kernel("sigmoid", x)
    assert np.abs(tanh).max() == 1
    assert sigmoid.min() >= 0
    assert sigmoid.max() == 1
    np.testing.assert_array_equal(tanh, -kernel("tanh", -x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_any_count_at_any_address(name, dtype):
    """A value does not depend on its neighbours, and nothing outside of the array is written."""
    values = np.random.default_rng(0).normal(size=70).astype(dtype)
    whole = kernel(name, values)
    for count in range(67):
        for start in (0, 1, 3):
            y = np.full(80, np.nan, dtype)
            into = y[start : start + count]
            x = values[start : start + count]
            getattr(_core, name)(x.ctypes.data, into.ctypes.data, count, dtype is np.float64)
            np.testing.assert_array_equal(into, whole[start : start + count])
            assert np.isnan(np.delete(y, np.s_[start : start + count])).all()
