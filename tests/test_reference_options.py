"""The NumPy reference with options of cells, resets, factors of h, zoneout."""

from __future__ import annotations

import numpy as np
import pytest

from fastcell import reference
from fastcell.cells import spec_of, with_delay, with_options
from fastcell.plan import Config
from option_cases import (
    CHOICES,
    EXTRAS,
    PLAIN,
    STEPS,
    ByReference,
    allowed,
    extras_for,
    given,
    input_for,
    tensors,
)
from tolerances import accumulation_length, assert_close, finite_difference_tolerance


def problem(
    cell, form="packed", which=EXTRAS[1], *, proj=0, dtype=np.float64, skip=0, beside=False
):
    named = cell
    if cell in CHOICES:
        options = CHOICES[cell]
        named = with_options(cell, options._replace(zoneout_h=0.0) if proj else options)
    scale = (3 * 7) ** -0.5  # no growth without end
    weights, states = tensors(named, proj=proj, scale=scale, delay=skip, beside=beside or not skip)
    if beside:
        named, skip = with_delay(named, skip), 0
    _, extras = extras_for(form, layers=2, directions=2, batch=3, output=proj or 7)
    config = Config(named, 2, True, True, False)
    own = given(allowed(named, which), extras)
    x = input_for(form, 3, 5)
    return ByReference(config, x, states, weights, form, own, dtype, skip)


@pytest.mark.parametrize("which", [EXTRAS[1], ()], ids=["drawn", "expected"])
@pytest.mark.parametrize("form", ["padded", "lengths"])
@pytest.mark.parametrize(
    ("cell", "proj"),
    [*((c, 0) for c in (*CHOICES, *PLAIN)), *((c, 3) for c in CHOICES if spec_of(c).projection)],
)
def test_equals_finite_differences(cell, proj, form, which):
    """Central differences along a random direction of every argument."""
    check_gradients(problem(cell, form, which, proj=proj))


@pytest.mark.parametrize("form", ["padded", "lengths"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("skip", [2, STEPS + 1])
@pytest.mark.parametrize(
    ("cell", "proj"), [("rnn_tanh", 0), ("lstm", 0), ("lstm_peephole", 3), ("gru_before", 0)]
)
def test_delays_equal_finite_differences(cell, proj, skip, beside, form):
    check_gradients(problem(cell, form, proj=proj, skip=skip, beside=beside))


def check_gradients(ours):
    values = ours.values
    gradients = ours.results()[-len(values) :]
    rng = np.random.default_rng(2)
    step = np.finfo(np.float64).eps ** (1 / 3)

    def loss(moved):
        result = ours.forward(moved, save=False)
        outcomes = (result.output, *result.states)
        return sum((t * t).sum() * (1 + i) for i, t in enumerate(outcomes))

    for k, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        above, below = (
            loss([*values[:k], value + sign * step * direction, *values[k + 1 :]])
            for sign in (1, -1)
        )
        size = max(abs(above), np.linalg.norm(gradient))
        found, expected = (gradient * direction).sum(), (above - below) / (2 * step)
        allowance = finite_difference_tolerance(np.float64) * size
        assert abs(found - expected) <= allowance, f"gradient {k}: {found}, expected {expected}"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize("which", [EXTRAS[1], ()], ids=["drawn", "expected"])
@pytest.mark.parametrize("cell", CHOICES)
def test_computes_in_the_dtype_given(cell, which, dtype):
    found = problem(cell, which=which, dtype=dtype).results()
    assert {value.dtype for value in found} == {np.dtype(dtype)}


@pytest.mark.parametrize("cell", [*CHOICES, *PLAIN])
def test_a_reset_is_a_new_sequence(cell):
    ours = problem(cell, "padded", ())
    reset = np.zeros((STEPS, 3), bool)
    reset[4, 1] = True
    zeros = [np.zeros_like(state[:, 1:2]) for state in ours.states]
    x = ours.x[:, 1:2]
    # One layer and direction, of which the parts can be had.
    each = len(ours.weights) // 4
    one = {"num_layers": 1, "bidirectional": False}
    states = [state[:1] for state in ours.states]

    def run(x, states, **more):
        return ours.forward([x, *states, *ours.weights[:each]], **one, **more)

    whole = run(ours.x, states, reset=reset)
    first = run(x[:4], [state[:, 1:2] for state in states])
    second = run(x[4:], [zero[:1] for zero in zeros])
    assert_close(
        whole.output[:, 1:2],
        np.concatenate((first.output, second.output)),
        dtype=np.float64,
        steps=STEPS,
        length=accumulation_length(5, 7),
    )
    untouched = run(ours.x, states)
    np.testing.assert_array_equal(whole.output[:, [0, 2]], untouched.output[:, [0, 2]])


@pytest.mark.parametrize("cell", CHOICES)
def test_whoever_holds_all_changes_nothing(cell):
    ours = problem(cell, "padded", ())
    ones = np.ones((4, STEPS, 3, 7))
    result = ours.forward(holds=[ones] * len(ours.states))
    for final, initial in zip(result.states, ours.states, strict=True):
        np.testing.assert_array_equal(final, initial)


def test_what_is_wrong_is_said():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2, 3))

    def run(cell="lstm_general", **more):
        spec = spec_of(cell)
        hidden, output = 5, 3 if more.pop("projected", False) else 5
        shapes = [(spec.gates * hidden, 3), (spec.gates * hidden, output)]
        if not spec.recurrent:
            shapes[1] = (1, hidden)
        shapes += [(output, hidden)] * (output < hidden) + [(spec.rows, hidden)] * (spec.rows > 0)
        weights = [rng.normal(size=shape) for shape in shapes]
        return reference.forward(cell, x, None, weights, bias=False, **more)

    run(options=reference.Options("relu"))
    relu = reference.Options("relu")
    with pytest.raises(ValueError, match="lstm has no options"):
        run("lstm", options=relu)
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, .*, got 'swish'"):
        run(options=reference.Options("swish"))
    with pytest.raises(ValueError, match=r"reset must have shape \(4, 2\), got \(2, 4\)"):
        run(reset=np.zeros((2, 4), bool))
    with pytest.raises(TypeError, match="reset must be bools, got int64"):
        run(reset=np.zeros((4, 2), np.int64))
    with pytest.raises(ValueError, match="takes no recurrent_masks"):
        run("independent", recurrent_masks=np.ones((1, 2, 5)))
    with pytest.raises(ValueError, match=r"recurrent_masks must have shape \(1, 2, 5\)"):
        run(recurrent_masks=np.ones((1, 2, 4)))
    with pytest.raises(ValueError, match=r"holds must be a list of 2"):
        run(holds=[None])
    with pytest.raises(ValueError, match=r"holds\[1\] must have shape \(1, 4, 2, 5\)"):
        run(holds=[None, np.ones((1, 4, 2, 3))])
    with pytest.raises(ValueError, match="a projection leaves no h"):
        run(options=reference.Options(zoneout_h=0.1), projected=True)


def test_options_are_those_of_the_layers():
    """By name and in order, with the same defaults."""
    from fastcell.cells import ACTIVATIONS, Options

    assert tuple(reference.cells.ACTIVATIONS) == ACTIVATIONS
    assert reference.Options._fields == Options._fields
    assert reference.Options() == Options()
