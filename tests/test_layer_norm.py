"""LSTM and GRU with layer normalisation."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch

import fastcell
from fastcell import normed, normed_composite, normed_cpu, ops, reference
from fastcell.cells import cell_of
from fastcell.normed_composite import Call
from support import threads
from tolerances import finite_difference_tolerance

KINDS = ("LSTM", "GRU")
# What goes with it, by what follows the name of the class.
VARIANTS = {
    "LSTM": {},
    "GRU": {},
    "LSTM peephole": {"peephole": True},
    "LSTM coupled": {"coupled": True},
    "LSTM projected": {"proj_size": 4},
    "LSTM with all": {"peephole": True, "coupled": True, "proj_size": 3},
}


def layer_of(kind, *sizes, **options):
    """With norms that do something of their own."""
    torch.manual_seed(5)
    options = VARIANTS[kind] | options
    layer = getattr(fastcell, kind.split()[0])(*sizes, layer_norm=True, **options).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("norm_"):
                p.add_(torch.randn_like(p).mul_(0.3))
    return layer


def normalised(x, gain):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def by_hand(layer, x, h, c):
    """One layer, one direction, written out from the paper's equations."""
    w_ih, w_hh, b_ih, b_hh, g_ih, g_hh, *norm_c = layer.parameters()
    H, outputs = layer.hidden_size, []
    for x_t in x:
        a, u = x_t @ w_ih.T, h @ w_hh.T
        if norm_c:
            i, f, g, o = ((normalised(a, g_ih) + b_ih) + (normalised(u, g_hh) + b_hh)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            gain, bias = norm_c[0]
            h = torch.sigmoid(o) * torch.tanh(normalised(c, gain) + bias)
        else:
            both = [
                torch.cat(
                    (normalised(t[:, : 2 * H], k[: 2 * H]), normalised(t[:, 2 * H :], k[2 * H :])),
                    -1,
                )
                + b
                for t, k, b in ((a, g_ih, b_ih), (u, g_hh, b_hh))
            ]
            (r_x, z_x, n_x), (r_u, z_u, n_u) = (t.chunk(3, -1) for t in both)
            z = torch.sigmoid(z_x + z_u)
            n = torch.tanh(n_x + torch.sigmoid(r_x + r_u) * n_u)
            h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("sizes", [(1, 2), (3, 5), (17, 33), (8, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_as_written_out(kind, sizes):
    layer = layer_of(kind, *sizes)
    x = torch.randn(6, 3, sizes[0]).double()
    h, c = (torch.randn(3, sizes[1]).double() for _ in range(2))
    output, final = layer(x, (h[None], c[None]) if kind == "LSTM" else h[None])
    wanted, h_n, c_n = by_hand(layer, x, h, c)
    torch.testing.assert_close(output, wanted)
    found = final if kind == "LSTM" else (final,)
    for a, b in zip(found, (h_n, c_n), strict=False):
        torch.testing.assert_close(a[0], b)


def reference_problem(kind, dtype, sizes):
    layer = layer_of(kind, *sizes)
    names = [n.removesuffix("_l0") for n, _ in layer.named_parameters()]
    values = [p.detach().numpy() for p in layer.parameters()]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 4, sizes[0]))
    widths = (layer.proj_size or sizes[1], sizes[1])[: 1 if kind == "GRU" else 2]
    states = [rng.normal(size=(4, width)) for width in widths]
    grads = [rng.normal(size=(6, 4, widths[0])), *[rng.normal(size=s.shape) for s in states]]
    return layer, names, [v.astype(dtype) for v in (x, *states, *values)], grads


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_reference_equals_finite_differences(kind):
    layer, names, leaves, grads = reference_problem(kind, np.float64, (3, 5))
    count = len(grads)
    cell = cell_of(layer)

    def run(leaves):
        x, states, w = (
            leaves[0],
            list(leaves[1:count]),
            dict(zip(names, leaves[count:], strict=True)),
        )
        return reference.normed.forward(cell, x, states, w), w

    def loss(leaves):
        (output, final, _), _ = run(leaves)
        return sum((a * b).sum() for a, b in zip((output, *final), grads, strict=True))

    (_, _, tape), w = run(leaves)
    d_x, d_states, d_w = reference.normed.backward(cell, tape, w, grads[0], grads[1:])
    found = [d_x, *d_states, *[d_w[n] for n in names]]
    rng = np.random.default_rng(2)
    # The differences in more digits: norms bend.
    wide = [leaf.astype(np.longdouble) for leaf in leaves]
    step = np.finfo(np.longdouble).eps ** (1 / 3)
    for k, (leaf, gradient) in enumerate(zip(wide, found, strict=True)):
        direction = rng.normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)
        above, below = (
            loss([*wide[:k], leaf + sign * step * direction, *wide[k + 1 :]]) for sign in (1, -1)
        )
        expected = (above - below) / (2 * step)
        size = max(abs(above), np.linalg.norm(gradient))
        allowance = finite_difference_tolerance(np.float64) * size
        assert abs((gradient * direction).sum() - expected) <= allowance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(3, 5), (20, 67)])
