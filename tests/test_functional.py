"""fastcell.functional against torch.nn, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from against_torch import same_values
from fastcell import functional

T, B, I, H, P = 4, 3, 5, 6, 2  # noqa: E741

FUNCTIONS = [("rnn", {}), ("rnn", {"nonlinearity": "relu"}), ("lstm", {}), ("gru", {})]
STACKS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
]


def problem(name, cell, stack, proj_size=0):
    """torch's layer, its weights, an input (T, B, I) or (B, T, I), and states."""
    torch.manual_seed(0)
    if proj_size:
        cell = {**cell, "proj_size": proj_size}
    layer = getattr(nn, name.upper())(I, H, **cell, **stack, dtype=torch.float64)
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(T, B, I, dtype=torch.float64)
    if layer.batch_first:
        x = x.transpose(0, 1)
    h = torch.randn(stacked, B, proj_size or H, dtype=torch.float64)
    hx = (h, torch.randn(stacked, B, H, dtype=torch.float64)) if name == "lstm" else h
    return layer, list(layer.parameters()), x, hx


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize(
    ("name", "cell", "proj_size"), [*((*f, 0) for f in FUNCTIONS), ("lstm", {}, P)], ids=str
)
def test_every_form_of_input(name, cell, stack, proj_size):
    layer, weights, x, hx = problem(name, cell, stack, proj_size)
    function = getattr(functional, name)

    def run(x, hx, **more):
        return function(x, hx, weights, **cell, **stack, **more)

    same_values(run(x, hx), layer(x, hx))
    same_values(run(x, None), layer(x))
    packed = pack_padded_sequence(x, [1, T, 2], batch_first=layer.batch_first, enforce_sorted=False)
    same_values(run(packed, hx), layer(packed, hx))

    # The rows of a packed sequence with their batch_sizes; the states are then in sorted order.
    order = packed.sorted_indices
    in_order = tuple(h[:, order] for h in hx) if name == "lstm" else hx[:, order]
    output, states = run(packed.data, in_order, batch_sizes=packed.batch_sizes)
    expected, expected_states = layer(packed, hx)
    same_values(output, expected.data)
    expected_states = (
        tuple(h[:, order] for h in expected_states) if name == "lstm" else expected_states[:, order]
    )
    same_values(states, expected_states)

    x = x[0] if layer.batch_first else x[:, 0]
    hx = tuple(h[:, 0] for h in hx) if name == "lstm" else hx[:, 0]
    same_values(run(x, hx), layer(x, hx))
    same_values(run(x, None), layer(x))


@pytest.mark.parametrize(("name", "cell"), FUNCTIONS, ids=str)
def test_gradients(name, cell):
    layer, weights, x, hx = problem(name, cell, {"num_layers": 2})
    leaves = [x, *(hx if name == "lstm" else (hx,))]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = getattr(functional, name)(x, hx, weights, **cell, num_layers=2)[0]
    theirs = layer(x, hx)[0]
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), [*leaves, *weights]),
        torch.autograd.grad(theirs.square().sum(), [*leaves, *weights]),
        strict=True,
    ):
        same_values(mine, other)


@pytest.mark.parametrize(("name", "cell"), FUNCTIONS, ids=str)
def test_dropout_only_in_training(name, cell):
    layer, weights, x, _ = problem(name, cell, {"num_layers": 2, "dropout": 0.5})
    function = getattr(functional, name)
    options = {**cell, "num_layers": 2, "dropout": 0.5}
    same_values(function(x, None, weights, **options), layer.eval()(x))
    torch.manual_seed(1)
    mine = function(x, None, weights, **options, training=True)
    torch.manual_seed(1)
    same_values(mine, layer.train()(x))


def test_wrong_arguments_are_named():
    _, weights, x, hx = problem("lstm", {}, {"num_layers": 2})
    h, c = hx

    def refused(error, text, *args, **options):
        with pytest.raises(error, match=text):
            functional.lstm(*args, **{"num_layers": 2, **options})

    refused(RuntimeError, "Expected 4 weights for each of 2 .* got 7", x, hx, weights[:7])
    refused(RuntimeError, "Expected 4 weights for each of 4 ", x, hx, weights, bidirectional=True)
    refused(RuntimeError, "Expected 2 weights for each of 2 ", x, hx, weights, bias=False)
    refused(ValueError, "num_layers must be", x, hx, weights, num_layers=0)
    refused(RuntimeError, "of 2 dimensions, got 1 and 2", x, hx, [c[0, 0], *weights[1:]])
    refused(ValueError, "got 4D", x[None], hx, weights)
    refused(ValueError, "got 1D", x[0, 0], hx, weights)
    refused(RuntimeError, "input with 5 features, got 4", x[..., :4], hx, weights)
    refused(RuntimeError, "input with 5 features, got 4", x[..., :4], None, weights)
    refused(ValueError, "input is torch.float32, but the weights", x.float(), hx, weights)
    refused(RuntimeError, r"h_0 of size \[2, 3, 6\]", x, (h[:1], c), weights)
    refused(RuntimeError, r"c_0 of size \[2, 3, 6\]", x, (h, c[..., :4]), weights)
    refused(RuntimeError, "3-D", x, (h[0], c), weights)
    refused(RuntimeError, "two hidden states", x, (h, c, c), weights)
    refused(RuntimeError, "must have the same dtype", x, (h.float(), c), weights)
    refused(RuntimeError, "not at the same device", x, (h.to("meta"), c), weights)
    refused(RuntimeError, "larger than 0", x[:0], None, weights)
    refused(RuntimeError, "dropout probability", x, hx, weights, dropout=1.5, training=True)
    refused(TypeError, "element 4", x, hx, [*weights[:4], None, *weights[5:]])
    refused(RuntimeError, r"weight_ih of size \[24, 6\]", x, hx, [*weights[:4], c[0], *weights[5:]])
    sizes = torch.tensor([2, 1])
    refused(ValueError, "2 dimensions, got 3", x[:3], None, weights, batch_sizes=sizes)
    refused(RuntimeError, "describe 3 rows", x[0, :2], None, weights, batch_sizes=sizes)
    packed = pack_padded_sequence(x, [T, 2, 1])
    refused(ValueError, "not with the whole", packed, None, weights, batch_sizes=sizes)


def test_wrong_arguments_of_one_state_cells():
    _, weights, x, h = problem("gru", {}, {})
    with pytest.raises(RuntimeError, match=r"h_0 of size \[1, 3, 6\]"):
        functional.gru(x, h[:, :1], weights)
    with pytest.raises(RuntimeError, match=r"Expected 4 weights .* got 5"):
        functional.gru(x, h, [*weights, weights[0]])
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sigmoid'"):
        functional.rnn(x, h, weights, nonlinearity="sigmoid")


def test_nothing_is_kept_between_calls():
    _, weights, x, hx = problem("lstm", {}, {})
    first = functional.lstm(x, hx, weights)
    with torch.no_grad():
        weights[0].mul_(2)
    second = functional.lstm(x, hx, weights)
    assert not torch.equal(first[0], second[0])
    same_values(functional.lstm(x, hx, [w.clone() for w in weights]), second)
