"""Skip connections through time, in place of the last step's and beside it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastcell
from fastcell import composite, cpu, reference
from fastcell.autograd import differentiable
from fastcell.cells import cell_of, options_of, spec_of, with_delay, with_options
from fastcell.plan import Config, Extras
from option_cases import (
    CHOICES,
    EXTRAS,
    PLAIN,
    STEPS,
    allowed,
    assert_alike,
    extras_for,
    given,
    input_for,
    results,
    tensors,
)

# --- against the reference ------------------------------------------------------------------------

LAYERS = {
    "RNN": fastcell.RNN,
    "RNN zoned": functools.partial(fastcell.RNN, zoneout=0.2),
    "LeakyRNN": functools.partial(fastcell.LeakyRNN, learn_alpha=True),
    "IndRNN": fastcell.IndRNN,
    "LSTM": fastcell.LSTM,
    "LSTM projected": functools.partial(fastcell.LSTM, proj_size=3),
    "LSTM with options": functools.partial(
        fastcell.LSTM, peephole=True, coupled=True, cell_clip=0.7, activation="softsign"
    ),
    "GRU": fastcell.GRU,
    "GRU before": functools.partial(fastcell.GRU, reset_after=False),
}


def states_for(layer, batch):
    """Initial states, as the layer takes them."""
    d, count = layer.skip, layer.num_layers * (2 if layer.bidirectional else 1)
    generator = torch.Generator().manual_seed(5)

    def draw(rows, size):
        numbers = torch.randn(count, rows, size, dtype=torch.float64, generator=generator)
        return numbers.requires_grad_()

    h = draw(d * batch, layer.proj_size or layer.hidden_size)
    if layer.mode != "LSTM":
        return (h,)
    return h, draw(batch if layer.skip_beside else d * batch, layer.hidden_size)


def outcome(layer, x, states, **arguments):
    """Output, final states and gradients of a function of them, by input, states and weights."""
    output, final = layer(x, states if len(states) == 2 else states[0], **arguments)
    final = final if isinstance(final, tuple) else (final,)
    rows = output.data if isinstance(output, PackedSequence) else output
    total = sum(t.square().sum() * (1 + i) for i, t in enumerate((rows, *final)))
    source = x.data if isinstance(x, PackedSequence) else x
    grads = torch.autograd.grad(total, (source, *states, *layer._flat_weights))
    return [rows, *final, *grads]


def by_reference(layer, x, states, lengths=None, reset=None):
    cell = cell_of(layer)
    options = options_of(cell)
    general = reference.CELLS[spec_of(cell).name].general
    result = reference.forward(
        spec_of(cell).name,
        x.detach().numpy(),
        [s.detach().numpy() for s in states],
        [w.detach().numpy() for w in layer._flat_weights],
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        lengths=None if lengths is None else lengths.numpy(),
        reset=None if reset is None else reset.numpy(),
        options=reference.Options(*options) if general else None,
        skip=layer.skip,
        skip_beside=layer.skip_beside,
    )
    forward = [result.output, *result.states]
    upstream = [2 * (1 + i) * t for i, t in enumerate(forward)]
    grads = reference.backward(result.tape, upstream[0], upstream[1:])
    everything = [*forward, grads.input, *grads.states, *grads.weights]
    return [torch.from_numpy(t.copy()) for t in everything]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both directions"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_the_reference(name, beside, bidirectional, resets, form, recompute):
    """On all ways through: phases, kernels with a delay, and (for them) block by block."""
    torch.manual_seed(0)
    batch, steps = 4, 7
    for d in (2, 3, 9):
        layer = LAYERS[name](
            3, 5, 2, skip=d, skip_beside=beside, bidirectional=bidirectional, recompute=recompute
        )
        layer.double().eval()
        states = states_for(layer, batch)
        lengths = None if form == "padded" else torch.tensor([4, 7, 1, 6])
        x = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
        reset = torch.rand(steps, batch) < 0.25 if resets else None
        wanted = by_reference(layer, x, states, lengths, reset)
        if form != "packed":
            assert_alike(outcome(layer, x, states, lengths=lengths, reset=reset), wanted)
            continue
        packed = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
        packed = packed._replace(data=packed.data.requires_grad_())
        anew = None
        if reset is not None:
            anew = pack_padded_sequence(reset, lengths, enforce_sorted=False)
        found = outcome(layer, packed, states, reset=anew)
        for i in (0, 1 + len(states)):
            rows = pack_padded_sequence(wanted[i], lengths, enforce_sorted=False)
            wanted[i] = rows.data
        assert_alike(found, wanted)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", LAYERS)
def test_units_behind_whole_vectors(name, beside):
    """Few units in the last panel of a layer, which has a layout of its own then."""
    for hidden in (18, 19, 21, 35, 51):
        torch.manual_seed(0)
        layer = LAYERS[name](3, hidden, skip=2, skip_beside=beside).double().eval()
        states = states_for(layer, 3)
        x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
        assert_alike(outcome(layer, x, states), by_reference(layer, x, states))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_functions(name, beside):
    layer = LAYERS[name](3, 5, 2, skip=3, skip_beside=beside, bidirectional=True).double().eval()
    x, states = torch.randn(7, 4, 3).double(), states_for(layer, 4)
    arguments = {
        "num_layers": 2, "bidirectional": True, "skip": 3, "skip_beside": beside,
        "lengths": torch.tensor([4, 7, 0, 6]),
    }  # fmt: skip
    kind, options = name.split()[0], {}
    kinds = {"LeakyRNN": "leaky_rnn", "IndRNN": "independent_rnn"}
    if name.endswith("options"):
        options = {"peephole": True, "coupled": True, "cell_clip": 0.7, "activation": "softsign"}
    options |= {"zoneout": 0.2} if "zoned" in name else {}
    options |= {"reset_after": False} if "before" in name else {}
    run = getattr(fastcell.functional, kinds.get(kind, kind.lower()))
    hx = states if len(states) == 2 else states[0]
    found = run(x, hx, list(layer._flat_weights), **arguments, **options)
    wanted = layer(x, hx, lengths=arguments["lengths"])
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0)


def test_functions_take_rows_and_refuse_wrong_delays():
    layer = fastcell.GRU(3, 5, skip=2, skip_beside=True).double()
    weights = list(layer.parameters())
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3).double() for n in (5, 4, 1)])
    gru = functools.partial(fastcell.functional.gru, skip=2, skip_beside=True)
    rows, h = gru(packed.data, None, weights, batch_sizes=packed.batch_sizes)
    whole, last = layer(packed)
    assert torch.equal(rows, whole.data)
    assert torch.equal(h, last)
    with pytest.raises(ValueError, match="skip must be a positive number"):
        fastcell.functional.gru(packed, None, weights, skip=0)
    with pytest.raises(ValueError, match="takes a skip of 2 or more"):
        fastcell.functional.gru(packed, None, weights, skip_beside=True)
    with pytest.raises(RuntimeError, match="Expected 5 weights"):
        gru(packed, None, weights[:4])
    with pytest.raises(ValueError, match="input is torch.float32, but the weights"):
        gru(torch.zeros(3, 2, 3), None, weights)
    with pytest.raises(ValueError, match="layer_norm goes with"):
        gru(packed, None, weights, layer_norm=True)


@pytest.mark.parametrize("form", ["padded", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both directions"])
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name, bidirectional, form):
    torch.manual_seed(3)
    layer = LAYERS[name](2, 4, skip=2, skip_beside=True, bidirectional=bidirectional)
    layer.double().eval()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    states = states_for(layer, 2)
    lengths = None if form == "padded" else torch.tensor([3, 4])

    def run(x, *states):
        output, final = layer(x, states if len(states) == 2 else states[0], lengths=lengths)
        return output, *(final if isinstance(final, tuple) else (final,))

    assert torch.autograd.gradcheck(run, (x, *states))
    assert torch.autograd.gradgradcheck(run, (x, *states))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", ["LSTM", "LSTM projected", "GRU"])
def test_all_states_with_all_else(name, beside):
    """Of both directions, lengths and resets; and they have gradients."""
    torch.manual_seed(2)
    make = functools.partial(LAYERS[name], 3, 5, 2, skip=3, skip_beside=beside)
    layer = make(bidirectional=True).double()
    x = torch.randn(8, 4, 3, dtype=torch.float64, requires_grad=True)
    lengths, reset = torch.tensor([5, 8, 0, 3]), torch.rand(8, 4) < 0.2
    output, final, every = layer(x, lengths=lengths, reset=reset, return_states=True)
    plain, last = layer(x, lengths=lengths, reset=reset)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(final, last)
    every = every if isinstance(every, tuple) else (every,)
    torch.testing.assert_close(torch.cat(list(every[0][2:]), -1), output)
    alive = torch.arange(8)[:, None] < lengths
    for kind in every:
        assert kind.shape[:3] == (4, 8, 4)
        assert not kind[:, ~alive].any()
        assert kind[:, alive].any(-1).all()
    if name.startswith("LSTM") and beside:
        c_n = final[1]
        for b, n in enumerate(lengths.tolist()):
            if n:
                torch.testing.assert_close(every[1][0::2, n - 1, b], c_n[0::2, b])
                torch.testing.assert_close(every[1][1::2, 0, b], c_n[1::2, b])

    layer.recompute = True  # layer by layer, direction by direction, block by block
    again = layer(x, lengths=lengths, reset=reset, return_states=True)
    again_every = again[2] if isinstance(again[2], tuple) else (again[2],)
    for a, b in zip(every, again_every, strict=True):
        torch.testing.assert_close(a, b)
    weight = [torch.randn_like(kind) for kind in every]
    (found, wanted) = (
        torch.autograd.grad(
            sum((kind * w).sum() for kind, w in zip(kinds, weight, strict=True)),
            (x, *layer.parameters()),
        )
        for kinds in (every, again_every)
    )
    assert_alike(found, wanted)
    # The numbers of the caller's layout.
    layer.recompute = False
    turned = make(bidirectional=True, batch_first=True).double()
    turned.load_state_dict(layer.state_dict())
    there = turned(x.transpose(0, 1), lengths=lengths, reset=reset.t(), return_states=True)[2]
    for a, b in zip(there if isinstance(there, tuple) else (there,), every, strict=True):
        assert torch.equal(a.transpose(1, 2), b)
    packed = pack_padded_sequence(x, lengths + (lengths == 0), enforce_sorted=False)
    rows = layer(packed, return_states=True)[2]
    padded = layer(x, lengths=lengths + (lengths == 0), return_states=True)[2]
    for a, b in zip(
        rows if isinstance(rows, tuple) else (rows,),
        padded if isinstance(padded, tuple) else (padded,),
        strict=True,
    ):
        of = pack_padded_sequence(
            b.movedim(0, 2).flatten(2), lengths + (lengths == 0), enforce_sorted=False
        )
        torch.testing.assert_close(a.movedim(0, 1).flatten(1), of.data)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("way", ["", "recompute", "all states"])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_recurrent_dropout_takes_the_same_units_from_all_steps(name, beside, way):
    torch.manual_seed(4)
    layer = LAYERS[name](
        3, 6, 2, skip=2, skip_beside=beside, recurrent_dropout=0.5, bidirectional=True,
        recompute=way == "recompute",
    ).double()  # fmt: skip
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    torch.manual_seed(8)
    output = layer(x, return_states=way == "all states")[0]
    torch.manual_seed(8)
    factors = torch.nn.functional.dropout(torch.ones(4, 2, 6, dtype=torch.float64), 0.5)
    result = reference.forward(
        name.lower(), x.numpy(), None, [w.detach().numpy() for w in layer._flat_weights],
        num_layers=2, bidirectional=True, skip=2, skip_beside=beside,
        recurrent_masks=factors.numpy(),
    )  # fmt: skip
    torch.testing.assert_close(output, torch.from_numpy(result.output))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_functions_and_draws_are_captured_whole(beside):
    layer = fastcell.LSTM(3, 4, 2, skip=2, skip_beside=beside, weight_dropout=0.5)
    x, weights = torch.randn(6, 2, 3), [w.detach() for w in layer.parameters()]
    run = functools.partial(
        fastcell.functional.lstm, num_layers=2, skip=2, skip_beside=beside,
    )  # fmt: skip
    compiled = torch.compile(lambda x: run(x, None, weights)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x, None, weights)[0])
    assert torch.compile(layer, fullgraph=True, backend="eager")(x)[0].shape == (6, 2, 4)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_sixteen_bits_under_autocast_and_another_default_device(beside):
    layer = fastcell.GRU(3, 4, skip=2, skip_beside=beside, bidirectional=True).half()
    x = torch.randn(5, 2, 3).half()
    reset = torch.zeros(5, 2, dtype=torch.bool)
    for arguments in ({}, {"reset": reset}):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x, **arguments)[0]
        wanted = layer(x, **arguments)[0]
        torch.testing.assert_close(found.float(), wanted.float(), atol=0.03, rtol=0.03)
    packed = pack_padded_sequence(x, torch.tensor([5, 3]))
    with torch.device("meta"):
        rows = layer(packed)[0].data
    assert torch.equal(rows, layer(packed)[0].data)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_samples_without_steps_keep_their_states(beside):
    layer = fastcell.LSTM(3, 4, 2, skip=3, skip_beside=beside, bidirectional=True).double()
    x, states = torch.randn(5, 2, 3, dtype=torch.float64), states_for(layer, 2)
    x.requires_grad_()
    lengths = torch.zeros(2, dtype=torch.long)
    output, final = layer(x, states, lengths=lengths)
    assert not output.any()
    torch.testing.assert_close(final, states)
    grads = torch.autograd.grad(sum(s.sum() for s in final), (x, *states))
    assert not grads[0].any()
    assert all(bool((g == 1).all()) for g in grads[1:])
    assert layer(x, lengths=lengths)[1][0].shape == states[0].shape


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_delays_and_lengths_of_odd_sizes(threads):
    """The same bits as each sample alone; gradients those of plain torch."""
    cell, delay, batch = "lstm", 5, 37
    sizes = {"layers": 2, "directions": 2, "sizes": (6, 45), "batch": batch}
    weights, states = tensors(cell, delay=delay, scale=0.1, **sizes)
    x = torch.randn(70, batch, 6, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(0, 71, (batch,))
    config = Config(with_delay(cell, delay), 2, True, True, False)
    leaves, extras = [x, *states, *weights], Extras()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(lambda: differentiable(config, x, states, weights, lengths, extras), leaves)
    finally:
        torch.set_num_threads(before)
    wanted = results(
        lambda: composite.sequence(config, x, states, weights, lengths, extras), leaves
    )
    assert_alike(found, wanted)
    for b in (0, 17, 36):
        n = int(lengths[b])
        own = [states[0].view(4, delay, batch, 45)[:, :, b], states[1][:, b : b + 1]]
        alone, _ = cpu_forward(config, x[:n, b : b + 1].detach(), own, weights)
        assert torch.equal(found[0][:n, b : b + 1], alone)


# --- by hand --------------------------------------------------------------------------------------


def delayed_by_hand(layer, d, x, states, reset=None):
    """One step at a time, as a cell, of one sample's (T, I) and its d last states."""
    states = [list(s.unbind(0)) for s in states]
    outputs = []
    for t, x_t in enumerate(x):
        if reset is not None and reset[t]:
            states = [[torch.zeros_like(s) for s in of] for of in states]
        before = [of[-d] for of in states]
        given = tuple(s[None] for s in before)
        output, after = layer(x_t[None], given if len(given) == 2 else given[0])
        after = after if isinstance(after, tuple) else (after,)
        for of, new in zip(states, after, strict=True):
            of.append(new[0])
        outputs.append(output[0])
    return torch.stack(outputs), [torch.stack(of[-d:]) for of in states]