@pytest.mark.parametrize("kind", VARIANTS)
def test_as_the_reference(kind, sizes, dtype):
    layer, names, leaves, grads = reference_problem(kind, np.float64, sizes)
    layer.to(dtype)
    x, *states = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in leaves[: len(grads)]]
    hx, cell = tuple(s[None] for s in states), cell_of(layer)
    output, final = layer(x, hx if len(hx) == 2 else hx[0])
    final = final if len(hx) == 2 else (final,)
    wanted = [torch.tensor(g, dtype=dtype) for g in grads]
    torch.autograd.backward([output, *[f[0] for f in final]], wanted)
    found = [output, *[f[0] for f in final], x.grad, *[s.grad for s in states]]
    found += [p.grad for p in layer.parameters()]

    def by_reference(real, seed=None):
        arrays = [np.asarray(v, real) for v in (*leaves, *grads)]
        if seed is not None:  # numbers that are off by as much as rounding may make them
            rng, eps = np.random.default_rng(seed), np.finfo(real).eps
            arrays = [
                (v * (1 + eps * rng.uniform(-0.5, 0.5, v.shape))).astype(real) for v in arrays
            ]
        w = dict(zip(names, arrays[len(grads) : len(leaves)], strict=True))
        d = arrays[len(leaves) :]
        y, last, tape = reference.normed.forward(cell, arrays[0], arrays[1 : len(grads)], w)
        d_x, d_states, d_w = reference.normed.backward(cell, tape, w, d[0], d[1:])
        return [y, *last, d_x, *d_states, *[d_w[n] for n in names]]

    # A norm's error depends on the numbers: it divides by their spread. So not more than a few
    # times what NumPy makes of it in the same dtype, of these numbers and of some that differ by
    # rounding: of one run alone it may be small by luck, on one CPU and not on the next.
    real = np.float32 if dtype is torch.float32 else np.float64
    exact = by_reference(np.longdouble)
    same = zip(*[by_reference(real, seed) for seed in (None, 0, 1, 2)], strict=True)
    for a, b, runs in zip(found, exact, same, strict=True):
        error, usual = abs(a.detach().numpy() - b).max(), max(abs(c - b).max() for c in runs)
        assert error <= 4 * usual + 4 * np.finfo(real).eps * abs(b).max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_derivatives(kind, bias):
    layer = layer_of(kind, 2, 5, bidirectional=True, bias=bias)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    widths = (layer.proj_size or 5, 5)[: 1 if kind == "GRU" else 2]
    states = [torch.randn(2, 2, n, dtype=torch.float64, requires_grad=True) for n in widths]
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *rest):
        hx, weights = rest[: len(states)], rest[len(states) :]
        output, final = torch.func.functional_call(
            layer, dict(zip(names, weights, strict=True)), (x, hx if len(hx) == 2 else hx[0])
        )
        return output, *(final if len(hx) == 2 else (final,))

    leaves = (x, *states, *layer.parameters())
    assert torch.autograd.gradcheck(run, leaves)
    frozen = [p.detach() for p in (*states, *layer.parameters())]
    assert torch.autograd.gradgradcheck(lambda x: run(x, *frozen), (x,))


