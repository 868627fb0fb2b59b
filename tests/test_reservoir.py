"""Reservoirs: kernel against reference, the estimator's contract, and what it can learn."""

from __future__ import annotations

import copy
import json
import pickle
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.linalg import eig
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastcell
from fastcell import _core
from fastcell.reference import reservoir as reference
from fastcell.reservoir import ReservoirRNN, spectral_radius
from fastcell.reservoir.ridge import RidgeSums
from fastcell.reservoir.units import DenseUnits, SparseUnits, units_of
from fastcell.reservoir.weights import Weights, random_topology, scaled
from support import python, threads
from tolerances import assert_close, eps_of

pytestmark = pytest.mark.usefixtures("poison")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "reservoir_mackey_glass.py"
F32, F64 = np.float32, np.float64


def of_example(name: str) -> Any:
    """A function of the example, which is no module of a package."""
    return runpy.run_path(str(EXAMPLE))[name]


mackey_glass, nrmse, linear_error = map(of_example, ("mackey_glass", "nrmse", "linear_error"))


def draw(
    units: int, inputs: int, dtype: Any, density: float, seed: int = 0, ragged: bool = False
) -> Weights:
    """Weights; ``ragged``: units of any number of connections, none among them."""
    rng = np.random.default_rng(seed)
    if ragged:
        matrix = rng.uniform(-1, 1, (units, units))
        matrix *= rng.random((units, units)) < density * rng.uniform(0, 2, (units, 1))
        matrix[rng.integers(units)] = 0
        matrix = sparse.csr_array(matrix)
    else:
        matrix = random_topology(units, max(1, round(units * density)), rng)
    return Weights(
        rng.uniform(-1, 1, (units, inputs)).astype(dtype),
        rng.uniform(-1, 1, units).astype(dtype),
        (matrix * (units * density / 3 + 1) ** -0.5).astype(dtype),
        rng.uniform(0.1, 1, units).astype(dtype),
    )


def random_sequences(lengths: list[int], inputs: int, dtype: Any, seed: int = 1) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, inputs)).astype(dtype) for length in lengths]


# --- the kernel -----------------------------------------------------------------------------------

