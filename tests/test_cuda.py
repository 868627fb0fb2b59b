"""The CUDA engine: on a GPU where there is one, and emulated on this machine in any case.

Emulated, the same kernel sources run as threads of the CPU (csrc/cuda/device_emulated.h), under the
same engine, operators and layers; tensors then are on the CPU. Memory that torch leaves
uninitialized is NaN, and so is shared memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastcell
from emulation_build import emulated
from fastcell import cuda, engines
from fastcell.plan import NO_EXTRAS
from support import (
    CELLS,
    LAYOUTS,
    VARIANTS,
    Case,
    Problem,
    Values,
    assert_same_bits,
    away_from_the_kink,
    every_other,
    is_parameter,
    lacking,
    pairwise,
    places_of,
    skip_lacking,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PLACES = ("step", "grid", "cluster")


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    pass


FACTORS = {
    "cell": [*CELLS, "lstm projected", *VARIANTS],
    "dtype": [F64, F32, BF16, F16, "tf32"],
    "place": [*PLACES, None],
    "layers": [1, 2, 3],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "form": ["padded", "sorted", "ragged", "unbatched"],
    "hx": [True, False],
    "T": [1, 2, 11],
    "B": [1, 2, 19, 33],
    "I": [1, 6, 35],
    "H": [1, 3, 17, 70],
}


def case_of(row: dict) -> Case:
    cell, _, projected = row["cell"].partition(" ")
    dtype = F32 if row["dtype"] == "tf32" else row["dtype"]
    row = {name: value for name, value in row.items() if name != "place"}
    return Case(**row | {"cell": cell, "projected": bool(projected), "dtype": dtype})


def allowed(row: dict) -> bool:
    case = case_of(row)
    if case.form == "unbatched" and case.B != 1:
        return False
    if case.projected and case.H == 1:  # a projection must be smaller
        return False
    if case.dtype is F64 and row["place"] not in ("step", None):
        return False
    if case.cell in VARIANTS and row["place"] not in ("step", None):
        return False
    elements = case.T * case.B * case.H * case.layers * case.directions
    if case.cell.endswith("relu") and (row["dtype"] not in (F32, F64) or elements > 20_000):
        return False  # some element would sit at the kink
    return case.flops <= 2e7


GRID = pairwise(FACTORS, allowed, 0)


def name_of(row: dict) -> str:
    return f"{row['place']}-{'tf32-' * (row['dtype'] == 'tf32')}{case_of(row)}"


def assert_close(problem: Problem, ours: Values, expected: Values, precision: torch.dtype) -> None:
    """Under the policy, at another precision than the tensors' own (TF32's is that of float16)."""
    for name, value in ours.items():
        assert value.dtype is problem.case.dtype, name
        assert value.device.type == problem.case.device
    wide = problem.widened()
    wide.case = wide.case._replace(dtype=precision)
    wide.assert_close({n: v.cpu().to(precision) for n, v in ours.items()}, expected)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("row", GRID, ids=name_of)
def test_grid(row, device):
    tf32 = row["dtype"] == "tf32"
    problem = Problem(away_from_the_kink(case_of(row))._replace(device=device))
    with cuda.choose_engine(row["place"]), tf32_allowed(tf32):
        ours = problem.run(problem.layer(fastcell))
    assert_close(problem, ours, problem.truth(), F16 if tf32 else problem.case.dtype)


def test_the_grid_holds_every_product_in_every_place():
    held = {(row["cell"], row["dtype"], row["place"]) for row in GRID}
    assert {place for _, _, place in held} == {*PLACES, None}
    for dtype in (F32, BF16, F16, "tf32"):
        assert {place for _, kind, place in held if kind == dtype} == {*PLACES, None}
    for cell in FACTORS["cell"]:
        places = {"step", None} if cell in VARIANTS else {*PLACES, None}
        assert {place for name, _, place in held if name == cell} == places


def on_or_off_for_good(problem: Problem) -> Problem:
    """The problem with units of a relu layer that stay far from its kink, on either side.

    Rounding to 16 bits moves a value so far that among many units some would cross it.
    """
    if problem.case.cell != "rnn_relu":
        return problem
    moved = copy.copy(problem)
    w_ih, w_hh, *biases = range(4)
    moved.weights = [w / 4 for w in problem.weights]
    for first in range(0, len(moved.weights), 4):
        assert moved.weights[first + w_ih].ndim == moved.weights[first + w_hh].ndim == 2
        for bias in biases:
            moved.weights[first + bias] = np.where(np.arange(problem.case.H) % 3, 2.0, -2.0)
    return moved


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [F64, F32, "tf32", BF16, F16], ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_every_cell_dtype_and_place(cell, dtype, place, device):
    """All of their combinations: two directions, blocks and tiles that are not full."""
    row = {"cell": cell, "dtype": dtype, "T": 3, "B": 19, "I": 5, "H": 17, "bidirectional": True}
    tf32 = dtype == "tf32"
    problem = on_or_off_for_good(Problem(case_of(row)._replace(device=device)))
    layer = problem.layer(fastcell)
    with cuda.choose_engine(place), tf32_allowed(tf32):
        if dtype is F64 and place != "step":
            with pytest.raises(ValueError, match=f"no plan for .* float64, .* place '{place}'"):
                problem.run(layer)
            return
        said = fastcell.explain(layer, problem.inputs()["x"])
        assert places_of(said.schedule) == [place]
        if device == "cpu":  # a GPU may have no TF32: a permission, no demand
            assert said.products == ("tf32" if tf32 else str(dtype).removeprefix("torch."))
        ours = problem.run(layer)
    assert_close(problem, ours, problem.truth(), F16 if tf32 else problem.case.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cell", CELLS)
def test_several_tiles_and_blocks(cell, dtype, place, device):
    """More samples than a tile has rows, more units than a block, more tiles than fit at once."""
    if device == "cpu":
        emulated().pretend(multiprocessors=4 if place == "grid" else 16)
    hidden = 30 if place == "grid" else 90
    case = Case(cell, dtype, 1, place == "cluster", T=6, B=70, I=5, H=hidden, device=device)
    if cell == "rnn_relu":  # fewer, none of which is at the kink
        case = away_from_the_kink(case._replace(dtype=F32, T=2, B=35, H=31))
    problem = Problem(case)
    with cuda.choose_engine(place):
        problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("place", ["cluster", "grid"])
def test_weights_in_registers_and_shared_memory(place, projected, device):
    """More of k than a warp's registers hold, in both passes: few blocks for many units."""
    skip_lacking(device, dtype=BF16)
    if device == "cpu":
        emulated().pretend(multiprocessors=16 if place == "cluster" else 10)
    case = Case("lstm", BF16, projected=projected, T=3, B=5, I=4, H=300, device=device)
    problem = Problem(case)
    with cuda.choose_engine(place):
        problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "case", [Case(c, F32, 2, True, T=5, B=9, I=6, H=20) for c in CELLS], ids=str
)
def test_same_bits_every_time(case, place, device):
    problem = Problem(case._replace(device=device))
    with cuda.choose_engine(place):
        first = problem.run(problem.layer(fastcell))
        for _ in range(3):
            assert_same_bits(problem.run(problem.layer(fastcell)), first)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, place, device):
    """Input, states, weights and incoming gradients that are not contiguous."""
    change = LAYOUTS[layout]
    case = Case("lstm", F32, 2, True, projected=True, T=4, B=3, I=5, H=20, device=device)
    problem = Problem(case)
    layer = problem.layer(fastcell)
    for name, parameter in list(layer.named_parameters()):
        value = parameter.detach()
        other = value.t().contiguous().t() if value.dim() == 2 else every_other(value)
        setattr(layer, name, torch.nn.Parameter(other))
    inputs = {n: change(t.detach()).requires_grad_() for n, t in problem.inputs().items()}
    grads = [change(grad) for grad in problem.gradients_in()]
    assert not any(t.is_contiguous() for t in (*inputs.values(), *grads, *layer.parameters()))
    with cuda.choose_engine(place):
        values = problem.call(layer, inputs)
        torch.autograd.backward(list(values.values()), grads)
    leaves = inputs | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    problem.assert_close(values, problem.truth())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_dropout_masks(form, place, device):
    """The operator takes the factors between layers as an argument; the reference too."""
    problem = Problem(Case("lstm", F32, 3, True, form=form, T=5, B=3, H=9, device=device))
    case = problem.case
    rng = np.random.default_rng(7)
    masks = 2.0 * rng.integers(0, 2, (case.layers - 1, case.T, case.B, 2 * case.output))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    x, batch_sizes = inputs["x"], None
    given = torch.tensor(masks, dtype=case.dtype, device=device)
    states = [inputs["h0"], inputs["c0"]]
    if problem.lengths is not None:
        lengths = torch.from_numpy(problem.lengths)

        def pack(t):
            return torch.nn.utils.rnn.pack_padded_sequence(t, lengths, enforce_sorted=False)

        x, batch_sizes, order, back = pack(x)
        given = torch.stack([pack(mask).data for mask in given])
        states = [state.index_select(1, order) for state in states]
    with cuda.choose_engine(place):
        output, finals = torch.ops.fastcell.sequence(
            x, states, list(layer.parameters()), batch_sizes, given, None, None, None,
            case.cell, case.layers, True, case.bias, False, "exact",
        )  # fmt: skip
        if problem.lengths is not None:
            packed = torch.nn.utils.rnn.PackedSequence(output, batch_sizes, order, back)
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=case.T)
            finals = [final.index_select(1, back) for final in finals]
        values = {"output": output, **dict(zip(case.state_names, finals, strict=True))}
        torch.autograd.backward(list(values.values()), problem.gradients_in())
    leaves = inputs | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    problem.assert_close(values, problem.truth(masks))


