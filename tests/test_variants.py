"""Leaky units, LSTMs with peepholes, coupled gates, or both: against the reference."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import fastcell
from fastcell import composite
from fastcell.cells import CELLS as SPECS
from fastcell.plan import NO_EXTRAS, Config
from support import OWN, VARIANTS, Case, Problem, assert_same_bits, away_from_the_kink, pairwise

pytestmark = pytest.mark.usefixtures("poison")

F32, F64 = torch.float32, torch.float64
LSTMS = [cell for cell in VARIANTS if cell.startswith("lstm")]
FACTORS = {
    "cell": list(VARIANTS),
    "dtype": [F32, F64],
    "layers": [1, 2],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "projected": [False, True],
    "form": ["padded", "sorted", "ragged", "unbatched"],
    "hx": [True, False],
    "T": [1, 2, 50],
    "B": [1, 5, 33],
    "I": [1, 6, 35],
    "H": [2, 3, 17, 129],
}


def allowed(row: dict) -> bool:
    case = Case(**row)
    if case.projected and not case.lstm:
        return False
    if case.cell == "leaky_relu" and case.T * case.B * case.H * case.layers > 5000:
        return False  # some element would sit at the kink
    return (case.form != "unbatched" or case.B == 1) and case.flops <= 2e8


@pytest.mark.parametrize("case", [Case(**row) for row in pairwise(FACTORS, allowed, 0)], ids=str)
def test_grid(case):
    problem = Problem(away_from_the_kink(case))
    problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())


@pytest.mark.parametrize("cell", VARIANTS)
def test_the_reference_by_finite_differences(cell):
    problem = Problem(Case(cell, F64, 1, True, projected=cell in LSTMS, T=3, B=2, I=3, H=4))
    truth = problem.truth()
    rng = np.random.default_rng(1)

    def loss() -> float:
        values = problem.truth()
        total = (values["output"].numpy() * problem.grad_output).sum()
        for name, grad in zip(problem.case.state_names, problem.grad_states, strict=True):
            total += (values[name].numpy() * grad).sum()
        return float(total)

    names = [name for name, _ in problem.layer(fastcell).named_parameters()]
    for name, weight in zip(names, problem.weights, strict=True):
        at = tuple(int(rng.integers(n)) for n in weight.shape)
        before, step = weight[at], 1e-6
        weight[at] = before + step
        above = loss()
        weight[at] = before - step
        below = loss()
        weight[at] = before
        found = truth[f"gradient of {name}"][at].item()
        assert found == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize(
    ("cell", "projected"), [*((c, False) for c in VARIANTS), *((c, True) for c in LSTMS)]
)
def test_kernels_by_finite_differences(cell, projected):
    case = Case(cell, F64, 1, True, projected=projected, T=3, B=2, I=3, H=4)
    layer = Problem(away_from_the_kink(case)).layer(fastcell)
    x = torch.randn(3, 2, 3, dtype=F64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


@pytest.mark.parametrize("cell", VARIANTS)
def test_the_composite_step_is_the_kernels(cell):
    problem = Problem(Case(cell, F64, 2, True, projected=cell in LSTMS, T=4, B=3, I=5, H=9))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    config = Config(cell, 2, True, True, False)
    states = [inputs[f"{name}0"] for name in problem.case.state_names]
    output, finals = composite.sequence(
        config, inputs["x"], states, list(layer.parameters()), None, NO_EXTRAS
    )
    found = {"output": output, **dict(zip(problem.case.state_names, finals, strict=True))}
    problem.assert_close(found, problem.call(layer, inputs))


@pytest.mark.parametrize("cell", VARIANTS)
def test_same_bits_for_any_threads_and_batch(cell):
    from support import threads

    problem = Problem(Case(cell, F32, T=30, B=24, I=16, H=40))
    with threads(1):
        alone = problem.run(problem.layer(fastcell))
    with threads(3):
        assert_same_bits(problem.run(problem.layer(fastcell)), alone)
    part = problem.samples([3, 17], "padded")
    found = part.call(part.layer(fastcell), part.inputs())
    assert torch.equal(found["output"], alone["output"][:, [3, 17]])


@pytest.mark.parametrize("cell", VARIANTS)
def test_streamed_and_in_bfloat16(cell):
    problem = Problem(Case(cell, F32, hx=False, T=12, B=1, I=5, H=20))
    layer = problem.layer(fastcell)
    with torch.no_grad():
        x = problem.to_caller(problem.x)
        whole = layer(x)[0]
        stream = fastcell.Stream(layer)
        parts = [stream(part[:, 0]).clone() for part in (x[:1], x[1:9], x[9:])]
        assert torch.equal(torch.cat(parts), whole[:, 0])
        narrow = copy.deepcopy(layer).bfloat16()(x.bfloat16())[0]
    error = (narrow.float() - whole).abs().max().item()
    assert 0 < error < 0.03


def test_parameters_are_named_as_the_contract_says():
    layer = fastcell.LSTM(5, 7, 2, bidirectional=True, proj_size=3, peephole=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["weight_peephole_l0"] == shapes["weight_peephole_l1_reverse"] == (3, 7)
    assert shapes["weight_hr_l0"] == (3, 7)
    assert "peephole=True" in repr(layer)
    layer = fastcell.LSTM(5, 7, coupled=True, peephole=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight_ih_l0": (21, 5), "weight_hh_l0": (21, 7), "bias_ih_l0": (21,), "bias_hh_l0": (21,),
        "weight_peephole_l0": (2, 7),
    }  # fmt: skip
    assert all(p.abs().max() <= 7**-0.5 and p.any() for p in layer.parameters())
    plain = fastcell.LSTM(5, 7)
    assert "peephole" not in repr(plain)
    assert vars(plain).keys() == vars(fastcell.LSTM(5, 7, peephole=False)).keys()


def test_layers_are_copied_saved_and_moved():
    layer = fastcell.LSTM(5, 7, peephole=True, coupled=True)
    x = torch.randn(4, 2, 5)
    expected = layer(x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], expected)
    other = fastcell.LSTM(5, 7, peephole=True, coupled=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], expected)
    assert other.double()(x.double())[0].dtype is F64
    with torch.no_grad():
        assert torch.equal(layer(x)[0], expected)
        layer.weight_peephole_l0.add_(0.5)
        assert not torch.equal(layer(x)[0], expected)


def test_the_functional_form_and_its_errors():
    layer = fastcell.LSTM(5, 7, proj_size=4, peephole=True)
    x, weights = torch.randn(4, 2, 5), list(layer.parameters())
    output, _ = fastcell.functional.lstm(x, None, weights, peephole=True)
    assert torch.equal(output, layer(x)[0])
    with pytest.raises(RuntimeError, match="Expected 5 weights .* or 6 with a projection, got 4"):
        fastcell.functional.lstm(x, None, weights[:4], peephole=True)
    with pytest.raises(RuntimeError, match=r"own weight of size \[3, 7\], got \[2, 7\]"):
        fastcell.functional.lstm(x, None, [*weights[:-1], weights[-1][:2]], peephole=True)
    with pytest.raises(ValueError, match="cannot be quantized"):
        fastcell.quantize(layer)


def test_coupled_peepholes_have_their_rows():
    assert {name: SPECS[name].parameters for name in VARIANTS} == {"lstm_coupled": 0} | OWN


def test_leaky_units_keep_and_forget():
    """alpha 0 is the plain layer, alpha 1 keeps its state for ever."""
    plain = fastcell.RNN(3, 4, 2, bidirectional=True)
    x, h = torch.randn(5, 2, 3), torch.randn(4, 2, 4)
    layer = fastcell.LeakyRNN(3, 4, 2, bidirectional=True, alpha=0.0)
    layer.load_state_dict(plain.state_dict(), strict=False)
    for ours, theirs in zip(layer(x, h), plain(x, h), strict=True):
        torch.testing.assert_close(ours, theirs)
    keeping = fastcell.LeakyRNN(3, 4, 2, bidirectional=True, alpha=1.0)
    output, final = keeping(x, h)
    assert torch.equal(final, h)
    assert torch.equal(output[0], output[-1])


def test_alphas_are_fixed_or_learned():
    alphas = torch.linspace(0, 0.9, 4)
    layer = fastcell.LeakyRNN(3, 4, alpha=alphas)
    assert torch.equal(layer.weight_leak_l0, alphas[None])
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert layer.weight_leak_l0.grad is None
    assert layer.weight_ih_l0.grad is not None
    layer.reset_parameters()
    assert torch.equal(layer.weight_leak_l0, alphas[None])
    layer = fastcell.LeakyRNN(3, 4, nonlinearity="relu", alpha=0.9, learn_alpha=True)
    assert "learn_alpha=True" in repr(layer)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert layer.weight_leak_l0.grad.any()
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 1.5"):
        fastcell.LeakyRNN(3, 4, alpha=1.5)
    with pytest.raises(ValueError, match=r"of shape \(4,\) or \(1, 4\), got \(3,\)"):
        fastcell.LeakyRNN(3, 4, alpha=torch.zeros(3))
