"""Every state of every step from the CUDA kernels: c_t of an LSTM as a result, and its gradient.

On a GPU where there is one, and emulated in any case, as in test_cuda.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fastcell
from fastcell import cpu, cuda, engines
from fastcell.all_states import layer_with_cells
from fastcell.cells import CELLS, Options, spec_of, with_options
from fastcell.plan import NO_EXTRAS, Config, Extras
from option_cases import (
    CHOICES,
    EXTRAS,
    assert_within_policy,
    extras_for,
    given,
    input_for,
    results,
    tensors,
)
from support import skip_lacking

pytestmark = pytest.mark.usefixtures("poison")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FORMS = ("padded", "packed", "lengths")
LSTMS = [name for name in CELLS if spec_of(name).states == 2]


def compare(
    cell: str,
    which: tuple[str, ...],
    form: str,
    device: str,
    dtype: torch.dtype = F64,
    place: str | None = None,
    *,
    proj: int = 0,
    sizes: tuple[int, int] = (5, 7),
    batch: int = 3,
) -> None:
    """Output, states, c of all steps and all gradients, beside plain torch in float64."""
    hidden = sizes[1]
    output = proj or hidden
    weights, states = tensors(
        cell, layers=1, proj=proj, sizes=sizes, batch=batch, dtype=dtype, scale=(3 * hidden) ** -0.5
    )
    batch_sizes, extras = extras_for(
        form, layers=1, directions=2, batch=batch, output=output, dtype=dtype
    )
    extras = given([name for name in which if name != "dropout"], extras)
    x = input_for(form, batch, sizes[0], dtype)
    config = Config(cell, 1, True, True, False)

    def run(kernels, to_dtype, to_device):
        def moved(t):
            if t is None:
                return None
            t = t.detach().to(to_device)
            return t.to(to_dtype).requires_grad_() if t.is_floating_point() else t

        ours, *rest = [moved(t) for t in (x, *states, *weights)]
        hx, w = rest[:2], rest[2:]
        own = Extras(*[None if t is None else moved(t).detach() for t in extras])
        lengths = batch_sizes if form == "packed" else moved(batch_sizes)

        def call():
            y, finals, cells = layer_with_cells(config, ours, hx, w, lengths, own, kernels, True)
            assert cells.shape == (*y.shape[:-1], 2 * hidden)
            assert cells.dtype is (F64 if to_dtype is F64 else F32)
            return torch.cat((y, cells.to(y.dtype)), -1), finals

        return results(call, [ours, *rest])

    with cuda.choose_engine(place):
        found = run(True, dtype, device)
    wanted = run(False, F64, "cpu")
    assert_within_policy(found, wanted, config, (*sizes, output), batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", LSTMS)
def test_as_plain_torch(cell, form, device):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    compare(named, EXTRAS[1], form, device)
    compare(named, (), form, device)


@pytest.mark.parametrize("place", cuda.ENGINES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("proj", [0, 13])
def test_in_every_place(proj, form, dtype, place, device):
    """More samples than a tile has rows, more units than a block has."""
    which = EXTRAS[1] if dtype is F32 else ()
    compare("lstm", which, form, device, dtype, place, proj=proj, sizes=(5, 21), batch=19)


@pytest.mark.parametrize("form", FORMS)
def test_with_a_projection_and_options(form, device):
    options = Options(zoneout_h=0.0)._replace(zoneout_c=0.3)
    compare(with_options("lstm_general", options), EXTRAS[1], form, device, proj=4)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lengths", [None, [2, 5, 4]])
def test_layers_as_on_the_cpu(lengths, dtype, batch_first, device, monkeypatch):
    """A loss on c_t alone; results in the dtype of the layer, and no warning."""
    torch.manual_seed(0)
    layer = fastcell.LSTM(4, 9, 2, bidirectional=True, batch_first=batch_first, dtype=dtype)
    own = copy.deepcopy(layer).to(device)
    x = torch.randn(3, 5, 4) if batch_first else torch.randn(5, 3, 4)
    ended = None if lengths is None else torch.tensor(lengths)
    grad = torch.randn(4, *x.shape[:2], 9)

    def run(layer, device):
        leaf = x.to(device, dtype).requires_grad_()
        _, _, (h, c) = layer(leaf, lengths=ended, return_states=True)
        assert (h.dtype, c.dtype) == (dtype, dtype)
        c.backward(grad.to(device, dtype))
        # (Of the layer's last weights c_t knows those before the output gate alone.)
        return [t.detach().cpu() for t in (h, c, leaf.grad, *[p.grad for p in layer.parameters()])]

    found = run(own, device)
    monkeypatch.setitem(engines.ENGINES, "cpu", cpu)
    close = {"rtol": 0.05, "atol": 0.03} if dtype is BF16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(found, run(layer, "cpu"), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_the_end_of_a_sample_is_zero_and_what_comes_from_there_is_not_seen(device):
    """With lengths on the device: no number of the padding, NaN among them."""
    layer = fastcell.LSTM(3, 20, device=device)
    config, weights = Config("lstm", 1, False, True, False), list(layer.parameters())
    lengths = torch.tensor([1, 4, 2], device=device)
    ended = (torch.arange(4, device=device)[:, None] >= lengths)[:, :, None]
    x = torch.randn(4, 3, 3, device=device).masked_fill(ended, torch.nan).requires_grad_()
    cells = layer_with_cells(config, x, None, weights, lengths, NO_EXTRAS, True, True)[2]
    assert not cells.masked_select(ended).any()
    assert cells.masked_select(~ended).all()
    cells.backward(torch.ones_like(cells).masked_fill(ended, torch.nan))
    for grad in (x.grad, *[p.grad for p in weights]):
        assert grad.isfinite().all()


def test_second_derivatives(device):
    layer = fastcell.LSTM(2, 3, dtype=F64, device=device)
    x = torch.randn(3, 2, 2, dtype=F64, device=device, requires_grad=True)

    def run(x):
        _, _, (h, c) = layer(x, return_states=True)
        return h, c

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_second_derivatives_at_16_bits(device):
    skip_lacking(device, dtype=BF16)
    layer = fastcell.LSTM(2, 3, dtype=BF16, device=device)
    x = torch.randn(3, 2, 2, dtype=BF16, device=device, requires_grad=True)
    c = layer(x, return_states=True)[2][1]
    (grad,) = torch.autograd.grad(c.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.dtype is BF16
    assert second.any()