@pytest.mark.parametrize("cell", CELLS)
def test_any_part_of_the_gradients_has_the_bits_of_all(cell, device):
    problem = Problem(Case(cell, F32, 2, True, T=4, B=3, I=5, H=9, device=device))
    layer = problem.layer(fastcell)

    def gradients(wanted):
        inputs = problem.inputs()
        leaves = inputs | dict(layer.named_parameters())
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
            leaf.grad = None
        values = problem.call(layer, inputs)
        torch.autograd.backward(list(values.values()), problem.gradients_in())
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
        return {name: leaves[name].grad for name in wanted}

    every = [*problem.inputs(), *dict(layer.named_parameters())]
    whole = gradients(every)
    for part in [*([name] for name in every), [n for n in every if "l1" in n]]:
        assert_same_bits(gradients(part), {name: whole[name] for name in part})


@pytest.mark.parametrize("place", PLACES)
def test_a_sequence_cut_in_two(place, device):
    """States carry over, in inference too, and a step alone is one of many."""
    problem = Problem(Case("lstm", F32, 2, T=7, B=5, I=6, H=20, device=device))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    x, state = inputs["x"].detach(), (inputs["h0"].detach(), inputs["c0"].detach())
    with cuda.choose_engine(place), torch.no_grad():
        whole, (h, c) = layer(x, state)
        parts = []
        for part in (x[:4], x[4:5], x[5:]):
            output, state = layer(part, state)
            parts.append(output)
    values = {"output": torch.cat(parts), "h": state[0], "c": state[1]}
    problem.assert_close(values, {"output": whole, "h": h, "c": c})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_lengths_on_the_device(cell, batch_first, place, device):
    """As a PackedSequence; NaN in the padding is not seen."""
    case = Case(cell, F32, 2, True, batch_first=batch_first, T=6, B=19, I=4, H=20, form="ragged")
    problem = Problem(case._replace(projected=cell == "lstm" and not batch_first, device=device))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    assert problem.lengths is not None
    lengths = torch.from_numpy(problem.lengths).to(device)
    step = torch.arange(case.T, device=device)[:, None]
    alive = (step < lengths)[:, :, None]
    alive = alive.transpose(0, 1) if batch_first else alive
    x = inputs["x"]
    poisoned = x.detach().where(alive, torch.nan).requires_grad_()
    states = [inputs[f"{name}0"] for name in problem.case.state_names]
    with cuda.choose_engine(place):
        output, finals = torch.ops.fastcell.sequence(
            poisoned, states, list(layer.parameters()), lengths, None, None, None, None,
            cell, 2, True, True, batch_first, "exact",
        )  # fmt: skip
        values = {"output": output, **dict(zip(problem.case.state_names, finals, strict=True))}
        torch.autograd.backward(list(values.values()), problem.gradients_in())
    leaves = inputs | {"x": poisoned} | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    problem.assert_close(values, problem.truth())


