"""The NumPy reference against torch.nn, against finite differences, and at its edges."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from fastcell import reference
from tolerances import accumulation_length, assert_close, finite_difference_tolerance

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# Every cell, and the LSTM with a projection.
CELLS_AND_PROJECTIONS = [(cell, 0) for cell in CELLS] + [("lstm", 2)]

T, B, F, H = 6, 4, 3, 5  # F: size of the input
LENGTHS = [1, 4, 6, 4]  # sorting these is not its own inverse


class Problem:
    """A network with random weights, input, states and incoming gradients."""

    def __init__(
        self,
        cell,
        proj=0,
        layers=1,
        bidirectional=False,
        bias=True,
        lengths=None,
        masks=False,
        dtype=np.float64,
        sizes=(T, B, F, H),
    ):
        rng = np.random.default_rng(1)
        steps, batch, features, hidden = sizes
        directions = 2 if bidirectional else 1
        output = proj or hidden
        rows = GATES[cell] * hidden

        def draw(*shape):
            return rng.normal(size=shape).astype(dtype)

        def draw_weight(*shape):  # of torch's initial size
            return rng.uniform(-(hidden**-0.5), hidden**-0.5, shape).astype(dtype)

        self.cell, self.proj, self.sizes = cell, proj, sizes
        self.options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
        self.lengths = lengths
        self.masks = None
        if masks:
            shape = (layers - 1, steps, batch, directions * output)
            self.masks = (rng.integers(0, 2, shape) * 2).astype(dtype)
        self.weights = []
        for layer in range(layers):
            for _ in range(directions):
                width = directions * output if layer else features
                shapes = [(rows, width), (rows, output)] + [(rows,)] * 2 * bias
                shapes += [(proj, hidden)] * bool(proj)
                self.weights += [draw_weight(*shape) for shape in shapes]
        self.x = draw(steps, batch, features)
        count = layers * directions
        state_sizes = [output, hidden] if cell == "lstm" else [output]
        self.states = [draw(count, batch, size) for size in state_sizes]
        self.grad_output = draw(steps, batch, directions * output)
        self.grad_states = [draw(count, batch, size) for size in state_sizes]
        # What the tolerance policy asks for.
        length = accumulation_length(
            max(features, directions * output), hidden, gates=GATES[cell], batch=batch
        )
        self.tolerance = {"steps": layers * steps, "length": length}

    def forward(self, **changes):
        given = {"x": self.x, "states": self.states, "weights": self.weights}
        given |= {"lengths": self.lengths, "dropout_masks": self.masks}
        given |= self.options | changes
        arguments = [given.pop(name) for name in ("x", "states", "weights")]
        return reference.forward(self.cell, *arguments, **given)

    def loss(self, **changes):
        result = self.forward(save=False, **changes)
        total = (result.output * self.grad_output).sum()
        pairs = zip(result.states, self.grad_states, strict=True)
        return total + sum((state * grad).sum() for state, grad in pairs)

    def torch(self):
        """Output, final states and all gradients of torch.nn's layer."""
        _, _, features, hidden = self.sizes
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(self.cell, torch.nn.RNN)
        extra = {"proj_size": self.proj} if self.cell == "lstm" else {}
        if kind is torch.nn.RNN:
            extra = {"nonlinearity": self.cell.removeprefix("rnn_")}
        dtype = torch.from_numpy(self.x).dtype
        module = kind(features, hidden, **self.options, **extra).to(dtype)
        with torch.no_grad():
            for parameter, value in zip(module._flat_weights, self.weights, strict=True):
                parameter.copy_(torch.from_numpy(value))
        x, *states = (torch.tensor(value, requires_grad=True) for value in [self.x, *self.states])
        hx = tuple(states) if self.cell == "lstm" else states[0]
        if self.lengths is None:
            output, final = module(x, hx)
        else:
            rows = torch.nn.utils.rnn.pack_padded_sequence(
                x, torch.tensor(self.lengths), enforce_sorted=False
            )
            rows, final = module(rows, hx)
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(rows, total_length=len(x))
        finals = list(final) if self.cell == "lstm" else [final]
        torch.autograd.backward(
            [output, *finals], [torch.from_numpy(g) for g in [self.grad_output, *self.grad_states]]
        )
        gradients = [value.grad for value in [x, *states, *module._flat_weights]]
        return [output, *finals], gradients

    def reference(self):
        """The same of the reference."""
        result = self.forward()
        gradients = reference.backward(result.tape, self.grad_output, self.grad_states)
        return (
            [result.output, *result.states],
            [gradients.input, *gradients.states, *gradients.weights],
        )

    def assert_same(self, mine, theirs, dtype):
        for what, actual, expected in zip(("value", "gradient"), mine, theirs, strict=True):
            assert len(actual) == len(expected)
            for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
                assert_close(a, e, dtype=dtype, name=f"{what} {k}", **self.tolerance)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["padded", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("cell", "proj"), CELLS_AND_PROJECTIONS)
