"""LSTMs with peepholes, coupled gates, or both: against the reference and onnxruntime."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import fastcell
from fastcell import composite
from fastcell.cells import CELLS as SPECS
from fastcell.plan import Config
from support import PEEPHOLES, VARIANTS, Case, Problem, assert_same_bits, pairwise

pytestmark = pytest.mark.usefixtures("poison")

F32, F64 = torch.float32, torch.float64
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
    return (case.form != "unbatched" or case.B == 1) and case.flops <= 2e8


@pytest.mark.parametrize("case", [Case(**row) for row in pairwise(FACTORS, allowed, 0)], ids=str)
def test_grid(case):
    problem = Problem(case)
    problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())


@pytest.mark.parametrize("cell", VARIANTS)
def test_the_reference_by_finite_differences(cell):
    problem = Problem(Case(cell, F64, 1, True, projected=True, T=3, B=2, I=3, H=4))
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


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("cell", VARIANTS)
def test_kernels_by_finite_differences(cell, projected):
    options = {"peephole": "peephole" in cell, "coupled": "coupled" in cell}
    layer = fastcell.LSTM(3, 4, bidirectional=True, proj_size=2 * projected, dtype=F64, **options)
    x = torch.randn(3, 2, 3, dtype=F64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


@pytest.mark.parametrize("cell", VARIANTS)
def test_the_composite_step_is_the_kernels(cell):
    problem = Problem(Case(cell, F64, 2, True, projected=True, T=4, B=3, I=5, H=9))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    config = Config(cell, 2, True, True, False)
    states = [inputs["h0"], inputs["c0"]]
    output, finals = composite.sequence(
        config, inputs["x"], states, list(layer.parameters()), None, None
    )
    problem.assert_close(
        {"output": output, "h": finals[0], "c": finals[1]}, problem.call(layer, inputs)
    )


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
    with pytest.raises(RuntimeError, match=r"weight_peephole of size \[3, 7\], got \[2, 7\]"):
        fastcell.functional.lstm(x, None, [*weights[:-1], weights[-1][:2]], peephole=True)
    with pytest.raises(ValueError, match="cannot be quantized"):
        fastcell.quantize(layer)


def test_coupled_peepholes_have_their_rows():
    assert {name: SPECS[name].parameters for name in VARIANTS} == {"lstm_coupled": 0} | PEEPHOLES


@pytest.mark.parametrize("cell", VARIANTS)
def test_against_onnxruntime(cell):
    """ONNX's order: gates i o f c, peepholes i o f; coupled is input_forget, where f = 1 - i."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    peephole, coupled = "peephole" in cell, "coupled" in cell
    T, B, I, H = 6, 3, 4, 5  # noqa: E741
    layer = fastcell.LSTM(I, H, peephole=peephole, coupled=coupled)
    w = {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters()}

    def gates(t: torch.Tensor) -> np.ndarray:
        if coupled:
            i, g, o = t.chunk(3)
            f = torch.zeros_like(i)
        else:
            i, f, g, o = t.chunk(4)
        return torch.cat((i, o, f, g)).numpy()[None]

    feeds = {
        "X": torch.randn(T, B, I).numpy(),
        "W": gates(w["weight_ih"]),
        "R": gates(w["weight_hh"]),
        "B": np.concatenate((gates(w["bias_ih"]), gates(w["bias_hh"])), 1),
    }
    names = [*feeds, "", "", "", "P"] if peephole else list(feeds)
    if peephole:
        p = w["weight_peephole"]
        rows = (p[0], p[1], torch.zeros(H)) if coupled else (p[0], p[2], p[1])
        feeds["P"] = torch.cat(rows).numpy()[None]
    helper = onnx.helper
    node = helper.make_node(
        "LSTM", names, ["Y"], hidden_size=H, **({"input_forget": 1} if coupled else {})
    )
    given = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape)
        for name, value in feeds.items()
    ]
    result = helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [T, 1, B, H])
    model = helper.make_model(
        helper.make_graph([node], "g", given, [result]),
        opset_imports=[helper.make_opsetid("", 14)], ir_version=8,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (theirs,) = session.run(None, feeds)
    with torch.no_grad():
        ours = layer(torch.from_numpy(feeds["X"]))[0]
    torch.testing.assert_close(ours, torch.from_numpy(theirs[:, 0]), rtol=1e-5, atol=1e-6)
