"""The layers against the reference and torch.nn: values, gradients, layouts, what is asked for.

All memory that torch leaves uninitialized is NaN here: outputs, gradients, what is kept for the
backward call, workspaces and packed weights. What a kernel does not write shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcell
from fastcell import _core, cpu
from support import (
    CELLS,
    LAYOUTS,
    Case,
    Problem,
    Values,
    assert_equal_bits,
    assert_same_bits,
    away_from_the_kink,
    every_other,
    is_parameter,
    pairwise,
)

pytestmark = pytest.mark.usefixtures("poison")

F32, F64 = torch.float32, torch.float64

# Sizes around those of vectors and register tiles, never a multiple of them.
FACTORS = {
    "cell": [*CELLS, "lstm projected"],
    "dtype": [F32, F64],
    "layers": [1, 2, 3],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "form": ["padded", "sorted", "ragged", "unbatched"],
    "hx": [True, False],
    "T": [1, 2, 50, 372],
    "B": [1, 2, 5, 33],
    "I": [1, 6, 35],
    "H": [1, 3, 17, 129],
}


def case_of(row: dict) -> Case:
    cell, _, projected = row["cell"].partition(" ")
    return Case(**row | {"cell": cell, "projected": bool(projected)})


def allowed(row: dict) -> bool:
    case = case_of(row)
    if case.form == "unbatched" and case.B != 1:
        return False
    if case.projected and case.H == 1:  # a projection must be smaller
        return False
    elements = case.T * case.B * case.H * case.layers * case.directions
    if case.cell == "rnn_relu" and case.dtype is F32 and elements > 20_000:
        return False  # some element would sit at the kink
    return case.flops <= 4e8  # what the reference does in about a second


def grid() -> list[Case]:
    return [case_of(row) for seed in range(2) for row in pairwise(FACTORS, allowed, seed)]


# A few cases that touch every path: for each instruction set and for the sanitizers.
COMPACT = [
    Case(cell, dtype, 2, True, projected=projected, form=form, T=11, B=B, I=5, H=H)
    for k, (cell, projected) in enumerate([*((cell, False) for cell in CELLS), ("lstm", True)])
    for form, B, H in [
        [("padded", 5, 53), ("ragged", 7, 17)],
        [("ragged", 3, 19), ("padded", 13, 3)],
    ][k % 2]
    for dtype in (F32, F64)
]
# The longest chains and the widest tiles, each with one block of every loop left over.
LARGE = [
    Case("lstm", F32, T=40, B=33, I=35, H=129),
    Case("gru", F32, 1, True, form="ragged", T=30, B=33, I=35, H=129),
    Case("rnn_tanh", F64, T=35, B=33, I=150, H=129),
    Case("lstm", F32, projected=True, T=9, B=33, I=35, H=129),
    Case("lstm", F32, T=372, B=64, I=16, H=33),
    Case("gru", F64, T=3, B=205, I=150, H=129),
]


def check(case: Case) -> None:
    problem = Problem(away_from_the_kink(case))
    ours = problem.run(problem.layer(fastcell))
    problem.assert_close(ours, problem.truth())
    wide = problem.widened()
    problem.assert_close(ours, wide.run(wide.layer(torch.nn)))


@pytest.mark.parametrize("case", grid(), ids=str)
def test_grid(case):
    check(case)


@pytest.mark.parametrize("case", COMPACT, ids=str)
def test_compact(case):
    check(case)


@pytest.mark.parametrize("batch", [1, 7, 20])
@pytest.mark.parametrize("units", range(1, 16))
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_last_panel(cell, units, batch):
    """Whose gates lie closely where few units are left for it, for any width of the vectors."""
    more = 3 if cell == "gru" else 2  # beyond where last panels are padded
    check(Case(cell, F32, 1, units % 2 == 0, T=4, B=batch, I=5, H=32 * more + units))
    check(Case(cell, F64, 1, units % 2 == 1, T=4, B=batch, I=5, H=16 * more + units))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("rnn_tanh", F32, T=372, B=33, I=6, H=17),
        Case("lstm", F32, T=200, B=64, I=16, H=33),
        Case("gru", F32, T=100, B=64, I=64, H=64),
        Case("gru", F32, 2, True, T=7, B=9, I=20, H=129),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_torch(case):
    """The root mean square of the error against float64; biases go with the weights beside them."""
    problem = Problem(case)
    truth = problem.truth()
    errors = []
    for library in (fastcell, torch.nn):
        squares: dict[str, list[torch.Tensor]] = {}
        for name, value in problem.run(problem.layer(library)).items():
            kind = "parameters" if is_parameter(name) else name
            squares.setdefault(kind, []).append((value.double() - truth[name]).square().flatten())
        errors.append({kind: torch.cat(s).mean().sqrt().item() for kind, s in squares.items()})
    ours, theirs = errors
    assert {kind: ours[kind] for kind in ours if ours[kind] > 2 * theirs[kind]} == {}, theirs


def test_the_grid_holds_every_pair_that_can_be():
    rows = [case._asdict() | {"cell": case.cell + " projected" * case.projected} for case in grid()]
    missing = {
        (a, x, b, y)
        for a in FACTORS
        for b in FACTORS
        if a < b
        for x in FACTORS[a]
        for y in FACTORS[b]
        if not any(row[a] == x and row[b] == y for row in rows)
    }
    assert missing == {("B", B, "form", "unbatched") for B in (2, 5, 33)} | {
        ("H", 1, "cell", "lstm projected")
    }


@pytest.mark.parametrize("form", ["padded", "ragged"])
@pytest.mark.parametrize("case", [Case(c, F64, 3, True) for c in CELLS], ids=str)
def test_dropout_masks(case, form):
    """The operator takes the factors between layers as an argument; the reference too."""
    problem = Problem(away_from_the_kink(case._replace(form=form)))
    case = problem.case
    rng = np.random.default_rng(7)
    masks = 2.0 * rng.integers(0, 2, (case.layers - 1, case.T, case.B, 2 * case.output))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    x, given, batch_sizes, order = inputs["x"], torch.from_numpy(masks), None, None
    states = [inputs[f"{name}0"] for name in case.state_names]
    if problem.lengths is not None:
        lengths = torch.from_numpy(problem.lengths)

        def pack(t):
            return torch.nn.utils.rnn.pack_padded_sequence(t, lengths, enforce_sorted=False)

        x, batch_sizes, order, back = pack(x)
        given = torch.stack([pack(mask).data for mask in given])
        states = [state.index_select(1, order) for state in states]
    output, finals = torch.ops.fastcell.sequence(
        x, states, list(layer.parameters()), batch_sizes, given, None, None, None,
        case.cell, case.layers, True, case.bias, False, "exact",
    )  # fmt: skip
    if order is not None:
        packed = torch.nn.utils.rnn.PackedSequence(output, batch_sizes, order, back)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=case.T)
        finals = [final.index_select(1, back) for final in finals]
    values = {"output": output, **dict(zip(case.state_names, finals, strict=True))}
    torch.autograd.backward(list(values.values()), problem.gradients_in())
    leaves = inputs | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    problem.assert_close(values, problem.truth(masks))


# --- what is asked for, and only that -----------------------------------------------------

STACKS = [Case(cell, F32, 2, True, T=4, B=3, I=5, H=9) for cell in CELLS]
STACKS.append(STACKS[2]._replace(projected=True))


def gradients(problem: Problem, layer: torch.nn.RNNBase, wanted: list[str]) -> Values:
    """The gradients of ``wanted`` alone; asserts that nothing else got one."""
    inputs = problem.inputs()
    leaves = inputs | dict(layer.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
        leaf.grad = None
    values = problem.call(layer, inputs)
    torch.autograd.backward(list(values.values()), problem.gradients_in())
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
    return {name: leaves[name].grad for name in wanted}


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_any_part_of_the_gradients_has_the_bits_of_all(case):
    problem = Problem(case)
    layer = problem.layer(fastcell)
    every = [*problem.inputs(), *dict(layer.named_parameters())]
    whole = gradients(problem, layer, every)
    parts = [[name] for name in every]
    parts += [[n for n in every if "l0" in n], [n for n in every if "l1" in n]]
    parts += [[n for n in every if "reverse" in n], ["x", *(n for n in every if "bias" in n)]]
    for part in parts:
        assert_same_bits(gradients(problem, layer, part), {name: whole[name] for name in part})


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_any_part_of_the_results_may_carry_a_gradient(case):
    """A loss of the output alone, of one final state alone, of half of the output."""
    problem = Problem(case)
    layers = problem.layer(fastcell), problem.layer(torch.nn)
    losses = [
        lambda values, name=name: values[name].square().sum()
        for name in problem.call(layers[0], problem.inputs())
    ]
    losses.append(lambda values: values["output"][1:3, :, ::2].sum() + values["h"][1].sum())
    for loss in losses:
        found = []
        for layer in layers:
            inputs = problem.inputs()
            layer.zero_grad()
            loss(problem.call(layer, inputs)).backward()
            leaves = inputs | dict(layer.named_parameters())
            found.append({f"gradient of {name}": leaf.grad for name, leaf in leaves.items()})
        ours, theirs = found
        # torch.nn leaves None where no path leads; zeros say the same.
        theirs = {
            name: torch.zeros_like(ours[name]) if grad is None and ours[name] is not None else grad
            for name, grad in theirs.items()
        }
        theirs = {name: grad for name, grad in theirs.items() if grad is not None}
        problem.assert_close({name: ours[name] for name in theirs}, theirs)


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_backward_twice(case):
    problem = Problem(case)
    layer, inputs = problem.layer(fastcell), problem.inputs()
    values = list(problem.call(layer, inputs).values())
    leaves = inputs | dict(layer.named_parameters())
    first, second = (
        torch.autograd.grad(
            values, list(leaves.values()), problem.gradients_in(), retain_graph=True
        )
        for _ in range(2)
    )
    for name, a, b in zip(leaves, first, second, strict=True):
        assert_equal_bits(a, b, name)


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_inference_keeps_nothing(case, monkeypatch):
    problem = Problem(case)
    layer = problem.layer(fastcell)
    kept = []

    def observed(*args, **kwargs):
        result = forward(*args, **kwargs)
        kept.append(result[2])
        return result

    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", observed)
    inputs = problem.inputs()
    trained = problem.call(layer, inputs)
    assert kept.pop().numel() > 0
    for context in (torch.no_grad, torch.inference_mode):
        layer.__dict__.pop("_remembered")  # a call that comes again would not be seen here
        with context():
            assert_same_bits(problem.call(layer, inputs), trained)
        assert kept.pop() is None
    layer.requires_grad_(False)
    still = problem.call(layer, {name: value.detach() for name, value in inputs.items()})
    assert kept.pop() is None
    assert not any(value.requires_grad for value in still.values())


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_no_initial_state_means_zeros(case):
    problem = Problem(case._replace(hx=False))
    zeros = Problem(case)
    zeros.states = [np.zeros_like(state) for state in zeros.states]
    zeros.x, zeros.weights, zeros.grad_output, zeros.grad_states = (
        problem.x, problem.weights, problem.grad_output, problem.grad_states,
    )  # fmt: skip
    without, given = (p.run(p.layer(fastcell)) for p in (problem, zeros))
    assert_same_bits(without, {name: given[name] for name in without})


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_any_layout_has_the_bits_of_a_dense_one(case, batch_first):
    problem = Problem(case._replace(batch_first=batch_first))
    layer, dense = problem.layer(fastcell), problem.inputs()
    grads = problem.gradients_in()

    def run(inputs: Values, grads: list[torch.Tensor]) -> Values:
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        assert all(leaf.stride() == inputs[name].stride() for name, leaf in leaves.items())
        layer.zero_grad()
        values = problem.call(layer, leaves)
        torch.autograd.backward(list(values.values()), grads)
        named = leaves | dict(layer.named_parameters())
        return values | {f"gradient of {name}": leaf.grad.clone() for name, leaf in named.items()}

    expected = run(dense, grads)
    for name, change in LAYOUTS.items():
        strided = {key: change(value.detach()) for key, value in dense.items()}
        assert any(not value.is_contiguous() for value in strided.values()), name
        assert_same_bits(run(strided, grads), expected)
        assert_same_bits(run(dense, [change(grad) for grad in grads]), expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_expanded(case, dim):
    """Memory of stride 0: one step, sample or feature repeated, and the gradient of a sum."""
    problem = Problem(case)
    found = []
    for library in (fastcell, torch.nn):
        layer = problem.layer(library)
        source = problem.to_caller(problem.x).narrow(dim, 0, 1).requires_grad_()
        x = source.expand(case.T, case.B, case.I)
        state = torch.ones(1, 1, 1, dtype=case.dtype)
        sizes = [case.output, case.H]
        hx = [
            state.expand(4, case.B, size) for size, _ in zip(sizes, case.state_names, strict=False)
        ]
        output, _ = layer(x, tuple(hx) if case.cell == "lstm" else hx[0])
        output.sum().backward()
        named = {"x": source} | dict(layer.named_parameters())
        found.append({f"gradient of {name}": leaf.grad for name, leaf in named.items()})
        found[-1]["output"] = output.detach()
    problem.assert_close(*found)


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_weights_of_any_layout(case):
    """A parameter that is a transposed or strided tensor gives the bits of a dense one."""
    problem = Problem(case)
    dense, strided = problem.layer(fastcell), problem.layer(fastcell)
    for name, parameter in list(strided.named_parameters()):
        change = (lambda t: t.t().contiguous().t()) if parameter.dim() == 2 else every_other
        setattr(strided, name, torch.nn.Parameter(change(parameter.detach())))
    assert not strided.weight_ih_l0.is_contiguous()
    assert_same_bits(problem.run(strided), problem.run(dense))


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_tied_weights(case):
    """One parameter in two places: its gradient is the sum of both."""
    problem = Problem(case)
    layers = problem.layer(fastcell), problem.layer(torch.nn)
    for layer in layers:
        layer.weight_hh_l1 = layer.weight_hh_l0
        layer.weight_ih_l1_reverse = layer.weight_ih_l1
        layer.bias_hh_l0 = layer.bias_ih_l0
    ours, theirs = (problem.run(layer) for layer in layers)
    assert "gradient of weight_hh_l1" not in ours
    problem.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell, batch_first):
    case = Case(cell, F32, 2, True, batch_first=batch_first, B=0)
    problem = Problem(case)
    ours, theirs = (problem.run(problem.layer(library)) for library in (fastcell, torch.nn))
    problem.assert_close(ours, theirs)
    assert not ours["gradient of weight_hh_l0"].any()


def test_no_features():
    """Weights (4*H, 0): what is left is the recurrence. Modules refuse that, functions do not."""
    x, h, c = torch.zeros(4, 2, 0), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    weights = [torch.empty(12, 0), torch.randn(12, 3), torch.randn(12), torch.randn(12)]
    output, _ = fastcell.functional.lstm(x, (h, c), weights)
    one = [torch.ones(12, 1), *weights[1:]]
    expected, _ = fastcell.functional.lstm(torch.zeros(4, 2, 1), (h, c), one)
    assert_equal_bits(output, expected)


# --- values that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("case", "where"),
    [
        (case, where)
        for case in STACKS[:4]
        for where in ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l1", "bias_ih_l0")
        if where != "c0" or case.cell == "lstm"
    ],
    ids=str,
)
def test_nan_and_inf_pass_as_in_torch(case, value, where):
    """In the same places, in values and gradients."""
    problem = Problem(case._replace(bidirectional=False))
    found = []
    for library in (fastcell, torch.nn):
        layer, inputs = problem.layer(library), problem.inputs()
        leaves = inputs | dict(layer.named_parameters())
        with torch.no_grad():
            leaves[where].view(-1)[2] = value
        values = problem.call(layer, inputs)
        torch.autograd.backward(list(values.values()), problem.gradients_in())
        found.append(
            {name: v.detach() for name, v in values.items()}
            | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        )
    problem.assert_close(*found)


def test_poison_would_show(monkeypatch):
    """The fixture at work: kernels that write nothing."""
    problem = Problem(Case("lstm", F32))
    layer = problem.layer(fastcell)
    monkeypatch.setattr(_core.Stack, "backward", lambda *_: None)
    assert all(v.isnan().all() for name, v in problem.run(layer).items() if "gradient" in name)
    monkeypatch.setattr(_core.Stack, "forward", lambda *_: None)
    values = problem.call(layer, problem.inputs())
    assert all(value.isnan().all() for value in values.values())