@pytest.mark.parametrize("steps", [1, 2, 6, 7, 11])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_delay_is_as_by_hand(name, steps):
    torch.manual_seed(steps)
    d, batch = 3, 2
    layer = getattr(fastcell, name)(4, 5, skip=d).double()
    plain = getattr(fastcell, name)(4, 5).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(steps, batch, 4).double()
    reset = torch.rand(steps, batch) < 0.2
    count = 2 if name == "LSTM" else 1
    states = [torch.randn(1, d * batch, 5).double() for _ in range(count)]
    output, final = layer(x, tuple(states) if count == 2 else states[0], reset=reset)
    final = final if count == 2 else (final,)
    for b in range(batch):
        own = [s.view(d, batch, 5)[:, b] for s in states]
        wanted, last = delayed_by_hand(plain, d, x[:, b], own, reset[:, b])
        torch.testing.assert_close(output[:, b], wanted)
        for s, w in zip(final, last, strict=True):
            torch.testing.assert_close(s.view(d, batch, 5)[:, b], w)


@pytest.mark.parametrize("cut", [1, 4, 6])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_delay_goes_on_over_windows(cut, batch_first):
    layer = fastcell.GRU(3, 5, 2, skip=4, batch_first=batch_first).double()
    axis = 1 if batch_first else 0
    x = torch.randn(*((2, 10) if batch_first else (10, 2)), 3).double()
    whole, last = layer(x)
    first, state = layer(x.narrow(axis, 0, cut))
    second, end = layer(x.narrow(axis, cut, 10 - cut), state)
    torch.testing.assert_close(torch.cat((first, second), axis), whole)
    torch.testing.assert_close(end, last)