@pytest.mark.parametrize("place", PLACES)
def test_lengths_above_the_steps_count_as_all_and_below_zero_as_none(place, device):
    layer = fastcell.LSTM(3, 20, bidirectional=True, device=device)
    x = torch.randn(4, 3, 3, device=device)

    def run(lengths):
        leaf = x.clone().requires_grad_()
        given = torch.tensor(lengths, device=device)
        output, states = torch.ops.fastcell.sequence(
            leaf,
            [],
            list(layer.parameters()),
            given,
            *NO_EXTRAS,
            "lstm",
            1,
            True,
            True,
            False,
            "exact",
        )
        loss = output.square().sum() + sum(s.sum() for s in states)
        return [output, *torch.autograd.grad(loss, [leaf, *layer.parameters()])]

    with cuda.choose_engine(place):
        for given, counted in (([9, 2, 5], [4, 2, 4]), ([3, -1, 5], [3, 0, 4])):
            for found, expected in zip(run(given), run(counted), strict=True):
                assert torch.equal(found, expected)


def test_backward_within_autocast(device):
    """Which holds for the forward pass, not for derivatives of what ran outside of it."""
    skip_lacking(device, dtype=BF16)
    problem = Problem(Case("gru", F32, 2, True, T=4, B=3, I=5, H=9, device=device))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    expected = problem.run(layer)
    values = problem.call(layer, inputs)
    leaves = inputs | dict(layer.named_parameters())
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(
            list(values.values()), list(leaves.values()), problem.gradients_in()
        )
    grads = {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}
    assert_same_bits(grads, {name: expected[name] for name in grads})


