"""The tolerance policy itself: what it lets pass, and above all what it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tolerances import accumulation_length, assert_close, eps_of, tolerance

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_formula():
    assert tolerance(np.float32, 50, 256) == 4 * 14 * 2.0**-23
    assert tolerance("float64", 1, 1) == 4 * 2.0**-52
    assert accumulation_length(3, 5) == 8
    assert accumulation_length(3, 5, gates=4, batch=2) == 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_is_that_of_torch(dtype):
    assert eps_of(dtype) == torch.finfo(dtype).eps
    assert eps_of(str(dtype).removeprefix("torch.")) == torch.finfo(dtype).eps


def test_rounding_passes_and_three_tolerances_do_not():
    expected = np.random.default_rng(0).normal(size=(7, 5))
    allowed = tolerance("float32", 10, 8)
    settings = {"dtype": "float32", "steps": 10, "length": 8}
    assert_close(torch.tensor(expected, dtype=torch.float32), expected, **settings)
    actual = expected.copy()
    actual[3, 2] += 3 * allowed * max(1, abs(expected[3, 2]))
    with pytest.raises(AssertionError, match=r"out: 1 of 35 .* worst at \(3, 2\)"):
        assert_close(actual, expected, name="out", **settings)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1, 1e6])
@pytest.mark.parametrize("change", [lambda e: -e, lambda e: 1.01 * e, np.zeros_like])
def test_a_wrong_tensor_fails_whatever_its_size(dtype, size, change):
    expected = size * np.random.default_rng(0).normal(size=(4, 3)).astype(np.longdouble)
    settings = {"dtype": dtype, "steps": 50, "length": 256}
    assert_close(expected * (1 + np.finfo(dtype).eps), expected, **settings)
    with pytest.raises(AssertionError, match="differ"):
        assert_close(change(expected), expected, **settings)


def test_zeros_are_exact():
    with pytest.raises(AssertionError, match="differ"):
        assert_close([0.0, 1e-30], [0.0, 0.0], dtype="float32", steps=5, length=5)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1, np.nan], [1, 2]),
        ([1, 2], [np.nan, 2]),
        ([np.inf, 1], [-np.inf, 1]),
        ([np.inf, 1], [3, 1]),
        ([1], [1, 1]),
    ],
)
def test_nan_inf_and_shape_must_agree(actual, expected):
    with pytest.raises(AssertionError, match=r"other places|shape"):
        assert_close(actual, expected, dtype="float32", steps=1, length=1)


def test_nan_and_inf_in_the_same_places_pass():
    value = [np.nan, np.inf, -np.inf, 1.0]
    assert_close(value, value, dtype="float32", steps=1, length=1)
