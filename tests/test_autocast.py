"""Autocast on a CPU and 16-bit modules: torch.nn's dtypes, and at most its errors."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastcell
from against_torch import CELLS, LAYERS, has_two_states, same_values, states, tensors, twins
from tolerances import assert_close

# torch's own: its rules of forward-mode differentiation are scripted when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

EVERY = [*LAYERS, *CELLS]
NARROW = [torch.bfloat16, torch.float16]
# Measured on torch 2.13: what a float32 module called with float32 tensors returns.
NARROWED = {"LSTM", "RNN", "RNNCell"}


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def shapes(name):
    """Of input and state."""
    return ((5, 3), (5, 4)) if name.endswith("Cell") else ((6, 5, 3), (1, 5, 4))


def dtypes(result):
    return [t.dtype for t in tensors(result)]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_of_results_and_gradients(name, dtype):
    ours, theirs = twins(name, 3, 4)
    x = torch.randn(shapes(name)[0], requires_grad=True)

    def found(module):
        with autocast(dtype):
            result = module(x)
        value = sum(t.float().square().sum() for t in tensors(result))
        grads = torch.autograd.grad(value, [x, *module.parameters()])
        return dtypes(result) + dtypes(grads)

    mine = found(ours)
    assert mine[0] is (dtype if name in NARROWED else torch.float32)
    assert set(mine[-2:]) == {torch.float32}
    try:
        expected = found(theirs)
    except RuntimeError as error:
        # torch.nn.LSTM has float16, and on older CPUs bfloat16, only where oneDNN has it.
        if "primitive" not in str(error):
            raise
        pytest.skip(f"torch.nn.{name} has no {dtype} on this CPU")
    assert mine == expected


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("input_dtype", "state_dtype"),
    list(itertools.product([torch.float32, torch.bfloat16], repeat=2)),
)
def test_mixed_inputs_and_states(name, input_dtype, state_dtype):
    """As behind a Linear, which autocast makes return bfloat16."""
    ours, theirs = twins(name, 3, 4)
    shape, state_shape = shapes(name)
    x = torch.randn(shape).to(input_dtype)
    hx = states(name, *state_shape, dtype=state_dtype)
    with autocast():
        for arguments in ((x,), (x, hx)):
            assert dtypes(ours(*arguments)) == dtypes(theirs(*arguments))


@pytest.mark.parametrize("name", EVERY)
def test_float64_is_left_alone(name):
    ours, _ = twins(name, 3, 4, dtype=torch.float64)
    x = torch.randn(shapes(name)[0], dtype=torch.float64)
    with autocast():
        same_values(ours(x), ours(x))
        assert set(dtypes(ours(x))) == {torch.float64}
        inside = ours(x)
    same_values(inside, ours(x))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_what_autocast_leaves_mixed_is_refused(name, device, dtype):
    """torch.nn's checks, too, leave it to autocast, which leaves these dtypes alone."""
    shape, state_shape = shapes(name)
    wide, state = torch.ones(shape, dtype=dtype), states(name, *state_shape)
    ours, theirs = twins(name, 3, 4)
    expected = ours(torch.ones(shape))
    torch.set_autocast_enabled(device, True)
    try:
        for arguments in ((wide,), (wide, state)):
            for module in (ours, theirs):
                with pytest.raises((RuntimeError, ValueError)):
                    module(*arguments)
        if device == "cuda":
            same_values(ours(torch.ones(shape)), expected)
    finally:
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("name", EVERY)
def test_no_autocast_means_none(name):
    ours, _ = twins(name, 3, 4)
    x = torch.randn(shapes(name)[0])
    expected = ours(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        same_values(ours(x), expected)
    with autocast(), torch.autocast("cpu", enabled=False):
        same_values(ours(x), expected)
    with warnings.catch_warnings():  # torch's, on a machine without CUDA
        warnings.simplefilter("ignore")
        other = torch.autocast("cuda", torch.float16)
    with other:
        same_values(ours(x), expected)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_is_the_layer_in_the_narrow_dtype(name):
    """What narrows computes as the layer in that dtype would; what does not, does not round."""
    ours, _ = twins(name, 3, 4)
    shape, state_shape = shapes(name)
    x, hx = torch.randn(shape), states(name, *state_shape)
    with autocast():
        found = ours(x, hx)
    if name not in NARROWED:
        same_values(found, ours(x, hx))
        return
    narrow = copy.deepcopy(ours).bfloat16()
    narrow_hx = tuple(h.bfloat16() for h in hx) if has_two_states(name) else hx.bfloat16()
    same_values(found, narrow(x.bfloat16(), narrow_hx))


def test_backward_inside_of_autocast():
    """The second derivative recomputes the layer, and must not be narrowed by doing so here."""
    for name in LAYERS:
        ours, _ = twins(name, 3, 4)
        x = torch.randn(6, 5, 3, requires_grad=True)

        def penalty(module=ours, x=x):
            value = sum(t.float().square().sum() for t in tensors(module(x)))
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), [x, *module.parameters()])

        with torch.autocast("cpu", torch.bfloat16, enabled=name == "GRU"):
            found = penalty()
        same_values(found, penalty())