def call_of(kind, sizes, features, hidden, bias=True):
    """(name of the cell, input rows, states, weights as the functions below take them)."""
    layer = layer_of(kind, features, hidden, bias=bias)
    (weights,) = normed.split(cell_of(layer), list(layer.parameters()), bias, layer.proj_size > 0)
    rows = torch.randn(sum(sizes), features, dtype=torch.float64, requires_grad=True)
    widths = (layer.proj_size or hidden, hidden)[: 1 if kind == "GRU" else 2]
    hx = [torch.randn(sizes[0], n, dtype=torch.float64, requires_grad=True) for n in widths]
    return cell_of(layer), (rows, hx, weights)


def everything(run, rows, hx, weights):
    """Output, final states, and the gradient of all there is."""
    output, states = run(rows, hx, *weights)
    total = output.sin().sum() + sum((s.cos() * s).sum() for s in states)
    leaves = [t for t in (rows, *hx, *weights) if t is not None]
    return [output, *states, *torch.autograd.grad(total, leaves)]


FORMS = {"padded": (19,) * 4, "packed": (19, 18, 7, 1), "long": (19,) * 60}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", VARIANTS)
def test_kernels_as_plain_torch(kind, reverse, form, bias):
    torch.manual_seed(3)
    sizes = FORMS[form]
    cell, operands = call_of(kind, sizes, 5, 37, bias)
    reset = torch.rand(sum(sizes)) < 0.2
    call = Call(cell, sizes, reset, reverse, None, torch.float64, kind != "GRU")
    wanted = everything(partial(normed_composite.layer, call), *operands)
    bits = None
    for count in (1, 2, 3):
        with threads(count):
            found = everything(partial(normed_cpu.layer, call), *operands)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        bits = bits or found
        assert all(torch.equal(a, b) for a, b in zip(found, bits, strict=True))


@pytest.mark.parametrize("kind", VARIANTS)
def test_only_what_is_asked_for(kind):
    """Any one gradient alone is the one among all of them; nothing is kept without any."""
    cell, (rows, hx, weights) = call_of(kind, (4, 4, 2), 5, 9)
    call = Call(cell, (4, 4, 2), None, False, None, torch.float64, False)
    run = partial(normed_cpu.layer, call)
    every = everything(run, rows, hx, weights)[1 + len(hx) :]
    leaves = [t for t in (rows, *hx, *weights) if t is not None]
    for k, wanted in enumerate(every):
        own = [t.detach().requires_grad_(i == k) for i, t in enumerate(leaves)]
        given = iter(own)
        x, *rest = [None if t is None else next(given) for t in (rows, *hx, *weights)]
        output, states = run(x, rest[: len(hx)], *rest[len(hx) :])
        total = output.sin().sum() + sum((s.cos() * s).sum() for s in states)
        assert torch.equal(torch.autograd.grad(total, own[k])[0], wanted)
    with torch.no_grad():
        output, states = run(rows, hx, *weights)
    found = everything(run, rows, hx, weights)
    assert all(torch.equal(a, b) for a, b in zip((output, *states), found, strict=False))


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_form_of_input(kind):
    layer = layer_of(kind, 4, 6, 2, bidirectional=True)
    x = torch.randn(7, 3, 4).double()
    reset = torch.rand(7, 3) < 0.2
    lengths = torch.tensor([5, 7, 2])
    output, final = layer(x, lengths=lengths, reset=reset)
    states = final if kind != "GRU" else (final,)
    for b, n in enumerate(lengths.tolist()):
        alone, last = layer(x[:n, b], reset=reset[:n, b])
        torch.testing.assert_close(output[:n, b], alone)
        assert not output[n:, b].any()
        for s, w in zip(states, last if kind != "GRU" else (last,), strict=True):
            torch.testing.assert_close(s[:, b], w)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    packed, last = layer(
        pack(x, lengths, enforce_sorted=False), reset=pack(reset, lengths, enforce_sorted=False)
    )
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(packed)[0], output)
    torch.testing.assert_close(last, final)
    turned = layer_of(kind, 4, 6, 2, bidirectional=True, batch_first=True)
    turned.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        turned(x.transpose(0, 1), lengths=lengths, reset=reset.t())[0].transpose(0, 1), output
    )