def test_a_delay_in_both_directions():
    layer = fastcell.LSTM(3, 4, skip=3, bidirectional=True).double()
    forward, back = (fastcell.LSTM(3, 4, skip=3).double() for _ in range(2))
    weights = layer.state_dict()
    forward.load_state_dict({k: v for k, v in weights.items() if "reverse" not in k})
    back.load_state_dict(
        {k.removesuffix("_reverse"): v for k, v in weights.items() if "reverse" in k}
    )
    x = torch.randn(7, 2, 3).double()
    h, c = torch.randn(2, 6, 4).double(), torch.randn(2, 6, 4).double()
    output, (h_n, c_n) = layer(x, (h, c))

    def turned(s):
        """Nearest first to oldest first, and back."""
        return s.view(1, 3, 2, 4).flip(1).reshape(1, 6, 4)

    one, (h_1, c_1) = forward(x, (h[:1], c[:1]))
    two, (h_2, c_2) = back(x.flip(0), (turned(h[1:]), turned(c[1:])))
    torch.testing.assert_close(output, torch.cat((one, two.flip(0)), -1))
    torch.testing.assert_close(h_n, torch.cat((h_1, turned(h_2))))
    torch.testing.assert_close(c_n, torch.cat((c_1, turned(c_2))))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_delay_with_lengths(bidirectional):
    layer = fastcell.RNN(3, 4, 2, skip=3, bidirectional=bidirectional).double()
    x = torch.randn(8, 4, 3).double()
    lengths = torch.tensor([8, 1, 0, 5])
    output, final = layer(x, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        assert not output[n:, b].any()
        if n:
            alone, last = layer(x[:n, b])
            torch.testing.assert_close(output[:n, b], alone)
            torch.testing.assert_close(final.view(-1, 3, 4, 4)[:, :, b], last)


def test_a_delay_has_gradients():
    layer = fastcell.LSTM(2, 3, skip=2).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(x, h, c):
        output, states = layer(x, (h, c))
        return output, *states

    assert torch.autograd.gradcheck(run, (x, h, c))
    assert torch.autograd.gradgradcheck(run, (x, h, c))


def test_wrong_delays_are_refused():
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="skip must be a positive number of steps"):
            fastcell.RNN(3, 4, skip=wrong)
    layer = fastcell.RNN(3, 4, skip=2)
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="got a PackedSequence"):
        layer(packed, lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="got 2-D input"):
        layer(torch.zeros(4, 3), lengths=torch.tensor([2]))
    with pytest.raises(RuntimeError, match="h_0"):
        layer(torch.zeros(4, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="input is torch.float64, but the weights"):
        layer(torch.zeros(4, 2, 3).double())
    rows, sizes = torch.zeros(5, 3), torch.tensor([2, 2, 1, 0])
    with pytest.raises(RuntimeError, match="batch_sizes"):
        layer(PackedSequence(rows, sizes))
    with pytest.raises(RuntimeError, match="must have 2 dimensions"):
        layer(PackedSequence(rows[None], sizes[:3]))
    deep = fastcell.GRU(3, 4, 2, skip=2, skip_beside=True)
    deep.dropout = 2.0
    with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
        deep(torch.zeros(4, 2, 3))


def cpu_forward(config, x, states, weights):
    output, finals, _ = cpu.forward(config, x, states, weights, None, Extras(), keep=False)
    return output, finals


def beside_by_hand(layer, d, x, h, c):
    """One step at a time of a layer of one direction; h: its d last ones."""
    outputs, h = [], list(h.unbind(0))
    gates = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
    for x_t in x:
        a = torch.nn.functional.linear(h[-d], layer.weight_skip_l0)
        if isinstance(layer, fastcell.LSTM):
            a = a + x_t @ gates[0].T + gates[2] + h[-1] @ gates[1].T + gates[3]
            i, f, g, o = a.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h.append(torch.sigmoid(o) * torch.tanh(c))
        else:
            a = a + x_t @ gates[0].T + gates[2] + h[-1] @ gates[1].T + gates[3]
            h.append(torch.tanh(a))
        outputs.append(h[-1])
    return torch.stack(outputs), torch.stack(h[-d:]), c


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_a_delay_beside_the_step_before(name, steps):
    torch.manual_seed(steps)
    d, batch = 3, 2
    layer = getattr(fastcell, name)(4, 5, skip=d, skip_beside=True).double()
    assert layer.weight_skip_l0.shape == layer.weight_hh_l0.shape
    x, h = torch.randn(steps, batch, 4).double(), torch.randn(1, d * batch, 5).double()
    c = torch.randn(1, batch, 5).double()
    output, final = layer(x, (h, c) if name == "LSTM" else h)
    wanted, last, c_n = beside_by_hand(layer, d, x, h.view(d, batch, 5), c[0])
    torch.testing.assert_close(output, wanted)
    found = final[0] if name == "LSTM" else final
    torch.testing.assert_close(found.view(d, batch, 5), last)
    if name == "LSTM":
        torch.testing.assert_close(final[1][0], c_n)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "IndRNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_delay_beside_in_windows_and_stacks(name, bidirectional):
    layer = getattr(fastcell, name)(
        4, 5, 2, skip=3, skip_beside=True, bidirectional=bidirectional, batch_first=True
    ).double()
    x = torch.randn(2, 10, 4, dtype=torch.float64, requires_grad=True)
    whole, last = layer(x)
    (whole.sum() + sum(s.sum() for s in (last if name == "LSTM" else (last,)))).backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    if not bidirectional:
        first, state = layer(x[:, :4])
        second, end = layer(x[:, 4:], state)
        torch.testing.assert_close(torch.cat((first, second), 1), whole)
        torch.testing.assert_close(end, last)
    again = getattr(fastcell, name)(
        4, 5, 2, skip=3, skip_beside=True, bidirectional=bidirectional, batch_first=True
    ).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], whole)


