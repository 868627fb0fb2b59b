"""Recomputation: the same results and gradients with less kept, and how much less."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastcell
from fastcell import recompute
from support import assert_equal_bits
from tolerances import assert_close

KINDS = ["RNN", "LSTM", "GRU"]
T, B, I, H = 23, 5, 7, 18  # noqa: E741


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Several segments at the sizes of tests."""
    monkeypatch.setattr(recompute, "_LEAST_ROWS", 1)


def twins(kind, **kwargs):
    torch.manual_seed(0)
    plain = getattr(fastcell, kind)(I, H, **kwargs)
    again = copy.deepcopy(plain)
    again.recompute = True
    return plain, again


def leaves(kind, layer, *, batch=B, given=True, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn((batch, T, I) if layer.batch_first else (T, batch, I), dtype=dtype)
    found = [x.requires_grad_()]
    if given:
        stacked = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = [layer.proj_size or H, H][: 2 if kind == "LSTM" else 1]
        found += [torch.randn(stacked, batch, s, dtype=dtype).requires_grad_() for s in sizes]
    return found


def call(kind, layer, x, *states):
    hx = (states if kind == "LSTM" else states[0]) if states else None
    output, final = layer(x, hx)
    data = output.data if isinstance(output, PackedSequence) else output
    return [data, *(final if isinstance(final, tuple) else (final,))]


def compare(kind, plain, again, inputs, wrap=lambda x: x):
    results = []
    for layer in (plain, again):
        torch.manual_seed(2)
        out = call(kind, layer, wrap(inputs[0]), *inputs[1:])
        weights = [torch.randn(o.shape, dtype=o.dtype) for o in out]
        wanted = [t for t in (*inputs, *layer.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(out, wanted, weights)
        results.append((out, grads))
    (out, grads), (out_again, grads_again) = results
    for a, b in zip(out_again, out, strict=True):
        assert_equal_bits(a, b)
    for a, b in zip(grads_again, grads, strict=True):
        assert_close(a, b, dtype=b.dtype, steps=T * plain.num_layers, length=4 * H)


SHAPES = [
    {},
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_results_and_gradients(kind, shape, given):
    projected = {"proj_size": 6} if kind == "projected" else {}
    kind = "LSTM" if projected else kind
    plain, again = twins(kind, **shape, **projected)
    compare(kind, plain, again, leaves(kind, plain, given=given))


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, given):
    plain, again = twins(kind, num_layers=2)
    lengths = torch.tensor([T, 3, 11, T, 1])
    compare(
        kind, plain, again, leaves(kind, plain, given=given),
        lambda x: pack_padded_sequence(x, lengths, enforce_sorted=False),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_the_same_to_its_last_digits(kind):
    plain, again = twins(kind, num_layers=2, dtype=torch.float64)
    compare(kind, plain, again, leaves(kind, plain, dtype=torch.float64))


def test_only_some_gradients():
    plain, again = twins("GRU", num_layers=2)
    for layer in (plain, again):
        layer.weight_hh_l0.requires_grad_(False)
        layer.bias_ih_l1.requires_grad_(False)
    x, h = leaves("GRU", plain)
    compare("GRU", plain, again, [x.detach(), h])
    compare("GRU", plain, again, [x, h.detach()])
    for layer in (plain, again):
        layer.requires_grad_(False)
    compare("GRU", plain, again, [x, h.detach()])


def test_a_gradient_of_a_final_state_alone():
    plain, again = twins("LSTM")
    grads = []
    for layer in (plain, again):
        x, h, c = leaves("LSTM", plain)
        layer(x, (h, c))[1][1].sum().backward()
        grads.append([x.grad, h.grad, c.grad])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, dtype=torch.float32, steps=T, length=4 * H)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative(kind):
    plain, again = twins(kind, dtype=torch.float64)
    found = []
    for layer in (plain, again):
        x, *states = leaves(kind, layer, dtype=torch.float64)
        out = call(kind, layer, x, *states)
        (first,) = torch.autograd.grad(sum((o**2).sum() for o in out), x, create_graph=True)
        found.append(torch.autograd.grad((first**2).sum(), [x, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, dtype=torch.float64, steps=T, length=4 * H, unit=10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_drops_the_same_in_both_passes(p, bidirectional):
    """By finite differences: with other masks the gradient would be another function's."""
    layer = fastcell.GRU(
        I, H, 2, dropout=p, bidirectional=bidirectional, recompute=True, dtype=torch.float64
    )
    x, h = leaves("GRU", layer, dtype=torch.float64)
    direction = torch.randn_like(x)

    def loss(input):
        torch.manual_seed(5)
        return layer(input, h)[0].sin().sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-6
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    expected = (gradient * direction).sum()
    assert abs(difference.item() - expected.item()) < 1e-6 * (1 + abs(expected.item()))
    torch.manual_seed(6)
    first = layer(x, h)[0]
    assert torch.equal(first, layer(x, h)[0]) == (p == 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    plain, again = twins("LSTM", dtype=dtype)
    x, *states = leaves("LSTM", plain, dtype=dtype)
    for a, b in zip(call("LSTM", again, x, *states), call("LSTM", plain, x, *states), strict=True):
        assert a.dtype is dtype
        assert_close(a, b, dtype=dtype, steps=T, length=I + H)


def test_batch_of_none_and_one_step():
    layer = fastcell.LSTM(I, H, recompute=True)
    for shape in ((T, 0, I), (1, B, I), (1, 1, I)):
        x = torch.randn(shape, requires_grad=True)
        layer(x)[0].sum().backward()
        assert x.grad.shape == shape


def test_options():
    layer = fastcell.GRU(I, H, recompute=True)
    assert layer.recompute
    assert "recompute=True" in repr(layer)
    assert "recompute" not in repr(fastcell.GRU(I, H))
    converted = fastcell.convert(torch.nn.GRU(I, H))
    assert not converted.recompute
    converted.recompute = True
    x = torch.randn(T, B, I)
    out = converted(x)[0]
    assert "Recomputed" in type(out.grad_fn).__name__
    with torch.no_grad():
        assert_equal_bits(converted(x)[0], out.detach())
    output, _ = fastcell.functional.gru(x, None, list(layer.parameters()), recompute=True)
    assert "Recomputed" in type(output.grad_fn).__name__
    both = fastcell.GRU(I, H, bidirectional=True, recompute=True)
    with pytest.raises(ValueError, match="padded input where the layer is bidirectional"):
        both(pack_padded_sequence(x, torch.full((B,), T)))
    assert copy.deepcopy(layer).recompute


def kept(layer, x) -> int:
    """Bytes that the graph of a call holds on to, beside input, parameters and results."""
    seen: dict[int, int] = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = layer(x)
    for t in (x, output, *layer.parameters()):
        seen.pop(t.untyped_storage().data_ptr(), None)
    gc.collect()
    return sum(seen.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_grows_with_the_root_of_the_steps(kind):
    layer = getattr(fastcell, kind)(I, H, 2, recompute=True)
    held = {steps: kept(layer, torch.randn(steps, 2, I)) for steps in (400, 1600, 6400)}
    # Four times the steps, twice the memory; the last segment may be shorter.
    assert held[1600] < 2.2 * held[400]
    assert held[6400] < 2.2 * held[1600]
    plain = copy.deepcopy(layer)
    plain.recompute = False
    assert held[6400] < kept(plain, torch.randn(6400, 2, I)) / math.isqrt(6400) * 4


def test_batches_of_gradients():
    plain, again = twins("GRU", dtype=torch.float64)
    grads = []
    for layer in (plain, again):
        x, h = leaves("GRU", layer, dtype=torch.float64)
        out = layer(x, h)[0]
        torch.manual_seed(4)
        vectors = torch.randn(3, *out.shape, dtype=torch.float64)
        grads.append(torch.autograd.grad(out, [x, h], vectors, is_grads_batched=True))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, dtype=torch.float64, steps=T, length=4 * H)