def test_equals_torch(cell, proj, layers, bidirectional, bias, lengths):
    problem = Problem(cell, proj, layers, bidirectional, bias, lengths)
    problem.assert_same(problem.reference(), problem.torch(), np.float64)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (50, 2, 1, 17), (2, 33, 5, 3), (101, 1, 7, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch_at_other_sizes(cell, dtype, sizes):
    problem = Problem(cell, bidirectional=True, dtype=dtype, sizes=sizes)
    problem.assert_same(problem.reference(), problem.torch(), dtype)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("cell", "proj"), CELLS_AND_PROJECTIONS)
def test_equals_finite_differences(cell, proj, bidirectional, lengths):
    """Central differences along a random direction of every argument, dropout masks included."""
    problem = Problem(cell, proj, 2, bidirectional, lengths=lengths, masks=True)
    _, gradients = problem.reference()
    values = [problem.x, *problem.states, *problem.weights]
    rng = np.random.default_rng(2)
    step = np.finfo(np.float64).eps ** (1 / 3)
    for k, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        losses = []
        for sign in (1, -1):
            moved = [*values[:k], value + sign * step * direction, *values[k + 1 :]]
            cut = 1 + len(problem.states)
            losses.append(problem.loss(x=moved[0], states=moved[1:cut], weights=moved[cut:]))
        expected = (losses[0] - losses[1]) / (2 * step)
        actual = (gradient * direction).sum()
        size = max(abs(losses[0]), np.linalg.norm(gradient))
        allowed = finite_difference_tolerance(np.float64) * size
        assert abs(actual - expected) <= allowed, f"gradient {k}: {actual}, expected {expected}"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize(("cell", "proj"), CELLS_AND_PROJECTIONS)
def test_computes_in_the_dtype_given(cell, proj, dtype):
    low = Problem(cell, proj, 2, True, lengths=LENGTHS, masks=True, dtype=dtype)
    exact = Problem(cell, proj, 2, True, lengths=LENGTHS, masks=True, dtype=np.float64)
    # The same numbers, to begin with: those that both dtypes have.
    for name in ("x", "grad_output"):
        setattr(low, name, getattr(exact, name).astype(np.float16).astype(dtype))
        setattr(exact, name, getattr(low, name).astype(np.float64))
    for name in ("states", "weights", "grad_states"):
        setattr(low, name, [v.astype(np.float16).astype(dtype) for v in getattr(exact, name)])
        setattr(exact, name, [v.astype(np.float64) for v in getattr(low, name)])
    mine, theirs = low.reference(), exact.reference()
    assert {value.dtype for group in mine for value in group} == {np.dtype(dtype)}
    low.assert_same(mine, theirs, dtype if dtype is not np.longdouble else np.float64)
    if np.finfo(dtype).eps < np.finfo(np.float64).eps:
        assert not np.array_equal(mine[0][0], theirs[0][0]), "it was computed in float64"


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_masks_lie_between_the_layers(cell):
    """Two layers with a mask are one layer, the mask, and another layer."""
    both = Problem(cell, layers=2, bidirectional=True, lengths=LENGTHS, masks=True)
    half = len(both.weights) // 2
    one = {"num_layers": 1, "dropout_masks": None}
    first = both.forward(states=[s[:2] for s in both.states], weights=both.weights[:half], **one)
    second = both.forward(
        x=first.output * both.masks[0],
        states=[s[2:] for s in both.states],
        weights=both.weights[half:],
        **one,
    )
    result = both.forward()
    np.testing.assert_array_equal(result.output, second.output)
    for whole, lower, upper in zip(result.states, first.states, second.states, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([lower, upper]))