def test_a_delay_beside_with_resets():
    layer = fastcell.GRU(4, 5, skip=3, skip_beside=True).double()
    x = torch.randn(9, 2, 4).double()
    reset = torch.zeros(9, 2, dtype=torch.bool)
    reset[5] = True
    whole, last = layer(x, reset=reset)
    torch.testing.assert_close(whole, torch.cat((layer(x[:5])[0], layer(x[5:])[0])))
    torch.testing.assert_close(last, layer(x[5:])[1])
    reset[:] = False
    reset[8] = True
    torch.testing.assert_close(layer(x, reset=reset)[1], layer(x[8:])[1])


@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("which", [(), EXTRAS[1]], ids=["none", "all"])
@pytest.mark.parametrize("delay", [2, 3, STEPS, STEPS + 2])
@pytest.mark.parametrize("cell", [*CHOICES, *PLAIN])
def test_delayed_kernels_as_plain_torch(cell, delay, which, form):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    weights, states = tensors(named, delay=delay)
    sizes, extras = extras_for(form, layers=2, directions=2, batch=3, output=7)
    x = input_for(form, 3, 5)
    config = Config(with_delay(named, delay), 2, True, True, False)
    leaves, own = [x, *states, *weights], given(allowed(named, which), extras)
    found = results(lambda: differentiable(config, x, states, weights, sizes, own), leaves)
    wanted = results(lambda: composite.sequence(config, x, states, weights, sizes, own), leaves)
    assert_alike(found, wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("batch", "proj"), [(1, 0), (1, 4), (19, 0), (37, 33)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_delays_of_odd_sizes_and_threads(cell, batch, proj, threads):
    proj = proj if spec_of(cell).projection else 0
    sizes = {"layers": 3, "directions": 1, "proj": proj, "sizes": (6, 45), "batch": batch}
    weights, states = tensors(cell, delay=3, scale=0.1, **sizes)
    x = torch.randn(70, batch, 6, dtype=torch.float64, requires_grad=True)  # chunks of time
    config = Config(with_delay(cell, 3), 3, False, True, False)
    leaves, extras = [x, *states, *weights], Extras()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(lambda: differentiable(config, x, states, weights, None, extras), leaves)
        with torch.no_grad():
            alone, _ = cpu_forward(config, x, states, weights)
    finally:
        torch.set_num_threads(before)
    wanted = results(lambda: composite.sequence(config, x, states, weights, None, extras), leaves)
    assert_alike(found, wanted)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_delays_block_by_block_and_compiled(name):
    layer = getattr(fastcell, name)(4, 5, 2, skip=3, skip_beside=True, bidirectional=True).double()
    x = torch.randn(11, 2, 4, dtype=torch.float64, requires_grad=True)

    def gradients(run):
        output, final = run(x)
        finals = final if name == "LSTM" else (final,)
        total = output.square().sum() + sum(s.square().sum() for s in finals)
        leaves = (x, *layer.parameters())
        return [output, *finals, *torch.autograd.grad(total, leaves)]

    found = gradients(layer)
    assert_alike(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")), found)
    layer.recompute = True  # which the kernels of a delay do not know
    assert_alike(gradients(layer), found)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "both directions"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_no_sample_in_any_way(beside, bidirectional, resets, recompute):
    layer = fastcell.LSTM(
        2, 3, 2, skip=2, skip_beside=beside, bidirectional=bidirectional, recompute=recompute
    ).double()
    x = torch.randn(5, 0, 2, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(5, 0, dtype=torch.bool) if resets else None
    count = 4 if bidirectional else 2
    for hx in (None, states_for(layer, 0)):
        output, (h, c) = layer(x, hx, reset=reset)
        assert output.shape == (5, 0, 3 * count // 2)
        assert (h.shape, c.shape) == ((count, 0, 3), (count, 0, 3))
        output.sum().backward()
    every = layer(x, reset=reset, return_states=True)[2]
    assert every[0].shape == every[1].shape == (count, 5, 0, 3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_delays_of_no_sample():
    layer = fastcell.GRU(2, 3, skip=2, skip_beside=True).double()
    x = torch.randn(4, 0, 2, dtype=torch.float64, requires_grad=True)
    output, h = layer(x)
    assert (output.shape, h.shape) == ((4, 0, 3), (1, 0, 3))
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    assert tangent.shape == output.shape


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_a_wrong_weight_of_a_delay_is_named(recompute):
    for weight, error in ((torch.randn(3, 3), RuntimeError), (None, TypeError)):
        layer = fastcell.GRU(2, 3, skip=2, skip_beside=True, recompute=recompute)
        layer.weight_skip_l0 = None if weight is None else torch.nn.Parameter(weight)
        with pytest.raises(error, match="weight_skip must be"):
            layer(torch.randn(4, 1, 2))


def test_explain_knows_what_a_delay_costs():
    layer, plain = fastcell.LSTM(8, 32, skip=2, skip_beside=True), fastcell.LSTM(8, 32)
    more = 4 * 32 * 32 * 4
    assert fastcell.explain(layer).packed_bytes == fastcell.explain(plain).packed_bytes + more


def test_delays_have_second_derivatives():
    layer = fastcell.GRU(2, 3, skip=2, skip_beside=True).double()
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, h))
    assert torch.autograd.gradgradcheck(layer, (x, h))


@pytest.mark.parametrize("steps", [9, 7])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_all_states_of_a_delay_are_those_of_its_phases(kind, steps):
    torch.manual_seed(0)
    layer = getattr(fastcell, kind)(3, 5, 2, skip=3, bidirectional=True).double()
    plain = getattr(fastcell, kind)(3, 5, 2, bidirectional=True).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
    output, final, every = layer(x, return_states=True)
    every = every if kind == "LSTM" else (every,)
    apart = [plain(x[phase::3], return_states=True)[2] for phase in range(3)]
    apart = [a if kind == "LSTM" else (a,) for a in apart]
    for k, states in enumerate(every):
        assert states.shape == (4, steps, 2, 5)
        for phase in range(3):
            torch.testing.assert_close(states[:, phase::3], apart[phase][k])
    torch.testing.assert_close(torch.cat(list(every[0][-2:]), -1), output)
    torch.testing.assert_close(final, layer(x)[1])
    weight = torch.randn_like(every[-1])
    (found,) = torch.autograd.grad((every[-1] * weight).sum(), x)
    total = sum((a[-1] * weight[:, phase::3]).sum() for phase, a in enumerate(apart))
    (wanted,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(found, wanted)
    turned = getattr(fastcell, kind)(3, 5, 2, skip=3, bidirectional=True, batch_first=True)
    turned.double().load_state_dict(layer.state_dict())
    there = turned(x.transpose(0, 1), return_states=True)[2]
    there = there if kind == "LSTM" else (there,)
    for a, b in zip(there, every, strict=True):
        assert torch.equal(a.transpose(1, 2), b)
    alone = layer(x[:, 0], return_states=True)[2]
    alone = alone if kind == "LSTM" else (alone,)
    for a, b in zip(alone, every, strict=True):
        torch.testing.assert_close(a, b[:, :, 0])
    lengths = torch.tensor([steps, 4])
    ragged = layer(x, lengths=lengths, return_states=True)[2]
    ragged = ragged if kind == "LSTM" else (ragged,)
    short = layer(x[:4, 1:], return_states=True)[2]
    short = short if kind == "LSTM" else (short,)
    for a, b, c in zip(ragged, short, every, strict=True):
        torch.testing.assert_close(a[:, :4, 1:], b)
        torch.testing.assert_close(a[:, :, 0], c[:, :, 0])
        assert not a[:, 4:, 1].any()