@pytest.mark.parametrize("form", ["padded", "lengths", "packed", "unbatched"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_all_states(kind, form):
    """Those of each step, and their gradients, as step by step."""
    layer = layer_of(kind, 4, 6, 2, bidirectional=form != "unbatched")
    x = torch.randn(5, 3, 4).double().requires_grad_()
    lengths = torch.tensor([5, 5, 5] if form == "padded" else [5, 2, 3])
    if form == "unbatched":
        output, final, every = layer(x[:, 0], return_states=True)
    elif form == "packed":
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed, final, every = layer(pack(x, lengths, enforce_sorted=False), return_states=True)
        output = packed.data
    else:
        given = {} if form == "padded" else {"lengths": lengths}
        output, final, every = layer(x, **given, return_states=True)
    every = every if kind != "GRU" else (every,)
    final = final if kind != "GRU" else (final,)
    directions = 1 if form == "unbatched" else 2
    # The last layer's h are the output, and the states at a sample's end are the final ones.
    h = every[0]
    torch.testing.assert_close(torch.cat(list(h[-directions:]), -1), output)
    if form in ("padded", "lengths"):
        for of_kind, last in zip(every, final, strict=True):
            for b, n in enumerate(lengths.tolist()):
                torch.testing.assert_close(of_kind[0, n - 1, b], last[0, b])
                torch.testing.assert_close(of_kind[1, 0, b], last[1, b])
                assert not of_kind[:, n:, b].any()
    # A weight on every state at once: the gradient of a copy that runs in torch's operations.
    weights = [torch.randn_like(s) for s in every]
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(
        sum((s * w).sum() for s, w in zip(every, weights, strict=True)), leaves, allow_unused=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "normed_engine", lambda *_: None)
        if form == "unbatched":
            again = layer(x[:, 0], return_states=True)[2]
        elif form == "packed":
            again = layer(pack(x, lengths, enforce_sorted=False), return_states=True)[2]
        else:
            again = layer(x, **given, return_states=True)[2]
    again = again if kind != "GRU" else (again,)
    for a, b in zip(every, again, strict=True):
        torch.testing.assert_close(a, b)
    wanted = torch.autograd.grad(
        sum((s * w).sum() for s, w in zip(again, weights, strict=True)), leaves, allow_unused=True
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_threads_and_batch(kind):
    layer = layer_of(kind, 4, 50).float()
    x = torch.randn(6, 21, 4)
    with threads(1):
        whole, _ = layer(x)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(layer(x)[0], whole)
    for b in (0, 7, 20):
        assert torch.equal(layer(x[:, b : b + 1])[0], whole[:, b : b + 1])
    first, state = layer(x[:2])
    assert torch.equal(torch.cat((first, layer(x[2:], state)[0])), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_travels(kind):
    layer = getattr(fastcell, kind)(3, 8, 2, layer_norm=True, dropout=0.1)
    assert "layer_norm=True" in repr(layer)
    gains = [p for n, p in layer.named_parameters() if n.startswith("norm_ih")]
    assert all((g == 1).all() for g in gains)
    assert len(gains) == 2
    x, target = torch.randn(9, 4, 3), torch.randn(9, 4, 8)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (layer(x)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    layer.eval()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x)[0], layer(x)[0])
    fresh = getattr(fastcell, kind)(3, 8, 2, layer_norm=True).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], layer(x)[0])
    narrow = copy.deepcopy(layer).bfloat16()
    assert narrow(x.bfloat16())[0].dtype is torch.bfloat16
    (output, _) = layer(x)
    output.relu_().sum().backward()  # the caller's output is his own
    compiled = torch.compile(lambda x: layer(x)[0], backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_weights_does_not_matter(kind):
    """What the norm is for."""
    layer = layer_of(kind, 4, 40)
    x = 10 * torch.randn(5, 2, 4).double()
    before = layer(x)[0]
    with torch.no_grad():
        layer.weight_ih_l0.mul_(7)
        layer.weight_hh_l0.mul_(7)
    torch.testing.assert_close(layer(x)[0], before, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "options",
    [{"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"recompute": True}, {"skip": 2},
     {"activation": "relu"}, {"cell_clip": 1.0}],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options):
    with pytest.raises(ValueError, match="layer_norm goes with the plain GRU and with the LSTM"):
        fastcell.LSTM(3, 4, layer_norm=True, **options)


def test_other_refusals():
    layer = fastcell.GRU(3, 4, layer_norm=True)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal"):
        layer(torch.zeros(2, 1, 5))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        layer(torch.zeros(0, 1, 3))
    with pytest.raises(RuntimeError, match="one dtype and device"):
        layer(torch.zeros(2, 1, 3).double())
    with pytest.raises((ValueError, TypeError), match="layer"):
        fastcell.Stream(layer)
    assert layer(torch.zeros(2, 0, 3))[0].shape == (2, 0, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "proj_size" not in VARIANTS[v]])
def test_a_cell_is_a_step_of_the_layer(variant, bias):
    layer, kind = layer_of(variant, 3, 5, bias=bias), variant.split()[0]
    make = partial(getattr(fastcell, kind + "Cell"), 3, 5, bias, layer_norm=True)
    cell = make(**VARIANTS[variant]).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    assert "layer_norm=True" in repr(cell)
    x, h, c = (torch.randn(2, n).double() for n in (3, 5, 5))
    hx = (h, c) if kind == "LSTM" else h
    found = cell(x, hx)
    _, wanted = layer(x[None], (h[None], c[None]) if kind == "LSTM" else h[None])
    if kind == "GRU":
        found, wanted = (found,), (wanted,)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b[0])
    one = cell(x[0], (h[0], c[0]) if kind == "LSTM" else h[0])
    torch.testing.assert_close(one[0] if kind == "LSTM" else one, found[0][0])
    with pytest.raises(ValueError, match="layer_norm goes with peephole, coupled and no other"):
        make(zoneout=0.1)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_functional_form(kind):
    layer = layer_of(kind, 3, 5, 2, bidirectional=True)
    x, weights = torch.randn(4, 2, 3).double(), list(layer.parameters())
    options = {k: v for k, v in VARIANTS[kind].items() if k != "proj_size"}
    run = partial(getattr(fastcell.functional, kind.split()[0].lower()), **options)
    output, _ = run(x, None, weights, num_layers=2, bidirectional=True, layer_norm=True)
    torch.testing.assert_close(output, layer(x)[0])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
    rows, _ = run(
        packed.data, None, weights, num_layers=2, bidirectional=True, layer_norm=True,
        batch_sizes=packed.batch_sizes,
    )  # fmt: skip
    torch.testing.assert_close(rows, layer(packed)[0].data)
    with pytest.raises(RuntimeError, match="weights for each of 4 layers and directions, or"):
        run(x, None, weights[:-1], num_layers=2, bidirectional=True, layer_norm=True)
    with pytest.raises(ValueError, match="layer_norm goes with peephole and coupled, with no"):
        run(x, None, weights, num_layers=2, bidirectional=True, layer_norm=True, zoneout=0.1)
