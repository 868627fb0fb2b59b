"""Options of cells, and what is drawn or reset on the way: the kernels beside plain torch."""

from __future__ import annotations

import math

import pytest
import torch

import fastcell
from fastcell import composite, noise
from fastcell.autograd import differentiable
from fastcell.cells import Options, options_of, spec_of, with_options
from fastcell.plan import Config
from option_cases import (
    CHOICES,
    EXTRAS,
    PLAIN,
    ByReference,
    allowed,
    assert_within_policy,
    extras_for,
    given,
    input_for,
    results,
    tensors,
)


def assert_alike(found, wanted):
    """To rounding, of sums of numbers as large as the largest."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("which", EXTRAS, ids=lambda w: "+".join(w) or "none")
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("cell", [*CHOICES, *PLAIN])
def test_kernels_as_plain_torch(cell, form, which):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    weights, states = tensors(named)
    sizes, extras = extras_for(form, layers=2, directions=2, batch=3, output=7)
    x = input_for(form, 3, 5)
    config = Config(named, 2, True, True, False)
    leaves = [x, *states, *weights]
    own = given(allowed(named, which), extras)
    found = results(lambda: differentiable(config, x, states, weights, sizes, own), leaves)
    wanted = results(lambda: composite.sequence(config, x, states, weights, sizes, own), leaves)
    assert_alike(found, wanted)


@pytest.mark.parametrize("cell", [c for c in CHOICES if spec_of(c).projection])
def test_with_a_projection(cell):
    named = with_options(cell, CHOICES[cell]._replace(zoneout_h=0.0))
    weights, states = tensors(named, proj=4)
    _, extras = extras_for("padded", layers=2, directions=2, batch=3, output=4)
    x = input_for("padded", 3, 5)
    config = Config(named, 2, True, True, False)
    leaves = [x, *states, *weights]
    found = results(lambda: differentiable(config, x, states, weights, None, extras), leaves)
    wanted = results(lambda: composite.sequence(config, x, states, weights, None, extras), leaves)
    assert_alike(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("cell", [*CHOICES, *PLAIN])
def test_kernels_as_the_reference(cell, form, dtype):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    layers, batch, features, hidden = 2, 13, 9, 29
    weights, states = tensors(
        named, layers=layers, sizes=(features, hidden), batch=batch, dtype=dtype,
        scale=(3 * hidden) ** -0.5,
    )  # fmt: skip
    sizes, extras = extras_for(
        form, layers=layers, directions=2, batch=batch, output=hidden, dtype=dtype
    )
    extras = given(allowed(named, EXTRAS[1]), extras)
    x = input_for(form, batch, features, dtype)
    config = Config(named, layers, True, True, False)
    leaves = [x, *states, *weights]
    found = results(lambda: differentiable(config, x, states, weights, sizes, extras), leaves)
    wanted = ByReference(config, x, states, weights, form, extras).as_tensors()
    assert_within_policy(found, wanted, config, (features, hidden, hidden), batch)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3, 40), (40, 3), (33, 65)])
@pytest.mark.parametrize("cell", CHOICES)
def test_odd_sizes_and_threads(cell, sizes, threads):
    named = with_options(cell, CHOICES[cell])
    weights, states = tensors(named, layers=1, directions=1, sizes=sizes, batch=19)
    _, extras = extras_for("padded", layers=1, directions=1, batch=19, output=sizes[1])
    extras = given(allowed(named, ("recurrent", "reset", "seed")), extras)
    x = input_for("padded", 19, sizes[0])
    config = Config(named, 1, False, True, False)
    leaves = [x, *states, *weights]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(lambda: differentiable(config, x, states, weights, None, extras), leaves)
    finally:
        torch.set_num_threads(before)
    wanted = results(lambda: composite.sequence(config, x, states, weights, None, extras), leaves)
    assert_alike(found, wanted)


def test_names_carry_options():
    options = Options("relu", "elu", 2.5, 0.25, 0.5)
    named = with_options("lstm_peephole", options)
    assert spec_of(named).name == "lstm_peephole_general"
    assert options_of(named) == options
    assert with_options("lstm", Options()) == "lstm"
    with pytest.raises(ValueError, match="cell must be one of"):
        spec_of("lstm_general[relu]")


# --- what is drawn --------------------------------------------------------------------------------


def test_draws_have_their_probability_and_no_pattern():
    rows, units, p = 400, 257, 0.3
    held = noise.held(torch.tensor([3]), 1, 0, torch.arange(rows), units, p).double()
    assert abs(held.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / held.numel())
    for axis, bound in ((0, units), (1, rows)):
        means = held.mean(axis)
        spread = math.sqrt(p * (1 - p) / held.shape[axis])
        assert abs(means.std().item() / spread - 1) < 5 / math.sqrt(2 * bound)
    centred = held - p
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        correlation = (centred * shifted).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(held.numel())
    for other in (
        noise.held(torch.tensor([4]), 1, 0, torch.arange(rows), units, p),
        noise.held(torch.tensor([3]), 2, 0, torch.arange(rows), units, p),
        noise.held(torch.tensor([3]), 1, 1, torch.arange(rows), units, p),
    ):
        correlation = (centred * (other.double() - p)).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(held.numel())


def test_zoneout_follows_torchs_generator():
    layer = fastcell.GRU(4, 9, zoneout=0.5)
    x = torch.randn(5, 3, 4)

    def call(seed):
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    layer.eval()
    assert torch.equal(call(1), call(2))


def test_zoneout_keeps_units_and_its_expectation_when_evaluating():
    torch.manual_seed(0)
    p = 0.4
    layer = fastcell.RNN(4, 6, zoneout=p).double()
    plain = fastcell.RNN(4, 6).double()
    plain.load_state_dict(layer.state_dict())
    x, h = torch.randn(1, 50, 4).double(), torch.randn(1, 50, 6).double()
    without = plain(x, h)[0]
    drawn = layer(x, h)[0]
    kept = drawn == h
    assert torch.equal(torch.where(kept, h, without), drawn)
    assert abs(kept.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    expected = layer.eval()(x, h)[0]
    torch.testing.assert_close(expected, p * h + (1 - p) * without)


def test_recurrent_dropout_holds_for_the_whole_sequence():
    torch.manual_seed(3)
    layer = fastcell.LSTM(4, 8, recurrent_dropout=0.5).double()
    plain = fastcell.LSTM(4, 8).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(7, 1, 4).double()
    torch.manual_seed(5)
    output, _ = layer(x)
    torch.manual_seed(5)
    factors = torch.nn.functional.dropout(torch.ones(1, 1, 8).double(), 0.5)
    with torch.no_grad():
        plain.weight_hh_l0.mul_(factors[0, 0])
    torch.testing.assert_close(output, plain(x)[0])
    layer.eval()
    with torch.no_grad():
        plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_weight_dropout_drops_recurrent_weights_alone():
    layer = fastcell.GRU(4, 8, num_layers=2, weight_dropout=0.5)
    x = torch.randn(3, 2, 4)
    torch.manual_seed(1)
    output, _ = layer(x)
    output.sum().backward()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        dropped = getattr(layer, name).grad == 0
        assert 0.3 < dropped.double().mean() < 0.7
    assert (layer.weight_ih_l0.grad != 0).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


# --- reset ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU", "IndRNN", "LeakyRNN"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_is_a_new_sequence(layer, batch_first):
    module = getattr(fastcell, layer)(4, 6, num_layers=2, batch_first=batch_first).double()
    x = torch.randn(9, 3, 4).double()
    reset = torch.zeros(9, 3, dtype=torch.bool)
    reset[4] = True

    def turned(t):
        return t.transpose(0, 1) if batch_first else t

    whole = turned(module(turned(x), reset=turned(reset))[0])
    parts = [turned(module(turned(part))[0]) for part in (x[:4], x[4:])]
    assert torch.equal(whole, torch.cat(parts))


def test_reset_cuts_gradients():
    module = fastcell.LSTM(3, 5)
    x = torch.randn(6, 2, 3, requires_grad=True)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    output, _ = module(x, reset=reset)
    (grad,) = torch.autograd.grad(output[4:].sum(), x)
    assert not grad[:3, 0].any()
    assert grad[:3, 1].all()
    assert grad[3:5].all()


def test_reset_with_lengths_and_unbatched_and_packed():
    module = fastcell.GRU(3, 5, bidirectional=True).double()
    x = torch.randn(6, 4, 3).double()
    lengths = torch.tensor([2, 6, 4, 5])
    reset = torch.rand(6, 4) < 0.3
    output, final = module(x, lengths=lengths, reset=reset)
    for b, n in enumerate(lengths):
        alone, last = module(x[:n, b], reset=reset[:n, b])
        torch.testing.assert_close(output[:n, b], alone)
        torch.testing.assert_close(final[:, b], last)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    packed, last = module(
        pack(x, lengths, enforce_sorted=False), reset=pack(reset, lengths, enforce_sorted=False)
    )
    again = torch.nn.utils.rnn.pad_packed_sequence(packed)[0]
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize(
    "reset",
    [torch.zeros(6, 2), torch.zeros(2, 6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)],
)
def test_wrong_resets_are_refused(reset):
    with pytest.raises(ValueError, match=r"reset must be a bool tensor of shape \(6, 2\)"):
        fastcell.RNN(3, 5)(torch.zeros(6, 2, 3), reset=reset)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastcell.LSTM(3, 4, activation="swish"),
        lambda: fastcell.LSTM(3, 4, cell_clip=-1.0),
        lambda: fastcell.LSTM(3, 4, zoneout=(0.1, 0.2, 0.3)),
        lambda: fastcell.LSTM(3, 4, zoneout=1.5),
        lambda: fastcell.LSTM(3, 4, proj_size=2, zoneout=0.1),
        lambda: fastcell.GRU(3, 4, zoneout=(0.1, 0.2)),
        lambda: fastcell.GRU(3, 4, recurrent_dropout=1.0),
        lambda: fastcell.RNN(3, 4, weight_dropout=-0.1),
        lambda: fastcell.IndRNN(3, 4, nonlinearity="swish"),
        lambda: fastcell.LeakyRNN(3, 4, zoneout=0.5),
    ],
)
def test_wrong_options_are_refused(make):
    with pytest.raises(ValueError, match="must be|can be|have no"):
        make()


LAYERS = {
    "rnn zoneout": lambda: fastcell.RNN(3, 4, zoneout=0.3),
    "lstm": lambda: fastcell.LSTM(
        3, 4, activation="elu", output_activation="softsign", cell_clip=1.0, zoneout=(0.1, 0.2)
    ),
    "lstm projected": lambda: fastcell.LSTM(
        3, 4, proj_size=2, peephole=True, coupled=True, cell_clip=0.5
    ),
    "gru": lambda: fastcell.GRU(3, 4, activation="relu", zoneout=0.1),
    "independent": lambda: fastcell.IndRNN(3, 4, nonlinearity="tanh", zoneout=0.2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives(name):
    layer = LAYERS[name]().double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = list(layer.parameters())

    def run(x, *weights):
        torch.manual_seed(1)
        names = [n for n, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers(name, dtype):
    layer = LAYERS[name]().eval().to(dtype)
    exact = LAYERS[name]().eval().double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3).to(dtype)
    error = (layer(x)[0].double() - exact(x.double())[0]).abs().max()
    assert error < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_is_the_same(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(5, 2, 3)
    reset = torch.rand(5, 2) < 0.3
    compiled = torch.compile(lambda x, reset: layer(x, reset=reset)[0], backend="aot_eager")
    torch.testing.assert_close(compiled(x, reset), layer(x, reset=reset)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_vmap(name):
    layer = LAYERS[name]().eval()
    x, reset = torch.randn(4, 5, 2, 3), torch.rand(4, 5, 2) < 0.3
    found = torch.func.vmap(lambda x, reset: layer(x, reset=reset)[0])(x, reset)
    for one, *of in zip(found, x, reset, strict=True):
        torch.testing.assert_close(one, layer(of[0], reset=of[1])[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recompute_with_reset_and_recurrent_dropout(bidirectional):
    layer = fastcell.LSTM(3, 4, bidirectional=bidirectional, recurrent_dropout=0.5).double()
    x = torch.randn(1500, 2, 3).double()
    reset = torch.rand(1500, 2) < 0.01

    def gradients(recompute):
        layer.recompute = recompute
        torch.manual_seed(2)
        output = layer(x, reset=reset)[0]
        return [output, *torch.autograd.grad(output.sum(), list(layer.parameters()))]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)


def test_small_calls_with_options():
    layer = fastcell.GRU(3, 4, zoneout=0.5)
    x = torch.randn(1, 1, 3)
    with torch.no_grad():
        drawn = {layer(x)[0].sum().item() for _ in range(20)}
        assert len(drawn) > 1
        layer.eval()
        assert len({layer(x)[0].sum().item() for _ in range(20)}) == 1


def test_representation_names_the_options():
    text = repr(fastcell.LSTM(3, 4, peephole=True, cell_clip=2.0, zoneout=0.1))
    assert "peephole=True" in text
    assert "cell_clip=2.0" in text
    assert "zoneout=0.1" in text
    assert repr(fastcell.LSTM(3, 4)) == repr(torch.nn.LSTM(3, 4))


def test_no_other_layer_pays():
    """A layer without options has torch.nn's attributes, and the kernels of the plain cells."""
    layer = fastcell.LSTM(3, 4)
    assert set(vars(layer)) - {"_small"} == set(vars(torch.nn.LSTM(3, 4)))
