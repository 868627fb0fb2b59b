"""Padded batches with ``lengths=``: the result of a PackedSequence, padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastcell
from fastcell import composite
from fastcell.autograd import differentiable
from fastcell.cells import with_options
from fastcell.plan import Config
from option_cases import CHOICES, EXTRAS, extras_for, given, input_for, results, tensors
from support import CELLS, Case, Problem, assert_same_bits

pytestmark = pytest.mark.usefixtures("poison")


def cases(**options) -> list[Case]:
    return [
        Case(c, torch.float64, 2, True, form="ragged", T=6, B=7, I=4, H=9, **options) for c in CELLS
    ]


def run(problem: Problem, layer: torch.nn.RNNBase, dtype: torch.dtype = torch.int64) -> dict:
    """As Problem.run, with lengths and garbage in the padding in place of packing."""
    inputs = problem.inputs()
    lengths = torch.from_numpy(problem.lengths).to(dtype)
    alive = (torch.arange(problem.case.T)[:, None] < lengths)[:, :, None]
    alive = alive.transpose(0, 1) if problem.case.batch_first else alive
    inputs["x"] = inputs["x"].detach().where(alive, torch.nan).requires_grad_()
    states = [inputs[f"{n}0"] for n in problem.case.state_names if f"{n}0" in inputs]
    hx = None if not states else tuple(states) if problem.case.cell == "lstm" else states[0]
    output, final = layer(inputs["x"], hx, lengths=lengths)
    finals = final if problem.case.cell == "lstm" else (final,)
    values = {"output": output, **dict(zip(problem.case.state_names, finals, strict=True))}
    torch.autograd.backward(list(values.values()), problem.gradients_in())
    leaves = inputs | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in values.items()}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", [*cases(), *cases(hx=False)], ids=str)
def test_has_the_bits_of_a_packed_sequence(case, batch_first):
    problem = Problem(case._replace(batch_first=batch_first))
    ours = run(problem, problem.layer(fastcell), torch.int32)
    assert_same_bits(ours, problem.run(problem.layer(fastcell)))
    problem.assert_close(ours, problem.truth())


def test_samples_without_steps_keep_their_state():
    layer = fastcell.LSTM(3, 4)
    x, h, c = torch.randn(5, 3, 3), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    output, (h_n, c_n) = layer(x, (h, c), lengths=torch.tensor([0, 5, 2]))
    alone, (h_1, c_1) = layer(x[:, 1:2], (h[:, 1:2], c[:, 1:2]))
    assert torch.equal(output[:, 1:2], alone)
    assert torch.equal(h_n[:, 1:2], h_1)
    assert torch.equal(c_n[:, 1:2], c_1)
    assert not output[:, 0].any()
    assert not output[2:, 2].any()
    assert torch.equal(h_n[:, 0], h[:, 0])
    assert torch.equal(c_n[:, 0], c[:, 0])
    output, (h_n, _) = layer(x, (h, c), lengths=torch.zeros(3, dtype=torch.int64))
    assert not output.any()
    assert torch.equal(h_n, h)


def test_full_lengths_are_a_plain_batch():
    layer = fastcell.GRU(3, 4, bidirectional=True)
    x = torch.randn(5, 3, 3)
    assert torch.equal(layer(x, lengths=torch.full((3,), 5))[0], layer(x)[0])


def test_nothing_but_samples_without_steps_is_like_any_other_call():
    layer = fastcell.LSTM(3, 4)
    x, h, c = torch.randn(5, 3, 3), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    none = torch.zeros(3, dtype=torch.int64)
    x[0, 0] = torch.nan
    output, (h_n, c_n) = layer(x, (h, c), lengths=none)
    assert torch.equal(h_n, h)
    assert torch.equal(c_n, c)
    assert h_n.data_ptr() != h.data_ptr()
    (output.sum() + h_n.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, lengths=none)[0].dtype is layer(x, lengths=none + 2)[0].dtype
    with pytest.raises(ValueError, match=r"float64|Double|dtype"):
        layer(x.double(), lengths=none)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
def test_lengths_of_few_bits(dtype):
    """300 steps do not exist in 8 bits, where 300 would be 44."""
    layer, x = fastcell.GRU(2, 3), torch.randn(300, 2, 2)
    output, _ = layer(x, lengths=torch.full((2,), 44).to(dtype))
    assert not output[44:].any()
    assert torch.equal(output[:44], layer(x[:44])[0])


def test_lengths_under_another_default_device():
    layer, x = fastcell.GRU(2, 3), torch.randn(6, 2, 2)
    expected = layer(x, lengths=torch.tensor([2, 5]))[0]
    lengths = torch.tensor([2, 5])
    with torch.device("meta"):
        assert torch.equal(layer(x, lengths=lengths)[0], expected)


@pytest.mark.parametrize("which", EXTRAS, ids=lambda w: "+".join(w) or "none")
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_general", "gru_before"])
def test_masks_resets_and_draws_with_the_batch_first(cell, which):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    weights, states = tensors(named, batch=5)
    lengths, extras = extras_for("lengths", layers=2, directions=2, batch=5, output=7)
    lengths[1] = 0
    x = input_for("lengths", 5, 5).detach().transpose(0, 1).requires_grad_()
    config = Config(named, 2, True, True, True)
    leaves, extras = [x, *states, *weights], given(which, extras)
    found = results(lambda: differentiable(config, x, states, weights, lengths, extras), leaves)
    wanted = results(
        lambda: composite.sequence(config, x, states, weights, lengths, extras), leaves
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * max(1.0, b.abs().max().item()))


def test_second_derivatives_do_not_see_what_is_behind_the_end():
    layer = fastcell.LSTM(3, 4, bidirectional=True).double()
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    lengths = torch.tensor([2, 5, 0])

    def second(x):
        x = x.clone().requires_grad_()
        output, _ = layer(x, lengths=lengths)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

    behind = x.clone()
    behind[2:, 0] = behind[:, 2] = torch.nan
    for a, b in zip(second(x), second(behind), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_for_any_lengths_in_one_graph():
    layer = fastcell.GRU(3, 4, 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, lengths: layer(x, lengths=lengths), fullgraph=True, backend=counter
    )
    x = torch.randn(5, 3, 3, requires_grad=True)
    for values in ([2, 5, 1], [5, 0, 3], [0, 0, 0], [5, 5, 5]):
        lengths = torch.tensor(values)
        found, wanted = compiled(x, lengths)[0], layer(x, lengths=lengths)[0]
        assert torch.equal(found, wanted)
        ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y in (found, wanted))
        assert torch.equal(ours[0], theirs[0])
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="from 0 to 5 steps, got 1 to 6"):
        compiled(x, torch.tensor([1, 6, 2]))


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda t, **_: t.as_subclass(Kept)])
def test_lengths_of_another_class_are_looked_at_too(kind):
    layer, x = fastcell.GRU(2, 3), torch.randn(6, 2, 2)
    lengths = kind(torch.tensor([5, 2]), requires_grad=False)
    assert torch.equal(layer(x, lengths=lengths)[0], layer(x, lengths=torch.tensor([5, 2]))[0])
    for wrong in ([5, 9], [-1, 6]):
        with pytest.raises(ValueError, match="lengths must be from 0 to 6 steps"):
            layer(x, lengths=kind(torch.tensor(wrong), requires_grad=False))


class Kept(torch.Tensor):
    """A subclass of nothing of its own."""


def test_a_callers_lengths_may_change_before_the_gradient():
    layer, x = fastcell.GRU(2, 3), torch.randn(6, 2, 2, requires_grad=True)
    buffer = np.array([5, 2])
    lengths = torch.from_numpy(buffer)
    output, _ = layer(x, lengths=lengths)
    (wanted,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    buffer[:] = 6, 100
    lengths.sub_(1)
    (found,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(found, wanted)
    with torch.inference_mode():
        lengths = torch.tensor([5, 2])
    assert torch.equal(layer(x, lengths=lengths)[0], output)


def test_a_gradient_through_the_operators_of_a_call_past_them():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    layer, x = fastcell.LSTM(2, 3, 2), torch.randn(6, 2, 2, requires_grad=True)
    output, _ = layer(x, lengths=torch.tensor([5, 2]))
    (wanted,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    with Mode():
        (found,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(found, wanted)


def test_the_functional_form():
    layer = fastcell.RNN(3, 4)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([3, 4])
    output, h = layer(x, lengths=lengths)
    again, same = fastcell.functional.rnn(x, None, list(layer.parameters()), lengths=lengths)
    assert torch.equal(output, again)
    assert torch.equal(h, same)


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([1, 2], TypeError, "tensor of integers, got list"),
        (torch.tensor([1.0, 2.0]), TypeError, "tensor of integers, got torch.float32"),
        (torch.tensor([1, 2, 3]), ValueError, r"shape \(2,\), got \(3,\)"),
        (torch.tensor([[1, 2]]), ValueError, r"shape \(2,\), got \(1, 2\)"),
        (torch.tensor([1, 6]), ValueError, "from 0 to 5 steps, got 1 to 6"),
        (torch.tensor([-1, 2]), ValueError, "from 0 to 5 steps, got -1 to 2"),
    ],
)
def test_wrong_lengths_are_refused(lengths, error, words):
    layer = fastcell.GRU(3, 4)
    with pytest.raises(error, match=words):
        layer(torch.randn(5, 2, 3), lengths=lengths)


def test_lengths_of_what_is_no_padded_batch_are_refused():
    layer, lengths = fastcell.GRU(3, 4), torch.tensor([2])
    with pytest.raises(ValueError, match="padded batch of 3 dimensions, got 2-D input"):
        layer(torch.randn(5, 3), lengths=lengths)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 3)])
    with pytest.raises(ValueError, match="got a PackedSequence"):
        layer(packed, lengths=lengths)
    with pytest.raises(RuntimeError, match="hidden"):
        layer(torch.randn(5, 1, 3), torch.zeros(1, 2, 4), lengths=lengths)
    with pytest.raises(RuntimeError, match="input.size"):
        layer(torch.randn(5, 1, 4), lengths=lengths)