def test_both_of_torchs_switches_for_tf32(device):
    layer, x = fastcell.GRU(3, 20, device=device), torch.randn(4, 2, 3, device=device)
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch has the older switch alone")
    if cuda.device_code.cuda_limits(0)["capability"] < 80:
        pytest.skip("this GPU has no TF32")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert fastcell.explain(layer, x).products == "tf32"
        layer(x)
        if device == "cpu":  # Turing has no such products: a permission, no demand
            emulated().pretend(capability=75, max_cluster=1)
            assert fastcell.explain(layer, x).products == "float32"
            layer(x)
        matmul.fp32_precision = "ieee"
        assert fastcell.explain(layer, x).products == "float32"
    finally:
        matmul.fp32_precision = before


def test_another_default_device(device):
    """Of torch's: what the engine makes for itself on the CPU stays there."""
    problem = Problem(Case("lstm", F32, 2, True, form="ragged", T=4, B=3, I=5, H=9, device=device))
    layer = problem.layer(fastcell)
    expected = problem.run(layer)
    layer.zero_grad()
    inputs, grads = problem.inputs(), problem.gradients_in()
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        inputs["x"], torch.from_numpy(problem.lengths), enforce_sorted=False
    )
    cuda._reports.clear()
    with torch.device("meta"):
        output, (h, c) = layer(packed, (inputs["h0"], inputs["c0"]))
        torch.autograd.backward([h, c], grads[1:], retain_graph=True)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=4)
    padded.backward(grads[0])
    torch.testing.assert_close(layer.weight_hh_l0.grad, expected["gradient of weight_hh_l0"])


