"""Options of cells, and what is drawn or reset on the way: the kernels beside plain torch."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import fastcell
from fastcell import composite, noise
from fastcell.autograd import differentiable
from fastcell.cells import Options, options_of, spec_of, with_options
from fastcell.plan import Config
from fastcell.weight_dropout import dropped
from option_cases import (
    CHOICES,
    EXTRAS,
    PLAIN,
    ByReference,
    allowed,
    assert_alike,
    assert_within_policy,
    extras_for,
    given,
    input_for,
    results,
    tensors,
)


@pytest.mark.parametrize("which", EXTRAS, ids=lambda w: "+".join(w) or "none")
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
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
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_dropout_draws_what_it_drew_in_every_derivative(dtype):
    torch.manual_seed(0)
    w = torch.randn(70, 61, dtype=dtype).t().requires_grad_()  # more than share a key, not in order
    result = dropped(w, 0.25)
    factors = torch.where(result == 0, 0, 1 / 0.75).to(dtype)
    torch.testing.assert_close(result, w * factors)
    upstream = torch.randn(61, 70, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(result, w, upstream, create_graph=True)
    torch.testing.assert_close(grad, upstream * factors)
    (second,) = torch.autograd.grad(grad.sum(), upstream)
    torch.testing.assert_close(second, factors)
    again = dropped(w, 0.25)
    assert not torch.equal(result, again)
    assert abs((result == 0).double().mean() - 0.25) < 0.03
    assert not dropped(w, 1.0).any()


def test_weight_dropout_with_batched_gradients_and_another_default_device():
    torch.manual_seed(0)
    layer = fastcell.GRU(3, 4, weight_dropout=0.4).double()
    x, parameters = torch.randn(5, 2, 3, dtype=torch.float64), list(layer.parameters())
    output, _ = layer(x)
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)

    def gradient(v):
        return torch.autograd.grad(output, parameters, v, retain_graph=True)

    wanted = [torch.stack(g) for g in zip(*map(gradient, upstream), strict=True)]
    together = torch.autograd.grad(
        output, parameters, upstream, retain_graph=True, is_grads_batched=True
    )
    assert_alike(together, wanted)
    assert_alike(torch.vmap(gradient)(upstream), wanted)
    with torch.device("meta"):
        assert layer(x)[0].device.type == "cpu"


@pytest.mark.parametrize("probability", [0.2, 0.9])
def test_weight_dropout_keeps_the_expectation(probability):
    layer = fastcell.RNN(1, 100, weight_dropout=probability, bias=False).double()
    weights = layer.weights_of_call()
    _, dropped = layer.dropped(weights)
    kept = dropped != 0
    assert abs(kept.double().mean() - (1 - probability)) < 0.03
    torch.testing.assert_close(dropped[kept] * (1 - probability), weights[1][kept])


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
    "gru, reset before": lambda: fastcell.GRU(3, 4, bidirectional=True, reset_after=False),
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


CELL_OPTIONS = {
    "RNN": [{"zoneout": 0.3}],
    "LSTM": [
        {"peephole": True},
        {"coupled": True, "cell_clip": 0.7},
        {"peephole": True, "coupled": True, "activation": "relu", "output_activation": "elu"},
        {"zoneout": (0.1, 0.4)},
    ],
    "GRU": [{"reset_after": False}, {"activation": "softsign", "zoneout": 0.2}],
}
SINGLE = [(name, options) for name, all_of in CELL_OPTIONS.items() for options in all_of]


@pytest.mark.parametrize(("name", "options"), SINGLE, ids=str)
def test_a_cell_is_a_step_of_the_layer(name, options):
    torch.manual_seed(0)
    cell = getattr(fastcell, name + "Cell")(3, 5, **options).double().eval()
    layer = getattr(fastcell, name)(3, 5, **options).double().eval()
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, h, c = (torch.randn(2, n).double() for n in (3, 5, 5))
    if name == "LSTM":
        _, wanted = layer(x[None], (h[None], c[None]))
        found = cell(x, (h, c))
    else:
        _, last = layer(x[None], h[None])
        wanted, found = (last,), (cell(x, h),)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b[0])
    assert all(name in repr(cell) for name in options)
    again = pickle.loads(pickle.dumps(cell))
    assert repr(again) == repr(cell)


def test_a_cell_draws_in_training_alone():
    cell = fastcell.GRUCell(3, 50, zoneout=0.5)
    x, h = torch.randn(2, 3), torch.randn(2, 50)
    assert not torch.equal(cell(x, h), cell(x, h))
    cell.eval()
    assert torch.equal(cell(x, h), cell(x, h))


@pytest.mark.parametrize("sizes", [(1, 1), (3, 40), (17, 33)])
def test_the_original_gru(sizes):
    """Reset before the product, written out."""
    torch.manual_seed(2)
    features, hidden = sizes
    layer = fastcell.GRU(features, hidden, reset_after=False).double()
    x, h = torch.randn(5, 2, features).double(), torch.randn(2, hidden).double()
    found, last = layer(x, h[None])
    w_ih, w_hh, b_ih, b_hh = (p.chunk(3) for p in layer.parameters())
    for t in range(5):
        r, z = (torch.sigmoid(x[t] @ w_ih[k].T + b_ih[k] + h @ w_hh[k].T + b_hh[k]) for k in (0, 1))
        n = torch.tanh(x[t] @ w_ih[2].T + b_ih[2] + (r * h) @ w_hh[2].T + b_hh[2])
        h = (1 - z) * n + z * h
        torch.testing.assert_close(found[t], h)
    torch.testing.assert_close(last[0], h)


# --- all states -----------------------------------------------------------------------------------


def states_by_hand(layer, x):
    """h and c of every step: of ever longer beginnings of a layer of one direction."""
    finals = [layer(x[: t + 1])[1] for t in range(len(x))]
    if isinstance(finals[0], tuple):
        return tuple(torch.stack(parts, 1) for parts in zip(*finals, strict=True))
    return (torch.stack(finals, 1),)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "IndRNN", "LeakyRNN", "LSTM projected"])
def test_all_states(name):
    torch.manual_seed(0)
    kind, *projected = name.split()
    options = {"proj_size": 3} if projected else {}
    layer = getattr(fastcell, kind)(4, 5, num_layers=2, **options).double()
    x = torch.randn(6, 3, 4).double()
    output, final, every = layer(x, return_states=True)
    plain, last = layer(x)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(final, last)
    for found, wanted in zip(
        every if kind == "LSTM" else (every,), states_by_hand(layer, x), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    batch_first = getattr(fastcell, kind)(4, 5, 2, batch_first=True, **options).double()
    batch_first.load_state_dict(layer.state_dict())
    turned = batch_first(x.transpose(0, 1), return_states=True)[2]
    for a, b in zip(
        turned if kind == "LSTM" else (turned,), every if kind == "LSTM" else (every,), strict=True
    ):
        torch.testing.assert_close(a.transpose(1, 2), b)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_all_states_in_both_directions_and_with_lengths(name):
    layer = getattr(fastcell, name)(4, 5, num_layers=2, bidirectional=True).double()
    x = torch.randn(6, 3, 4).double()
    lengths = torch.tensor([4, 6, 1])
    output, final, every = layer(x, lengths=lengths, return_states=True)
    plain, last = layer(x, lengths=lengths)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(final, last)
    every, last = (every, last) if name == "LSTM" else ((every,), (last,))
    for all_of, end in zip(every, last, strict=True):
        assert all_of.shape == (4, 6, 3, 5)
        for b, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(all_of[0::2, n - 1, b], end[0::2, b])
            torch.testing.assert_close(all_of[1::2, 0, b], end[1::2, b])
            assert not all_of[:, n:, b].any()
        torch.testing.assert_close(every[0][2:, :, :].movedim(0, 2).flatten(2), output)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows = layer(packed, return_states=True)[2]
    for found, padded in zip(rows if name == "LSTM" else (rows,), every, strict=True):
        of = torch.nn.utils.rnn.pack_padded_sequence(
            padded.movedim(0, 2).flatten(2), lengths, enforce_sorted=False
        )
        torch.testing.assert_close(found.movedim(0, 1).flatten(1), of.data)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"peephole": True, "zoneout": 0.0}])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_states_have_gradients(options, bidirectional):
    torch.manual_seed(1)
    layer = fastcell.LSTM(2, 3, 2, bidirectional=bidirectional, **options).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *weights):
        given = dict(zip(names, weights, strict=True))
        output, final, every = torch.func.functional_call(
            layer, given, (x,), {"return_states": True}
        )
        return output, *final, *every

    leaves = (x, *layer.parameters())
    assert torch.autograd.gradcheck(run, leaves)
    frozen = [p.detach() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(lambda x: run(x, *frozen), (x,))


def test_all_states_compiled_and_narrow():
    layer = fastcell.LSTM(2, 3, 2)
    x = torch.randn(4, 2, 2)

    def run(x):
        output, _, (h, c) = layer(x, return_states=True)
        return output, h, c

    compiled = torch.compile(run, backend="aot_eager")
    for a, b in zip(compiled(x), run(x), strict=True):
        torch.testing.assert_close(a, b)
    layer.to(torch.bfloat16)
    _, _, (h, c) = layer(x.bfloat16(), return_states=True)
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("name", LAYERS)
def test_explain_and_streams_know_options(name):
    layer = LAYERS[name]().eval()
    said = fastcell.explain(layer, torch.zeros(4, 1, 3))
    assert (said.engine, said.path) == ("cpu", "kernel")
    if not layer.bidirectional:
        x = torch.randn(4, 1, 3)
        stream = fastcell.Stream(layer)
        found = torch.cat([stream(x[t : t + 1]).clone() for t in range(4)])
        assert torch.equal(found, layer(x)[0].detach())


def test_explain_and_streams_know_delays_and_cells():
    for options in ({"skip": 3}, {"skip": 3, "skip_beside": True}):
        layer = fastcell.GRU(3, 4, **options)
        assert fastcell.explain(layer).path == "kernel"
        with pytest.raises(ValueError, match="no layer with skip"):
            fastcell.Stream(layer)
    cell = fastcell.LSTMCell(3, 4, peephole=True, cell_clip=1.0)
    assert fastcell.explain(cell, torch.zeros(2, 3)).path == "kernel"


@pytest.mark.parametrize(
    "module",
    [
        fastcell.LSTM(3, 4, cell_clip=1.0),
        fastcell.GRU(3, 4, reset_after=False),
        fastcell.IndRNN(3, 4),
        fastcell.RNN(3, 4, skip=2),
        fastcell.LSTM(3, 4, layer_norm=True),
        fastcell.LSTMCell(3, 4, coupled=True),
        fastcell.GRUCell(3, 4, reset_after=False),
        fastcell.RNNCell(3, 4, zoneout=0.1),
    ],
    ids=str,
)
def test_what_cannot_be_quantized_is_refused(module):
    with pytest.raises(ValueError, match="cannot be quantized"):
        fastcell.quantize(module, torch.int8)


def test_dropouts_do_not_hinder_quantizing():
    layer = fastcell.GRU(3, 4, recurrent_dropout=0.2, weight_dropout=0.2).eval()
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        error = (fastcell.quantize(layer, torch.bfloat16)(x)[0] - layer(x)[0]).abs().max()
    assert error < 0.02
