"""The CUDA kernels with options of cells, resets and what is drawn, beside plain torch in float64.

On a GPU where there is one, and emulated in any case, as in test_cuda.py.
"""

from __future__ import annotations

import math

import pytest
import torch

import fastcell
from fastcell import composite, cuda
from fastcell.autograd import differentiable
from fastcell.cells import Options, spec_of, with_options
from fastcell.plan import Config, Extras
from option_cases import (
    CHOICES,
    EXTRAS,
    PLAIN,
    STEPS,
    allowed,
    assert_within_policy,
    extras_for,
    given,
    input_for,
    results,
    tensors,
)

pytestmark = pytest.mark.usefixtures("poison")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
FORMS = ("padded", "packed", "lengths")
# At 16 bits some argument would be at the kink of a relu, or at a bound.
SMOOTH = {
    cell: options._replace(
        clip=math.inf,
        activation="tanh" if options.activation == "relu" else options.activation,
    )
    for cell, options in CHOICES.items()
}


def compare(
    cell: str,
    which: tuple[str, ...],
    form: str,
    device: str,
    dtype: torch.dtype = F64,
    place: str | None = None,
    *,
    layers: int = 2,
    proj: int = 0,
    sizes: tuple[int, int] = (5, 7),
    batch: int = 3,
) -> None:
    """Output, states and all gradients, under the policy."""
    hidden = sizes[1]
    output = proj or hidden
    weights, states = tensors(
        cell,
        layers=layers,
        proj=proj,
        sizes=sizes,
        batch=batch,
        dtype=dtype,
        scale=(3 * hidden) ** -0.5,  # as torch begins: no recurrence that amplifies
    )
    batch_sizes, extras = extras_for(
        form, layers=layers, directions=2, batch=batch, output=output, dtype=dtype
    )
    extras = given(allowed(cell, which), extras)
    x = input_for(form, batch, sizes[0], dtype)
    config = Config(cell, layers, True, True, False)

    def run(sequence, to_dtype, to_device):
        def moved(t):
            if t is None:
                return None
            t = t.detach().to(to_device)
            return t.to(to_dtype).requires_grad_() if t.is_floating_point() else t

        ours, *rest = [moved(t) for t in (x, *states, *weights)]
        hx, w = rest[: len(states)], rest[len(states) :]
        own = Extras(*[None if t is None else moved(t).detach() for t in extras])
        lengths = batch_sizes if form == "packed" else moved(batch_sizes)
        return results(lambda: sequence(config, ours, hx, w, lengths, own), [ours, *rest])

    with cuda.choose_engine(place):
        found = run(differentiable, dtype, device)
    wanted = run(composite.sequence, F64, "cpu")
    assert found[0].dtype is dtype
    assert_within_policy(found, wanted, config, (*sizes, output), batch)


@pytest.mark.parametrize(
    ("form", "which"),
    [*((form, EXTRAS[1]) for form in FORMS), *(("packed", one) for one in EXTRAS if len(one) < 2)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "none",
)
@pytest.mark.parametrize("cell", [*CHOICES, *PLAIN])
def test_as_plain_torch(cell, form, which, device):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    compare(named, which, form, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", [*(c for c in CHOICES if spec_of(c).projection), "lstm_peephole"])
def test_with_a_projection(cell, form, device):
    options = CHOICES.get(cell, Options())._replace(zoneout_h=0.0)
    compare(with_options(cell, options), EXTRAS[1], form, device, proj=4)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cell", CHOICES)
def test_narrower_numbers_and_several_blocks(cell, dtype, device):
    options = CHOICES[cell] if dtype is F32 else SMOOTH[cell]
    named = with_options(cell, options)
    compare(named, EXTRAS[1], "packed", device, dtype, sizes=(6, 71), batch=35, layers=1)


@pytest.mark.parametrize("place", cuda.ENGINES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm projected", "gru"])
def test_resets_and_factors_in_every_place(cell, form, dtype, place, device):
    """More samples than a tile has rows, more units than a block has."""
    name, _, projected = cell.partition(" ")
    proj = 13 if projected else 0
    compare(name, EXTRAS[1], form, device, dtype, place, proj=proj, sizes=(5, 21), batch=19)


@pytest.mark.parametrize("place", ["step", None])
def test_a_layer_with_lengths_and_resets_is_each_sample_alone(place, device):
    layer = fastcell.LSTM(
        3, 9, 2, bidirectional=True, batch_first=True, peephole=True, cell_clip=0.5,
        activation="elu", zoneout=(0.2, 0.3), dtype=F64, device=device,
    ).eval()  # fmt: skip
    batch, generator = 5, torch.Generator().manual_seed(3)
    x = torch.randn(batch, STEPS, 3, dtype=F64, generator=generator).to(device)
    reset = (torch.rand(batch, STEPS, generator=generator) < 0.3).to(device)
    lengths = torch.tensor([2, 6, 1, 5, 6])
    with cuda.choose_engine(place), torch.no_grad():
        output, (h, c) = layer(x, lengths=lengths.to(device), reset=reset)
        for b, n in enumerate(lengths.tolist()):
            alone, (last_h, last_c) = layer(x[b, :n], reset=reset[b, :n])
            for found, wanted in ((output[b, :n], alone), (h[:, b], last_h), (c[:, b], last_c)):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
            assert not output[b, n:].any()