def test_lengths_in_second_derivatives(device):
    layer = fastcell.LSTM(2, 3, bidirectional=True, dtype=F64, device=device)
    x = torch.randn(3, 2, 2, dtype=F64, device=device, requires_grad=True)
    lengths = torch.tensor([1, 3], device=device)

    def run(x):
        return torch.ops.fastcell.sequence(
            x,
            [],
            list(layer.parameters()),
            lengths,
            *NO_EXTRAS,
            "lstm",
            1,
            True,
            True,
            False,
            "exact",
        )[0]

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_nothing_to_do(device):
    layer = fastcell.GRU(3, 5, bidirectional=True, device=device)
    x = torch.zeros(4, 0, 3, device=device, requires_grad=True)
    output, h = layer(x)
    assert output.shape == (4, 0, 10)
    assert h.shape == (2, 0, 5)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_pass(place, device):
    layer = fastcell.LSTM(3, 20, device=device)
    x = torch.zeros(5, 18, 3, device=device)
    x[2, 3, 1], x[3, 17, 0] = torch.nan, torch.inf
    with cuda.choose_engine(place), torch.no_grad():
        output, (h, _) = layer(x)
    bad = output.isnan().any(2).cpu()
    assert bad[2:, 3].all()
    assert not bad[:2].any()
    assert not bad[:, [b for b in range(18) if b not in (3, 17)]].any()
    assert torch.equal(output[-1].isnan(), h[0].isnan())


def test_second_derivatives(device):
    layer = fastcell.GRU(2, 3, dtype=F64, device=device)
    x = torch.randn(3, 2, 2, dtype=F64, device=device, requires_grad=True)
    h = torch.randn(1, 2, 3, dtype=F64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h: layer(x, h), (x, h))
    assert torch.autograd.gradgradcheck(lambda x, h: layer(x, h)[0], (x, h))


def test_results_are_the_callers_to_change(device):
    problem = Problem(Case("lstm", F32, 1, T=4, B=3, I=5, H=9, device=device))
    layer = problem.layer(fastcell)
    expected = problem.run(layer)
    layer.zero_grad()
    inputs = problem.inputs()
    values = problem.call(layer, inputs)
    grads = problem.gradients_in()
    for value in values.values():
        value.mul_(2.0)
    torch.autograd.backward(list(values.values()), [g / 2 for g in grads])
    for name, leaf in (inputs | dict(layer.named_parameters())).items():
        torch.testing.assert_close(leaf.grad, expected[f"gradient of {name}"])


def test_waiting_in_vain_is_an_error_and_not_a_hang(device, monkeypatch):
    """With hardly any patience blocks give up: NaN, and the next call says why."""
    if device != "cpu":
        pytest.skip("a GPU's blocks are quick enough to need no patience")
    layer = fastcell.LSTM(3, 40)
    x = torch.randn(6, 20, 3)
    with cuda.choose_engine("grid"), torch.no_grad():
        right = layer(x)[0]
        monkeypatch.setattr(cuda, "_PATIENCE", 1)
        wrong, (h, _) = layer(x)
        assert wrong[-1].isnan().any()
        assert torch.equal(h[0].isnan(), wrong[-1].isnan())
        monkeypatch.undo()
        monkeypatch.setitem(engines.ENGINES, "cpu", cuda)
        monkeypatch.setattr(cuda, "device_code", emulated())
        with pytest.raises(RuntimeError, match="waited for each other in vain"):
            layer(x)
        assert torch.equal(layer(x)[0], right)