@pytest.mark.parametrize(("cell", "proj"), CELLS_AND_PROJECTIONS)
def test_padding_has_no_influence(cell, proj):
    """Each sample alone gives what it gives in a ragged batch, whatever lies in the padding."""
    problem = Problem(cell, proj, 2, True, lengths=[0, 4, 6, 2])
    past = np.arange(T)[:, None] >= np.array(problem.lengths)
    problem.x[past] = np.nan
    problem.grad_output[past] = np.nan
    (output, *finals), (grad_x, *gradients) = problem.reference()
    assert not output[past].any()
    assert not grad_x[past].any()
    assert all(np.isfinite(value).all() for value in [output, grad_x, *gradients])
    for b, steps in enumerate(problem.lengths):
        one = slice(b, b + 1)
        if steps == 0:
            for final, initial in zip(finals, problem.states, strict=True):
                np.testing.assert_array_equal(final[:, b], initial[:, b])
            continue
        alone = problem.forward(
            x=problem.x[:steps, one], states=[s[:, one] for s in problem.states], lengths=None
        )
        values = zip([output[:steps], *finals], [alone.output, *alone.states], strict=True)
        for in_batch, expected in values:
            assert_close(in_batch[:, one], expected, dtype=np.float64, **problem.tolerance)


@pytest.mark.parametrize("where", ["x", "state"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_pass_as_in_torch(cell, value, where):
    problem = Problem(cell, layers=2)
    target = problem.x[2] if where == "x" else problem.states[-1][0]
    target[1, 2] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = problem.reference()
    problem.assert_same(mine, problem.torch(), np.float64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sigmoid_keeps_its_digits_down_to_the_smallest_normal_number(dtype):
    limits = np.finfo(dtype)
    a = np.linspace(np.log(limits.tiny), -np.log(limits.tiny), 1001).astype(dtype)
    exact = 1 / (1 + np.exp(-a.astype(np.longdouble)))
    np.testing.assert_array_less(abs(reference.cells.sigmoid(a) / exact - 1), 4 * limits.eps)
    with np.errstate(over="ignore"):
        ends = reference.cells.sigmoid(np.array([-np.inf, -1e4, 0, 1e4, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(ends, [0, 0, 0.5, 1, 1, np.nan])


def test_no_batch():
    problem = Problem("lstm", 2, 2, True, lengths=[], sizes=(T, 0, F, H))
    (output, *finals), (grad_x, *gradients) = problem.reference()
    assert output.shape == (T, 0, 4)
    assert [final.shape for final in finals] == [(4, 0, 2), (4, 0, H)]
    assert grad_x.shape == (T, 0, F)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_defaults_are_zeros(cell):
    problem = Problem(cell)
    zeros = [np.zeros_like(state) for state in problem.states]
    result = problem.forward(states=None)
    for left, right in zip(result[:2], problem.forward(states=zeros)[:2], strict=True):
        np.testing.assert_array_equal(left, right)
    full = reference.backward(result.tape, np.zeros_like(problem.grad_output), problem.grad_states)
    for given in (problem.grad_states, [*problem.grad_states[:-1], None]):
        part = reference.backward(result.tape, None, given)
        same = [np.array_equal(a, b) for a, b in zip(part.weights, full.weights, strict=True)]
        assert all(same) == (given[-1] is not None)
    nothing = reference.backward(result.tape)
    assert not any(g.any() for g in [nothing.input, *nothing.states, *nothing.weights])


def test_a_tape_serves_twice_and_arguments_stay_unchanged():
    problem = Problem("gru", layers=2, bidirectional=True, lengths=LENGTHS, masks=True)
    arguments = [problem.x, problem.masks, problem.grad_output]
    arguments += problem.states + problem.weights + problem.grad_states
    before = [argument.copy() for argument in arguments]
    tape = problem.forward().tape
    first = reference.backward(tape, problem.grad_output, problem.grad_states)
    second = reference.backward(tape, problem.grad_output, problem.grad_states)
    for left, right in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(left, right)
    for argument, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(argument, copy)


def test_save_false_gives_the_same_and_no_tape():
    problem = Problem("lstm", 2, 2, True, lengths=LENGTHS)
    result = problem.forward(save=False)
    np.testing.assert_array_equal(result.output, problem.forward().output)
    assert result.tape is None
    with pytest.raises(ValueError, match="save=True"):
        reference.backward(result.tape)


def _changed(values, index, value):
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must have a floating dtype, got int", lambda p: {"x": p.x.astype(int)}),
        (ValueError, r"x must have 3 dimensions .* \(6, 4\)", lambda p: {"x": p.x[:, :, 0]}),
        (ValueError, "x must have at least one step", lambda p: {"x": p.x[:0]}),
        (ValueError, r"weight_ih_l0 must have shape \(20, 4\), got \(20, 3\)",
         lambda p: {"x": np.zeros((T, B, 4))}),
        (ValueError, "states must be a list of 2 array.*, got 1",
         lambda p: {"states": p.states[:1]}),
        (ValueError, "states must be a list of 2 array.*, got an array",
         lambda p: {"states": p.states[0]}),
        (ValueError, r"states\[1\] must have shape \(4, 4, 5\), got \(4, 4, 2\)",
         lambda p: {"states": [p.states[0], p.states[0]]}),
        (TypeError, r"states\[0\] must have the dtype of x, float64, got float32",
         lambda p: {"states": [s.astype(np.float32) for s in p.states]}),
        (ValueError, "weights must hold 16 or 20 arrays for lstm .* got 19",
         lambda p: {"weights": p.weights[:-1]}),
        (ValueError, "weights must hold 8 or 12 arrays", lambda p: {"bias": False}),
        (ValueError, r"weight_hh_l0 must have shape \(4\*H, P\)",
         lambda p: {"weights": _changed(p.weights, 1, np.zeros((21, 2)))}),
        (ValueError, r"weight_hh_l0 must have shape .* got \(20,\)",
         lambda p: {"weights": _changed(p.weights, 1, np.zeros(20))}),
        (ValueError, r"weight_hr_l0 must have shape \(P, H\).* got \(0, 5\)",
         lambda p: {"weights": _changed(p.weights, 4, np.zeros((0, 5)))}),
        (ValueError, r"weight_hh_l0 must have shape \(20, 3\), got \(20, 2\)",
         lambda p: {"weights": _changed(p.weights, 4, np.zeros((3, 5)))}),
        (ValueError, r"bias_hh_l1_reverse must have shape \(20,\), got \(19,\)",
         lambda p: {"weights": _changed(p.weights, 18, np.zeros(19))}),
        (TypeError, "weight_ih_l1 must have the dtype of x, float64, got float32",
         lambda p: {"weights": _changed(p.weights, 10, p.weights[10].astype(np.float32))}),
        (ValueError, "num_layers must be at least 1, got 0", lambda p: {"num_layers": 0}),
        (ValueError, r"lengths must have shape \(4,\), got \(3,\)",
         lambda p: {"lengths": [1, 2, 3]}),
        (ValueError, r"lengths must lie in 0 .. 6, got \[1, 2, 3, 7\]",
         lambda p: {"lengths": [1, 2, 3, 7]}),
        (ValueError, "lengths must lie in 0 .. 6", lambda p: {"lengths": [1, 2, 3, -1]}),
        (TypeError, "lengths must be integers, got float64",
         lambda p: {"lengths": [1.0, 2.0, 3.0, 4.0]}),
        (ValueError, r"dropout_masks must have shape \(1, 6, 4, 4\), got \(6, 4, 4\)",
         lambda p: {"dropout_masks": np.ones((6, 4, 4))}),
    ],
)  # fmt: skip
def test_wrong_arguments(error, message, change):
    problem = Problem("lstm", 2, 2, True)
    with pytest.raises(error, match=message):
        problem.forward(**change(problem))


def test_wrong_cell():
    problem = Problem("gru")
    with pytest.raises(ValueError, match="one of rnn_tanh, rnn_relu, lstm, gru, .*, got 'GRU'"):
        reference.forward("GRU", problem.x, problem.states, problem.weights)


def test_only_the_lstm_takes_a_projection():
    problem = Problem("gru")
    with pytest.raises(ValueError, match=r"must hold 4 arrays .* got 5"):
        problem.forward(weights=[*problem.weights, np.zeros((2, H))])


def test_wrong_gradients():
    problem = Problem("lstm")
    tape = problem.forward().tape
    with pytest.raises(ValueError, match=r"grad_output must have shape \(6, 4, 5\)"):
        reference.backward(tape, problem.grad_output[:-1])
    with pytest.raises(TypeError, match="grad_output must have the dtype"):
        reference.backward(tape, problem.grad_output.astype(np.float32))
    with pytest.raises(ValueError, match="grad_states must be a list of 2"):
        reference.backward(tape, None, problem.grad_states[:1])
    with pytest.raises(ValueError, match=r"grad_states\[1\] must have shape \(1, 4, 5\)"):
        reference.backward(tape, None, [None, problem.grad_states[1][:, :2]])


def test_needs_numpy_alone():
    """Loaded by itself, outside of the package, it brings in no other framework."""
    program = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('alone', sys.argv[1])\n"
        "sys.modules['alone'] = module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'fastcell', 'scipy'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, reference.__file__],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_example_in_the_docstring():
    import doctest

    outcome = doctest.testmod(reference)
    assert outcome.attempted > 5
    assert outcome.failed == 0
