"""Derivatives of first, second and third order against finite differences and against torch."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call

import fastcell
from against_torch import CELLS as CELL_MODULES
from against_torch import LAYERS, same_values, tensors, twins
from operands import CASES, as_function, operands, run_kernel, run_layer, run_operator
from support import away_from_the_kink

# torch's own: its rules of forward-mode differentiation are scripted when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

RUNS = [run_kernel, run_operator]
# Finite differences must not step over the kink of a relu.
SMOOTH = [away_from_the_kink(case) for case in CASES]
DROPPED = [case._replace(layers=2) for case in CASES if case.cell in ("lstm", "gru") and case.hx]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_first_derivatives(run, case):
    """Of output and final states by input, initial states and every weight."""
    o = operands(case)
    assert gradcheck(as_function(run, o), o.leaves, fast_mode=True)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_second_derivatives(run, case):
    o = operands(case)
    assert gradgradcheck(as_function(run, o), o.leaves, fast_mode=True)


@pytest.mark.parametrize("case", [SMOOTH[2], SMOOTH[6]], ids=str)
def test_every_entry_of_the_jacobians(case):
    o = operands(case._replace(T=2, B=2, I=2, H=2))
    assert gradcheck(as_function(run_kernel, o), o.leaves)
    assert gradgradcheck(as_function(run_kernel, o), o.leaves)


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_with_dropout_masks(case):
    o = operands(case, masks=True)
    f = as_function(run_operator, o)
    assert gradcheck(f, o.leaves, fast_mode=True)
    assert gradgradcheck(f, o.leaves, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_layers_in_training_with_dropout(name, bidirectional):
    layer = getattr(fastcell, name)(
        3, 4, num_layers=3, dropout=0.4, bidirectional=bidirectional, dtype=torch.float64
    )

    def run(x, *parameters):
        torch.manual_seed(0)
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return tuple(tensors(functional_call(layer, named, (x,))))

    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CELL_MODULES)
def test_cells(name):
    cell = getattr(fastcell, name)(3, 4, dtype=torch.float64)
    names = list(dict(cell.named_parameters()))

    def run(x, h, c, *parameters):
        hx = (h, c) if name == "LSTMCell" else h * c
        return functional_call(cell, dict(zip(names, parameters, strict=True)), (x, hx))

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, h, c, *cell.parameters())
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_forward_mode(case):
    o = operands(case)
    assert gradcheck(
        as_function(run_operator, o),
        o.leaves,
        fast_mode=True,
        check_forward_ad=True,
        check_backward_ad=False,
    )


@pytest.mark.parametrize("case", SMOOTH[2:4], ids=str)
def test_forward_over_reverse(case):
    o = operands(case)
    assert gradgradcheck(
        as_function(run_layer, o), o.leaves, fast_mode=True, check_fwd_over_rev=True
    )


@pytest.mark.parametrize("case", SMOOTH[1:5], ids=str)
def test_batches_of_gradients(case):
    o = operands(case._replace(T=2, B=2, I=2, H=2))
    assert gradcheck(as_function(run_kernel, o), o.leaves, check_batched_grad=True)


def penalised(module, x):
    """Loss and the gradients of a gradient penalty."""
    x = x.detach().requires_grad_()
    value = sum(t.square().sum() for t in tensors(module(x)))
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    penalty = (slope.square().sum(-1) - 1).square().sum() + value
    return penalty, torch.autograd.grad(penalty, [x, *module.parameters()])


@pytest.mark.parametrize("name", [*LAYERS, *CELL_MODULES])
def test_gradient_penalty_is_torchs(name):
    kwargs = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    ours, theirs = twins(name, 3, 4, dtype=torch.float64, **kwargs)
    x = torch.randn((5, 3) if name.endswith("Cell") else (4, 5, 3), dtype=torch.float64)
    same_values(penalised(ours, x), penalised(theirs, x))


@pytest.mark.parametrize("name", [*LAYERS, *CELL_MODULES])
def test_third_derivative_is_torchs(name):
    ours, theirs = twins(name, 2, 3, dtype=torch.float64)
    x = torch.randn((2, 2) if name.endswith("Cell") else (3, 2, 2), dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        value = sum(t.pow(3).sum() for t in tensors(module(leaves[0])))
        for _ in range(2):
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        found.append((value, torch.autograd.grad(value, leaves)))
    same_values(*found)


def test_a_state_made_from_the_input_keeps_its_gradient_apart():
    """In the double backward, too: each operand's gradient is its own."""
    ours, theirs = twins("LSTM", 4, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        a = x.clone().requires_grad_()
        output, _ = module(a, (a[:1], a[1:2] * a[:1]))
        (slope,) = torch.autograd.grad(output.square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [a, *module.parameters()]))
    same_values(*found)


def test_a_wrong_derivative_is_noticed(monkeypatch):
    """The checks above can fail: with one gate's gradient turned round, they do."""
    o = operands(CASES[2])
    original = fastcell.cpu.backward

    def wrong(*args):
        grads = original(*args)
        grads[-1][:1].neg_()
        return grads

    monkeypatch.setattr(fastcell.cpu, "backward", wrong)
    with pytest.raises(GradcheckError):
        gradcheck(as_function(run_kernel, o), o.leaves, fast_mode=True)