def test_what_no_engine_holds_is_refused(device):
    with pytest.raises(ValueError, match="engine must be one of step, grid, cluster"):
        cuda.choose_engine("fast").__enter__()
    layer = fastcell.LSTM(3, 5, dtype=F64, device=device)
    x = torch.zeros(2, 2, 3, dtype=F64, device=device)
    with cuda.choose_engine("grid"), pytest.raises(ValueError, match="no plan for lstm"):
        layer(x)
    if device == "cpu":
        emulated().pretend(capability=75, max_cluster=1)
        with pytest.raises(ValueError, match="need a GPU of compute capability 8.0, got 7.5"):
            layer.to(BF16)(x.to(BF16))
        emulated().pretend(capability=70, max_cluster=1)
        with pytest.raises(ValueError, match="need a GPU of compute capability 7.5, got 7.0"):
            layer.to(F32)(x.to(F32))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("cell", CELLS)
def test_error_at_16_bits_is_at_most_that_of_torch(cell, dtype, device):
    """Against float64, root mean square; torch's layer computes on the same device."""
    case = Case(cell, dtype, T=40, B=16, I=24, H=48, device=device)
    problem = Problem(case)
    truth = problem.truth()
    errors = []
    for library in (fastcell, torch.nn):
        squares: dict[str, list[torch.Tensor]] = {}
        for name, value in problem.run(problem.layer(library)).items():
            if cell == "rnn_relu" and "gradient" in name:
                continue  # one unit on the other side of the kink outweighs all rounding
            kind = "parameters" if is_parameter(name) else name
            difference = value.double().cpu() - truth[name]
            squares.setdefault(kind, []).append(difference.square().flatten())
        errors.append({k: torch.cat(s).mean().sqrt().item() for k, s in squares.items()})
    ours, theirs = errors
    assert {k: ours[k] for k in ours if ours[k] > 1.05 * theirs[k]} == {}, theirs


def test_recompute(device):
    case = Case("lstm", F32, 2, T=400, B=8, I=3, H=6, device=device)
    problem = Problem(case)
    plain, layer = problem.layer(fastcell), problem.layer(fastcell)
    layer.recompute = True
    problem.assert_close(problem.run(layer), problem.run(plain))


def test_many_tiles_are_several_launches():
    emulated().pretend(multiprocessors=132)
    made = plan(B=1_100_000, H=32, T=1)
    assert made.tiles > 65535 >= made.tiles_at_once


def test_explain(device):
    skip_lacking(device, place="cluster")
    layer = fastcell.LSTM(6, 20, bidirectional=True, device=device)
    x = torch.zeros(5, 3, 6, device=device)
    with cuda.choose_engine("cluster"):
        said = fastcell.explain(layer, x)
    assert (said.engine, said.path, said.products) == ("cuda", "kernel", "float32")
    assert "one launch" in said.schedule
    assert "each cluster" in said.schedule
    assert said.schedule in str(said)
    if device == "cpu":
        assert said.isa == "sm_90"
    with cuda.choose_engine("step"), tf32_allowed(True), torch.no_grad():
        said = fastcell.explain(layer, x)
    assert said.products == "tf32"
    assert said.schedule.startswith("one launch per step")


def test_torch_compile_knows_the_shapes(device):
    """The operators' fake kernels, for what is kept above all: aot_eager runs the real ones."""
    problem = Problem(Case("lstm", F32, 2, True, T=4, B=3, I=5, H=9, device=device))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    expected = problem.run(layer)
    torch.compiler.reset()
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    output, (h, c) = compiled(inputs["x"], (inputs["h0"], inputs["c0"]))
    values = {"output": output, "h": h, "c": c}
    torch.autograd.backward(list(values.values()), problem.gradients_in())
    leaves = inputs | dict(layer.named_parameters())
    values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    assert_same_bits({n: v.detach() for n, v in values.items()}, expected)


# --- a GPU's limits -------------------------------------------------------------------------------