def test_forward_mode_under_autocast():
    ours, _ = twins("GRU", 3, 4)
    x = torch.randn(6, 5, 3)
    expected = torch.func.jvp(lambda x: ours(x)[0], (x,), (x,))
    with autocast():
        same_values(torch.func.jvp(lambda x: ours(x)[0], (x,), (x,)), expected)


def test_dropout_under_autocast():
    ours, theirs = twins("LSTM", 3, 4, num_layers=3, dropout=0.5)
    x = torch.randn(6, 5, 3)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        with autocast():
            found.append(module(x)[0])
    assert ((found[0] == 0) == (found[1] == 0)).all()
    assert_close(*found, dtype=torch.bfloat16, steps=3 * 6, length=8)


# --- modules of 16 bits ---------------------------------------------------------------------------


def error_of(values, exact):
    """Root mean square over all tensors."""
    parts = [
        (v.double() - e).flatten() for v, e in zip(tensors(values), tensors(exact), strict=True)
    ]
    return torch.cat(parts).square().mean().sqrt().item()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", NARROW)
def test_errors_are_at_most_those_of_torch(name, dtype):
    """Of results and of gradients, against the same numbers in float64."""
    sizes = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    ours, theirs = twins(name, 19, 33, dtype=dtype, **sizes)
    shape = (9, 19) if name.endswith("Cell") else (40, 9, 19)
    x = torch.randn(shape).to(dtype)

    def run(module, x):
        x = x.detach().requires_grad_()
        result = tensors(module(x))
        torch.manual_seed(1)
        weights = [torch.randn(t.shape).to(dtype).to(t.dtype) for t in result]
        return result, torch.autograd.grad(result, [x, *module.parameters()], weights)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = run(copy.deepcopy(theirs).double(), x.double())
        reference = run(theirs, x)
    found = run(ours, x)
    for mine, torchs, truth in zip(found, reference, exact, strict=True):
        assert dtypes(mine) == dtypes(torchs) == [dtype] * len(truth)
        assert error_of(mine, truth) <= error_of(torchs, truth)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", NARROW)
def test_packed_sequences_and_states_of_16_bits(name, dtype):
    ours, _ = twins(name, 3, 4, dtype=dtype, num_layers=2)
    exact = copy.deepcopy(ours).double()
    packed = pack_sequence([torch.randn(n, 3).to(dtype) for n in (2, 5)], enforce_sorted=False)
    hx = states(name, 2, 2, 4, dtype=dtype)
    wide = tuple(h.double() for h in hx) if has_two_states(name) else hx.double()
    output, final = ours(packed, hx)
    assert set(dtypes((output, final))) == {dtype}
    expected, expected_final = exact(packed._replace(data=packed.data.double()), wide)
    for mine, theirs in zip(
        tensors((output, final)), tensors((expected, expected_final)), strict=True
    ):
        assert_close(mine, theirs, dtype=dtype, steps=2 * 5, length=8)


@pytest.mark.parametrize("dtype", NARROW)
def test_training_in_16_bits_sees_every_step(dtype):
    ours = fastcell.GRU(3, 4, dtype=dtype)
    x = torch.randn(6, 5, 3).to(dtype)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = ours(x)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < losses[0]