SHAPES = [
    # units, inputs, density, ragged, lengths
    (1, 1, 1.0, False, [3]),
    (2, 1, 0.5, False, [1]),
    (15, 3, 0.2, False, [20, 20]),
    (16, 1, 0.1, True, [9]),
    (37, 4, 0.1, True, [7, 30, 1]),
    (67, 2, 0.05, False, [25] * 16),
    (100, 7, 0.1, True, [12 + 7 * b % 19 for b in range(19)]),
    (130, 1, 0.03, False, [3] * 33),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kernel", [SparseUnits, DenseUnits])
def test_kernels_against_the_reference(kernel, dtype, shape):
    units, inputs, density, ragged, lengths = shape
    weights = draw(units, inputs, dtype, density, ragged=ragged)
    sequences = random_sequences(lengths, inputs, dtype)
    state = np.random.default_rng(2).uniform(-1, 1, (len(lengths), units)).astype(dtype)
    before = state.copy()
    states, final = kernel(weights).run(sequences, state, True)
    none, same = kernel(weights).run(sequences, state, False)
    assert none == []
    assert np.array_equal(state, before), "the caller's state was written to"
    assert np.array_equal(final, same)
    wide = [np.asarray(part, F64) for part in weights[:2]]
    matrix, leak = weights.recurrent.toarray().astype(F64), weights.leak.astype(F64)
    for b, x in enumerate(sequences):
        expected = reference.run(x.astype(F64), *wide, matrix, leak, state[b].astype(F64))
        assert states[b].dtype == dtype
        assert np.array_equal(states[b][-1], final[b])
        assert_close(states[b], expected, dtype=dtype, steps=len(x), length=units + inputs)


def test_the_reference_is_the_equation():
    weights = draw(3, 2, F64, 1.0)
    (x,) = random_sequences([4], 2, F64)
    h = np.array([0.5, -0.5, 0.1])
    W = weights.recurrent.toarray()
    found = reference.run(x, weights.input, weights.bias, W, weights.leak, h)
    for t in range(4):
        v = [
            np.tanh(
                weights.input[i] @ x[t] + weights.bias[i] + sum(W[i, j] * h[j] for j in range(3))
            )
            for i in range(3)
        ]
        h = np.array(
            [(1 - a) * old + a * new for a, old, new in zip(weights.leak, h, v, strict=True)]
        )
        assert_close(found[t], h, dtype=F64, steps=t + 1, length=5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("ragged", [False, True])
def test_same_bits_for_any_threads_batch_and_cut(dtype, ragged):
    weights = draw(203, 3, dtype, 0.05, ragged=ragged)
    kernel = SparseUnits(weights)
    lengths = [40 - b % 7 for b in range(37)]
    sequences = random_sequences(lengths, 3, dtype)
    state = np.random.default_rng(2).uniform(-1, 1, (37, 203)).astype(dtype)
    with threads(1):
        states, final = kernel.run(sequences, state, True)
        for b in (0, 6, 36):
            alone, last = kernel.run([sequences[b]], state[b : b + 1], True)
            assert np.array_equal(alone[0], states[b])
            assert np.array_equal(last[0], final[b])
        some = [5, 17, 30]
        parts, _ = kernel.run([sequences[b] for b in some], state[some], True)
        assert all(np.array_equal(parts[i], states[b]) for i, b in enumerate(some))
        pieces, at = [], state[:1]
        for begin, end in ((0, 1), (1, 20), (20, 40)):
            (piece,), at = kernel.run([sequences[0][begin:end]], at, True)
            pieces.append(piece)
        assert np.array_equal(np.concatenate(pieces), states[0])
    for count, ways in ((2, [(2, 1), (1, 2)]), (3, [(3, 1), (1, 3)]), (4, [(2, 2)])):
        for way in ways:
            kernel.bound.force_schedule(*way)
            with threads(count):
                many, last = kernel.run(sequences, state, True)
                (one,), _ = kernel.run(sequences[:1], state[:1], True)
            assert all(np.array_equal(a, b) for a, b in zip(many, states, strict=True)), way
            assert np.array_equal(last, final)
            assert np.array_equal(one, states[0])
    kernel.bound.force_schedule(0, 0)
    with threads(3):
        many, _ = kernel.run(sequences, state, True)
    assert all(np.array_equal(a, b) for a, b in zip(many, states, strict=True))


def test_the_kernel_refuses_lengths_that_rise():
    kernel = SparseUnits(draw(5, 1, F32, 0.5)).bound
    for lengths, x in (([1, 2], [0, 0]), ([], []), ([0], [0]), ([2, 1], [0])):
        with pytest.raises(ValueError, match="lengths must fall"):
            kernel.run(lengths, x, [], 0, 0, 1)


def test_nan_stays_in_its_sequence():
    weights = draw(40, 2, F32, 0.2)
    sequences = random_sequences([9] * 5, 2, F32)
    clean, _ = SparseUnits(weights).run(sequences, np.zeros((5, 40), F32), True)
    sequences[2][4, 1] = np.nan
    states, _ = SparseUnits(weights).run(sequences, np.zeros((5, 40), F32), True)
    for b in (0, 1, 3, 4):
        assert np.array_equal(states[b], clean[b])
    assert np.array_equal(states[2][:4], clean[2][:4])
    assert np.isnan(states[2][4:]).all()


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_every_instruction_set(isa):
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    arguments += [
        "-k",
        "kernels_against or same_bits_for or nan_stays",
        str(ROOT / "tests" / Path(__file__).name),
    ]
    assert " passed" in python(code, *arguments, FASTCELL_ISA=isa, OMP_NUM_THREADS="1").stdout


def test_the_kernel_is_the_denser_matrixs_or_the_sparser_ones():
    for dtype in (F32, F64):
        assert type(units_of(draw(50, 1, dtype, 0.1))) is SparseUnits
        assert type(units_of(draw(50, 1, dtype, 0.5))) is DenseUnits


# --- scikit-learn's contract ----------------------------------------------------------------------

# Rows are the steps of one sequence: what an estimator of independent samples promises about them
# cannot hold.
TIME_SERIES = dict.fromkeys(
    ["check_methods_sample_order_invariance", "check_methods_subset_invariance"],
    "rows are the steps of one sequence: others before a step change what it gives",
)


@parametrize_with_checks(
    [ReservoirRNN(n_reservoir=60), ReservoirRNN(n_reservoir=60, density=1.0)],
    expected_failed_checks=lambda estimator: TIME_SERIES,
    xfail_strict=True,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_estimator(estimator, check):
    check(estimator)


def test_not_fitted():
    for call in ("predict", "transform"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(ReservoirRNN(), call)(np.zeros((3, 1)))
    with pytest.raises(NotFittedError):
        ReservoirRNN().generate(3, np.zeros((3, 1)))
    with pytest.raises(NotFittedError):
        ReservoirRNN().score(np.zeros((3, 1)), np.zeros(3))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_pickle_copy_and_clone(dtype, density):
    (x,) = random_sequences([80], 2, dtype)
    esn = ReservoirRNN(30, density=density, random_state=0).fit(x)
    found = esn.predict(x)
    assert found.dtype == dtype
    for other in (
        pickle.loads(pickle.dumps(esn)),
        copy.deepcopy(esn),
        clone(esn).fit(x),
    ):
        assert np.array_equal(other.predict(x), found)
        assert np.array_equal(other.generate(5, x), esn.generate(5, x))
        other.partial_fit(x)  # the sums came along
        assert not np.array_equal(other.predict(x), found)


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_pickle_for_another_machine(isa, tmp_path):
    """The packed weights are laid out for an instruction set; they are packed anew."""
    (x,) = random_sequences([80], 2, F64)
    esn = ReservoirRNN(30, random_state=0).fit(x)
    given, found = tmp_path / "given.pickle", tmp_path / "found.npy"
    given.write_bytes(pickle.dumps((esn, x)))
    code = """
import pickle, sys, numpy
esn, x = pickle.load(open(sys.argv[1], "rb"))
numpy.save(sys.argv[2], esn.transform(x))
"""
    python(code, str(given), str(found), FASTCELL_ISA=isa)
    assert_close(np.load(found), esn.transform(x), dtype=F64, steps=80, length=32)


def test_without_scikit_learn():
    code = """
import sys
import fastcell
assert "sklearn" not in sys.modules, "imported before it is asked for"
sys.modules["sklearn"] = None
try:
    fastcell.ReservoirRNN
except ImportError as error:
    print(error)
"""
    said = python(code).stdout
    assert "needs scikit-learn" in said
    assert "fastcell[reservoir]" in said
    with pytest.raises(AttributeError, match="no attribute 'ReservoirRRN'"):
        fastcell.ReservoirRRN  # noqa: B018
    assert fastcell.ReservoirRNN is ReservoirRNN


# --- the weights ----------------------------------------------------------------------------------


def largest(matrix: Any) -> float:
    return float(np.abs(np.linalg.eigvals(sparse.csr_array(matrix).toarray())).max())


RANDOM = [(units, 3, seed) for units in (30, 120) for seed in range(8)] + [(250, 25, 8)]


@pytest.mark.parametrize(("units", "fan_in", "seed"), RANDOM)
def test_spectral_radius_of_random_weights(units, fan_in, seed):
    matrix = random_topology(units, fan_in, np.random.default_rng(seed))
    allowed = radius_error(matrix.toarray())
    assert abs(spectral_radius(matrix) - largest(matrix)) <= allowed
    assert abs(spectral_radius(scaled(matrix, 0.7)) - 0.7) <= allowed


def radius_error(matrix: np.ndarray) -> float:
    """What rounding does to the largest eigenvalue, the more the less normal the matrix is."""
    values, left, right = eig(matrix, left=True, right=True)
    at = np.abs(values).argmax()
    condition = 1 / abs(np.vdot(left[:, at], right[:, at]))
    return float(len(matrix) * eps_of(F64) * condition * np.linalg.norm(matrix, 2))


@pytest.mark.parametrize("units", [40, 300])
def test_spectral_radius_of_a_dominant_pair_and_of_a_negative_number(units):
    """On the first two units a rotation by 1 radian, larger than all else; or -2."""
    rng = np.random.default_rng(0)
    rest = scaled(random_topology(units - 2, 5, rng), 0.5)
    turn = 1.25 * np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    for block, radius in ((turn, 1.25), (np.diag([-2.0, 1.0]), 2.0)):
        found = spectral_radius(sparse.block_diag([block, rest], format="csr"))
        assert_close(np.array(found), np.array(radius), dtype=F64, steps=1, length=units)


def test_spectral_radius_of_a_ring(monkeypatch):
    """All eigenvalues have the same size: no iteration tells the largest."""
    ring = sparse.csr_array(np.roll(np.eye(130), 1, axis=0) * 0.5)
    monkeypatch.setattr("fastcell.reservoir.weights._ARNOLDI_VECTORS", (20,))
    assert_close(np.array(spectral_radius(ring)), np.array(0.5), dtype=F64, steps=1, length=130)
    monkeypatch.setattr("fastcell.reservoir.weights._DENSE_LAST", 129)
    with pytest.raises(ValueError, match=r"of 130 units was not found.*spectral_radius=None"):
        spectral_radius(ring)


def test_spectral_radius_zero():
    chain = np.diag(np.ones(9), -1)
    assert spectral_radius(np.zeros((5, 5))) == 0
    assert spectral_radius(chain) == 0
    esn = ReservoirRNN(10, recurrent_weights=chain)
    with pytest.raises(ValueError, match=r"spectral radius 0 .*10 units, 9 connections.*=0.9"):
        esn.fit(np.zeros((20, 1)))
    esn.set_params(spectral_radius=None).fit(np.zeros((20, 1)))
    assert np.array_equal(esn.recurrent_weights_.toarray(), chain)


def test_drawn_weights():
    x = random_sequences([50], 3, F64)[0]
    esn = ReservoirRNN(
        120, density=0.05, input_scaling=[0.1, 1, 10], bias_scaling=0.5, spectral_radius=1.3,
        leak=np.linspace(0.1, 1, 120), random_state=3,
    ).fit(x)  # fmt: skip
    W = esn.recurrent_weights_
    assert set(np.diff(W.indptr)) == {6}, "each unit has as many connections"
    assert abs(largest(W) - 1.3) <= radius_error(W.toarray())
    most = np.abs(esn.input_weights_).max(axis=0) / [0.1, 1, 10]
    assert ((most > 0.9) & (most <= 1)).all()
    assert 0.45 < np.abs(esn.bias_).max() <= 0.5
    assert np.array_equal(esn.leak_, np.linspace(0.1, 1, 120))
    assert_close(
        esn.transform(x),
        reference.run(x, esn.input_weights_, esn.bias_, W.toarray(), esn.leak_, np.zeros(120)),
        dtype=F64, steps=50, length=123,
    )  # fmt: skip


@pytest.mark.parametrize("units", [4, 40])
def test_weights_of_ones_own(units):
    """An entry in two parts is their sum; what was given stays as it is. (4 units: dense.)"""
    ring = np.arange(units)
    columns = np.repeat((ring + 1) % units, 2)
    given = sparse.csr_matrix((np.full(2 * units, 0.25), columns, 2 * np.arange(units + 1)))
    esn = ReservoirRNN(units, recurrent_weights=given, spectral_radius=0.8, random_state=0)
    x = random_sequences([20], 1, F64)[0]
    states = esn.fit(x).transform(x)
    assert given.nnz == 2 * units
    assert_close(
        esn.recurrent_weights_.toarray(), 0.8 * np.roll(np.eye(units), 1, axis=1),
        dtype=F64, steps=1, length=units,
    )  # fmt: skip
    expected = reference.run(
        x, esn.input_weights_, esn.bias_, 0.8 * np.roll(np.eye(units), 1, axis=1), esn.leak_,
        np.zeros(units),
    )  # fmt: skip
    assert_close(states, expected, dtype=F64, steps=20, length=units + 1)


def test_random_state():
    x = random_sequences([40], 1, F64)[0]
    one, same, other = (ReservoirRNN(20, random_state=s).fit(x).predict(x) for s in (5, 5, 6))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    generator = np.random.RandomState(5)
    assert np.array_equal(ReservoirRNN(20, random_state=generator).fit(x).predict(x), one)


# --- the readout ----------------------------------------------------------------------------------


def conditioned(rows: np.ndarray, ridge: float) -> float:
    """By how much solving from sums of products may be off, relative to the solution's size."""
    rows = rows - rows.mean(axis=0)
    gram = rows.T @ rows + ridge * np.eye(rows.shape[1])
    return rows.shape[1] * eps_of(F64) * float(np.linalg.cond(gram))


@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_the_readout_is_ridge_regression(ridge):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 2)), rng.normal([0, 10, -1000], size=(200, 3))
    esn = ReservoirRNN(25, ridge=ridge, washout=20, random_state=0).fit(x, y)
    rows = np.concatenate([x, esn.transform(x)], axis=1)[20:]
    W, c = reference.readout(rows, y[20:], ridge)
    allowed = conditioned(rows, ridge) * np.linalg.norm(y)
    assert np.abs(esn.coef_ - W).max() <= allowed
    assert np.abs(esn.intercept_ - c).max() <= allowed
    other = Ridge(alpha=ridge).fit(rows, y[20:])
    assert np.abs(esn.coef_ - other.coef_).max() <= allowed
    assert np.abs(esn.predict(x)[20:] - other.predict(rows)).max() <= allowed * len(W[0])
    assert np.abs(esn.coef_).max() > 1e3 * allowed, "the comparison would pass for anything"
    one = ReservoirRNN(25, ridge=ridge, washout=20, random_state=0).fit(x, y[:, 1])
    assert one.coef_.shape == (27,)
    assert one.predict(x).shape == (200,)
    assert np.abs(one.predict(x) - esn.predict(x)[:, 1]).max() <= allowed * len(W[0])


def test_sums_in_pieces():
    """Means that are large beside the deviations cost no digits, whatever the pieces."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(90, 4)) + 1e6, rng.normal(size=(90, 2)) - 1e5
    whole = RidgeSums(4, 2)
    whole.add(z, y)
    W, c = whole.solve(1e-3)
    exact, _ = reference.readout(z - z.mean(axis=0), y - y.mean(axis=0), 1e-3)
    allowed = (
        conditioned(z, 1e-3) * eps_of(F64) ** -1 * np.spacing(1e6) * np.linalg.norm(y - y.mean(0))
    )
    assert np.abs(W - exact).max() <= allowed
    assert np.abs(exact).max() > 1e3 * allowed
    pieces = RidgeSums(4, 2)
    for begin, end in ((0, 1), (1, 40), (40, 40), (40, 90)):
        pieces.add(z[begin:end], y[begin:end])
    assert pieces.rows == 90
    found, constant = pieces.solve(1e-3)
    assert np.abs(found - W).max() <= allowed
    assert np.abs(constant - c).max() <= allowed * 1e6 * 4


def test_no_ridge_and_too_few_rows():
    """The shortest of the many solutions, which meets every target."""
    x = random_sequences([12], 1, F64)[0]
    y = np.sin(np.arange(12.0))
    esn = ReservoirRNN(40, ridge=0, random_state=0).fit(x, y)
    assert np.abs(esn.predict(x) - y).max() < 1e-3 * np.abs(y).max()
    rows = np.concatenate([x, esn.transform(x)], axis=1)
    shortest = np.linalg.pinv(rows - rows.mean(axis=0)) @ (y - y.mean())
    assert np.linalg.norm(esn.coef_) <= np.linalg.norm(shortest) * 1.001


@pytest.mark.parametrize("dtype", [F32, F64])
def test_partial_fit_is_fit(dtype):
    (x,) = random_sequences([400], 2, dtype)
    y = np.cumsum(x, axis=0)
    make = lambda: ReservoirRNN(20, ridge=1e-2, washout=30, random_state=0)  # noqa: E731
    whole = make().fit(x, y)
    parts = make().partial_fit(x[:150], y[:150])
    assert not np.array_equal(parts.coef_, whole.coef_)
    for begin, end in ((150, 151), (151, 400)):
        parts.partial_fit(x[begin:end], y[begin:end], continues=True)
    rows = np.concatenate([x, whole.transform(x)], axis=1).astype(F64)[30:]
    allowed = conditioned(rows, 1e-2) * np.linalg.norm(y)
    assert np.abs(parts.coef_ - whole.coef_).max() <= allowed
    assert np.abs(whole.coef_).max() > 1e3 * allowed
    # Next steps: the row where two pieces meet is in both.
    whole, parts = make().fit(x), make().partial_fit(x[:200])
    parts.partial_fit(x[199:], continues=True)
    assert np.abs(parts.coef_ - whole.coef_).max() <= allowed
    # Another sequence, with a washout of its own, and several at once.
    one, other = x[:200], x[200:]
    together = make().fit([one, other])
    apart = make().partial_fit(one).partial_fit(other)
    assert np.abs(apart.coef_ - together.coef_).max() <= allowed
    assert np.abs(apart.coef_ - whole.coef_).max() > allowed


def test_the_washout_counts_neither_in_fitting_nor_in_score():
    x = random_sequences([100], 1, F64)[0]
    y = np.roll(x[:, 0], 1)
    spoilt = y.copy()
    spoilt[:10] = 1e6
    esn = ReservoirRNN(30, washout=10, random_state=0).fit(x, y)
    other = ReservoirRNN(30, washout=10, random_state=0).fit(x, spoilt)
    assert np.array_equal(esn.coef_, other.coef_)
    assert esn.score(x, y) == esn.score(x, spoilt) == r2_score(y[10:], esn.predict(x)[10:])
    weight = np.random.default_rng(0).random(100)
    assert esn.score(x, y, weight) == r2_score(
        y[10:], esn.predict(x)[10:], sample_weight=weight[10:]
    )
    assert esn.score(x) == r2_score(x[11:], esn.predict(x[:-1])[10:])


# --- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_forms_of_sequences(density):
    lengths = [50, 20, 33]
    sequences = random_sequences(lengths, 2, F32)
    targets = [np.stack([x.sum(axis=1), x[:, 0]], axis=1) for x in sequences]
    esn = ReservoirRNN(31, density=density, random_state=0).fit(sequences, targets)
    for call in (esn.predict, esn.transform):
        together = call(sequences)
        assert [len(found) for found in together] == lengths
        for x, found in zip(sequences, together, strict=True):
            assert np.array_equal(call(x), found)
        batch = np.stack([x[:20] for x in sequences])
        found = call(batch)
        assert found.shape[:2] == (3, 20)
        assert np.array_equal(found[2], together[2][:20])
        for x in (torch.from_numpy(batch), [torch.from_numpy(x) for x in batch]):
            tensors = call(x)
            assert isinstance(tensors[0], torch.Tensor)
            assert np.array_equal(torch.stack(list(tensors)).numpy(), found)
        rows, state = call(sequences[0][:30], return_state=True)
        rest, state = call(sequences[0][30:], initial_state=state, return_state=True)
        assert np.array_equal(np.concatenate([rows, rest]), together[0])
        assert state.shape == (31,)
        _, states = call(sequences, return_state=True)
        assert np.array_equal(states[0], state)
    assert np.array_equal(states, np.stack([found[-1] for found in together]))
    batch_targets = np.stack([y[:20] for y in targets])
    from_batch = ReservoirRNN(31, density=density, random_state=0).fit(batch, batch_targets)
    from_list = clone(from_batch).fit(list(batch), list(batch_targets))
    assert np.array_equal(from_batch.coef_, from_list.coef_)
    assert from_batch.score(batch, batch_targets) == from_list.score(list(batch), batch_targets)
    flat = ReservoirRNN(31, density=density, random_state=0).fit(batch, batch_targets[..., 0])
    assert flat.predict(batch).shape == (3, 20)
    assert ReservoirRNN(31).fit(batch.tolist()).predict(batch.tolist())[0].shape == (20, 2)


def test_long_sequences_are_run_in_pieces(monkeypatch):
    sequences = random_sequences([70, 3, 41], 1, F64)
    esn = ReservoirRNN(13, washout=2, random_state=0).fit(sequences)
    found = esn.predict(sequences)
    monkeypatch.setattr("fastcell.reservoir.estimator._PIECE", 13 * 2 * 5)
    monkeypatch.setattr("fastcell.reservoir.estimator._TOGETHER", 2)
    for one, other in zip(esn.predict(sequences), found, strict=True):
        assert np.array_equal(one, other)
    again = clone(esn).fit(sequences)
    states = esn.transform(sequences)
    rows = np.concatenate(
        [np.concatenate([sequences[b], states[b]], axis=1)[2:-1] for b in range(3)]
    )
    allowed = conditioned(rows, esn.ridge) * np.linalg.norm(np.concatenate(sequences))
    assert np.abs(again.coef_ - esn.coef_).max() <= allowed


def test_several_threads_of_one_model():
    x = random_sequences([200], 1, F32)[0]
    esn = ReservoirRNN(50, random_state=0).fit(x)
    expected, found = esn.predict(x), {}
    runners = [
        threading.Thread(target=lambda k=k: found.update({k: esn.predict(x)})) for k in range(4)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert len(found) == 4
    assert all(np.array_equal(value, expected) for value in found.values())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"n_reservoir": 0}, ValueError, "n_reservoir must be at least 1 and finite, got 0"),
        ({"n_reservoir": 2.5}, TypeError, "n_reservoir must be an integer, got 2.5"),
        ({"n_reservoir": True}, TypeError, "n_reservoir must be an integer, got True"),
        ({"density": 0}, ValueError, "density must be above 0 and at most 1, got 0"),
        ({"density": 1.5}, ValueError, "density must be above 0 and at most 1, got 1.5"),
        ({"density": "a"}, TypeError, "density must be a number, got 'a'"),
        ({"spectral_radius": -1}, ValueError, "spectral_radius must be at least 0"),
        ({"spectral_radius": np.nan}, ValueError, "spectral_radius must be at least 0 .* nan"),
        ({"ridge": -1e-3}, ValueError, "ridge must be at least 0 and finite, got -0.001"),
        ({"ridge": np.inf}, ValueError, "ridge must be at least 0 and finite, got inf"),
        ({"washout": -1}, ValueError, "washout must be at least 0 and finite, got -1"),
        ({"washout": 1.0}, TypeError, "washout must be an integer, got 1.0"),
        ({"washout": 29}, ValueError, r"washout=29 leaves no step .* 1 sequence\(s\) has 29"),
        ({"bias_scaling": None}, TypeError, "bias_scaling must be a number, got None"),
        ({"leak": 0}, ValueError, r"leak must lie in \(0, 1\], got 0"),
        ({"leak": 1.1}, ValueError, r"leak must lie in \(0, 1\], got 1.1"),
        ({"leak": [0.5, 0.5]}, ValueError, r"each of the 9 units, got shape \(2,\)"),
        ({"leak": "a"}, TypeError, "leak must be a number or an array of them, got 'a'"),
        ({"input_scaling": [1, 2, 3]}, ValueError, r"each of the 2 features, got shape \(3,\)"),
        ({"input_scaling": np.inf}, ValueError, "input_scaling must be finite, got inf"),
        (
            {"recurrent_weights": np.eye(3)},
            ValueError,
            r"recurrent_weights must have shape \(9, 9\), for n_reservoir=9, got \(3, 3\)",
        ),
    ],
)
def test_bad_parameters(parameters, error, text):
    with pytest.raises(error, match=text):
        ReservoirRNN(**{"n_reservoir": 9} | parameters).fit(np.zeros((30, 2)))


def test_bad_calls():
    x = random_sequences([30], 2, F64)[0]
    esn = ReservoirRNN(9)
    with pytest.raises(ValueError, match="continues=True needs a previous call"):
        esn.partial_fit(x, continues=True)
    with pytest.raises(ValueError, match="at least 2 steps, got one of 1"):
        esn.fit(x[:1])
    with pytest.raises(ValueError, match=r"at least one sequence, got shape \(0, 3, 2\)"):
        esn.fit(np.zeros((0, 3, 2)))
    with pytest.raises(ValueError, match="y must hold 2 sequences as X does, got 1"):
        esn.fit([x, x], [x])
    with pytest.raises(TypeError, match="y must hold 2 sequences as X does, got int"):
        esn.fit([x, x], 5)
    with pytest.raises(ValueError, match="inconsistent numbers of samples: .30, 29."):
        esn.fit([x, x], [x, x[1:]])
    with pytest.raises(ValueError, match=r"same outputs, got shapes \[\(1,\), \(2,\)\]"):
        esn.fit([x, x], [x, x[:, :1]])
    esn.fit(x, x[:, :1])
    with pytest.raises(ValueError, match=r"1 output\(s\) and 2 input\(s\): fit with y=None"):
        esn.generate(3, x)
    with pytest.raises(ValueError, match="X has 1 features, but ReservoirRNN is expecting 2"):
        esn.predict([x, x[:, :1]])
    with pytest.raises(ValueError, match=r"y must have 1 output\(s\) as before, got 2"):
        esn.partial_fit(x, x)
    with pytest.raises(ValueError, match=r"X must hold 1 sequence\(s\), as those .* got 2"):
        esn.partial_fit([x, x], [x[:, :1]] * 2, continues=True)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(9,\), got \(8,\)"):
        esn.predict(x, initial_state=np.zeros(8))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 9\), got \(9,\)"):
        esn.transform([x, x], initial_state=np.zeros(9))
    esn.fit(x)
    with pytest.raises(ValueError, match="steps must be at least 1 and finite, got 0"):
        esn.generate(0, x)
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        esn.generate(1, x[:0])
    esn.set_params(washout=40)
    with pytest.raises(ValueError, match="washout=40 leaves no step to score: .* has 29"):
        esn.score(x)


# --- what it is for -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_generation_goes_on_as_if_teacher_forced(dtype, density):
    """Whoever hears the warm-up and then the generated rows predicts those very rows."""
    series = mackey_glass(400).astype(dtype)
    esn = ReservoirRNN(70, density=density, leak=0.5, random_state=0).fit(series)
    found = esn.generate(30, series[:200])
    assert found.shape == (30, 1)
    heard = np.concatenate([series[:200], found[:-1]])
    assert np.array_equal(esn.predict(heard)[199:], found)
    _, state = esn.transform(series[:150], return_state=True)
    assert np.array_equal(esn.generate(30, series[150:200], initial_state=state), found)
    several = esn.generate(30, [series[:200], series[:90]])
    assert np.array_equal(several[0], found)
    assert np.array_equal(several[1], esn.generate(30, series[:90]))
    flat = clone(esn).fit(series[:-1], series[1:, 0])
    assert flat.generate(30, series[:200]).shape == (30,)


def test_a_generation_that_runs_away_warns():
    x = np.exp(0.5 * np.arange(40.0))[:, None]
    esn = ReservoirRNN(5, random_state=0).fit(x / x.max())
    with pytest.warns(RuntimeWarning, match="ran away, and are not finite from step"):
        esn.generate(5000, x / x.max())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_mackey_glass(dtype):
    series = mackey_glass(2600).astype(dtype)
    esn = ReservoirRNN(300, ridge=1e-8, washout=100, random_state=0).fit(series[:2000])
    found, expected = esn.predict(series[:-1])[2000:], series[2001:]
    one = nrmse(found, expected)
    assert one < linear_error(series.astype(F64), 2001) / 3, "hardly better than a linear model"
    # The series is chaotic: errors grow until nothing is foretold.
    alone = esn.generate(100, series[:2000])
    assert nrmse(alone, series[2000:2100]) < 0.1
    shuffled = np.random.default_rng(0).permutation(series[:2000])
    assert nrmse(clone(esn).fit(shuffled).predict(series[:-1])[2000:], expected) > 0.5


def memory_capacity(esn: ReservoirRNN, delays: int) -> float:
    """Σ over delays k of the r² with which x_{t-k} is read out.

    Jaeger, "Short term memory in echo state networks", GMD report 152 (2001).
    """
    x = np.random.default_rng(0).uniform(-1, 1, 6000)
    y = np.stack([np.roll(x, k) for k in range(1, delays + 1)], axis=1)
    esn.fit(x[:3000, None], y[:3000])
    found = esn.predict(x[:, None])[3000:]
    return sum(np.corrcoef(a, b)[0, 1] ** 2 for a, b in zip(found.T, y[3000:].T, strict=True))


def test_memory_capacity():
    """At most one for each unit, and the more the nearer the radius is to 1."""
    found = [
        memory_capacity(
            ReservoirRNN(
                20, spectral_radius=radius, input_scaling=0.1, bias_scaling=0.0, ridge=1e-10,
                washout=200, random_state=0,
            ),
            40,
        )
        for radius in (0.2, 0.6, 0.95)
    ]  # fmt: skip
    assert found == sorted(found)
    # Each r² of a delay that is not remembered is about 1 / rows too large.
    assert 10 < found[-1] <= 20 + 40 / 1000


@pytest.mark.parametrize(("radius", "forgets"), [(0.5, True), (0.9, True), (3.0, False)])
@pytest.mark.parametrize("leak", [1.0, 0.5])
def test_the_initial_state_is_forgotten(radius, forgets, leak):
    """The echo state property: two runs on one input come together."""
    x = random_sequences([600], 1, F64)[0] * 0.1
    esn = ReservoirRNN(80, spectral_radius=radius, leak=leak, random_state=0).fit(x)
    one, other = (
        esn.transform(x, initial_state=np.random.default_rng(s).uniform(-1, 1, 80)) for s in (0, 1)
    )
    apart = np.linalg.norm(one - other, axis=1)
    assert (apart[-1] < 1e-9 * apart[0]) == forgets


def test_a_feature_extractor_for_torch():
    x = torch.randn(4, 30, 3)
    features = ReservoirRNN(40, random_state=0).fit(x).transform(x.requires_grad_())
    assert features.shape == (4, 30, 40)
    assert features.dtype is torch.float32
    head = torch.nn.Linear(40, 2)
    head(features).sum().backward()
    assert head.weight.grad is not None
    assert not features.requires_grad


def test_the_example(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "one step ahead" in done.stdout
    broken = [sys.executable, str(EXAMPLE), "--spectral-radius", "4"]
    assert subprocess.run(broken, capture_output=True, cwd=tmp_path, check=False).returncode == 1


def test_the_benchmark(tmp_path, capsys):
    from fastcell_bench import reservoir

    short = ["--blocks", "2", "--min-time", "0.0001"]
    out = tmp_path / "reservoir.json"
    shapes = ["--shape", "20:1:30:3", "--shape", "5:18:30:3"]
    assert reservoir.main([*short, *shapes, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["run"]
    assert [set(row["gains"]) for row in rows] == [{"scipy.sparse loop", "dense kernel"}] * 2
    assert all(row["step"] > 0 and min(row["gains"].values()) > 0 for row in rows)
    nowhere = ["--reservoirpy", str(tmp_path / "python")]
    assert reservoir.main([*short, *shapes, *nowhere]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reservoir.main(["--shape", "20:1:30:31"])


def test_the_benchmark_refuses_other_states(monkeypatch, capsys):
    from fastcell_bench import reservoir

    right = reservoir.loop
    monkeypatch.setattr(reservoir, "loop", lambda w, x: [1.001 * h for h in right(w, x)])
    assert reservoir.main(["--blocks", "1", "--min-time", "0.0001", "--shape", "5:1:30:3"]) == 1
    assert "the states of sparse are off by" in capsys.readouterr().err