def test_what_a_gpu_does_not_have_is_known_by_the_parameters():
    hopper = {"capability": 90, "max_cluster": 16, "cooperative": True}
    turing = {"capability": 75, "max_cluster": 1, "cooperative": True}
    row = {"place": "cluster", "dtype": F32}
    wants = [
        {"place": "cluster"}, {"row": row}, {"dtype": BF16}, {"case": Case(dtype=BF16)},
    ]  # fmt: skip
    assert [lacking(hopper, given) for given in wants] == [None] * 4
    no_clusters = "no thread-block clusters on compute capability 7.5"
    no_bfloat16 = "no kernels for bfloat16 on compute capability 7.5"
    assert [lacking(turing, given) for given in wants] == [no_clusters] * 2 + [no_bfloat16] * 2
    for given in ({}, {"place": "grid", "dtype": F16}, {"row": {"place": None}}, {"dtype": "tf32"}):
        assert lacking(turing, given) is None
    alone = turing | {"cooperative": False}
    assert lacking(alone, {"place": "grid"}) == "no cooperative launches on this GPU"
    assert lacking(turing | {"capability": 70}, {}) == "no kernels for compute capability 7.0"


def test_tests_of_what_a_gpu_lacks_are_skipped(monkeypatch):
    import conftest
    from fastcell import _core

    limits = {"capability": 75, "max_cluster": 1, "cooperative": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(cuda, "architectures", lambda: ["sm_75"])
    monkeypatch.setattr(_core, "cuda_limits", {3: limits, 0: limits | {"max_cluster": 8}}.get)
    item = SimpleNamespace(
        get_closest_marker={"cuda": True}.get,
        callspec=SimpleNamespace(params={"place": "cluster"}),
    )
    with pytest.raises(pytest.skip.Exception, match="no thread-block clusters"):
        conftest.pytest_runtest_setup(item)
    item.callspec.params["place"] = "step"
    conftest.pytest_runtest_setup(item)
    skip_lacking("cuda:0", place="cluster")
    skip_lacking("cpu", place="cluster", dtype=BF16)
    with pytest.raises(pytest.skip.Exception, match="bfloat16"):
        skip_lacking("cuda", dtype=BF16)


# --- plans ----------------------------------------------------------------------------------------


def plan(
    cell="lstm", products="bfloat16", backward=False, T=100, B=8, H=256, P=None, D=1, place=""
):
    return emulated().CudaPlan(
        0, cell, products, backward, T, B, H, P or H, D, P is not None, place
    )


@pytest.fixture
def gpu() -> Iterator[None]:
    """An H100 as far as plans ask."""
    emulated().pretend(multiprocessors=132)
    yield
    emulated().pretend()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_plans_cover_the_work(cell, backward):
    for products in ("float32", "bfloat16"):
        for H in (1, 8, 100, 256, 512, 1000):
            for B in (1, 16, 17, 100, 1000):
                for D in (1, 2):
                    made = plan(cell, products, backward, B=B, H=H, D=D)
                    assert made.unit_blocks * made.units >= H
                    assert made.tiles * made.rows >= B
                    assert made.rows * made.units <= 512
                    assert made.shared <= 227 << 10
                    if made.place == "grid":
                        assert made.unit_blocks * made.tiles_at_once * D <= 132
                    else:
                        assert made.tiles_at_once == made.tiles


@pytest.mark.usefixtures("gpu")
def test_plans_follow_the_size():
    assert plan(T=1).place == "step"
    assert plan(products="float64").place == "step"
    assert plan(H=256, B=8).place == "cluster"
    assert plan(H=1024, B=8).place == "grid"  # 8 MiB of weights: no cluster holds them
    assert plan(H=8192, B=8).place == "step"  # nor does the device


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("products", ["bfloat16", "float16", "tf32", "float32"])
def test_the_capacities_of_the_documentation(products):
    text = (Path(__file__).parent.parent / "docs" / "cuda.md").read_text()
    (row,) = re.findall(rf"^\| {products} \|" + r" (\d+) \|" * 4 + "$", text, re.MULTILINE)
    kinds = [(place, backward) for place in ("grid", "cluster") for backward in (False, True)]
    for most, (place, backward) in zip(map(int, row), kinds, strict=True):
        assert plan(products=products, backward=backward, B=16, H=most, place=place).place == place
        with pytest.raises(ValueError, match="no plan"):
            plan(products=products, backward=backward, B=16, H=most + 8, place=place)
