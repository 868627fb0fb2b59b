"""The CUDA kernels for trees: on a GPU where there is one, and emulated in any case.

As in test_cuda.py: emulated, tensors are on the CPU, and memory that nothing wrote is NaN.
"""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch

import fastcell
from emulation_build import emulated
from fastcell import Trees
from fastcell.trees import composite, cuda
from fastcell.trees import ops as tree_ops
from support import assert_same_bits, pairwise
from tree_problems import CELLS, PARAMETERS, WEIGHTS, Case, Problem

pytestmark = pytest.mark.usefixtures("poison")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _engine(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setitem(tree_ops.ENGINES, "cpu", cuda)


FACTORS = {
    "cell": list(CELLS),
    "arity": [None, 1, 2, 3, 5],
    "dtype": [F32, F64],
    "bias": [True, False],
    "sizes": [(1,), (2,), (40,), (3, 1, 17, 2), (1,) * 7, (110, 60)],
    "shape": ["random", "star", "chain"],
    "I": [0, 1, 6, 35],
    "H": [1, 3, 16, 17, 70],
}


def quick(row: dict) -> bool:
    """Each level is a few launches, whose threads are made one by one where it is emulated."""
    return row["shape"] != "chain" or max(row["sizes"]) <= 40


@pytest.mark.parametrize("case", [Case(**row) for row in pairwise(FACTORS, quick, 0)], ids=str)
def test_equals_the_reference(case, device):
    problem = Problem(case._replace(device=device))
    problem.assert_close(problem.run(problem.layer()), problem.truth())


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("cell", CELLS)
def test_as_plain_torch(cell, dtype, arity, device):
    problem = Problem(Case(cell, arity, dtype, sizes=(23, 1, 40), H=37, device=device))
    layer, x = problem.layer(), problem.tensor(problem.x)
    with torch.no_grad():
        found = problem.call(layer, x)
        schedule = problem.trees.forest.schedule
        states = composite.run(layer.config, schedule, x, layer._weights())
    expected = dict(zip(problem.case.states, states, strict=True))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is F32 else {"rtol": 1e-12, "atol": 1e-12}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **close)


@pytest.mark.parametrize("cell", CELLS)
def test_a_wide_node(cell, device):
    """More children than a product's tile has rows, at one node."""
    problem = Problem(Case(cell, I=3, H=20, device=device), [[-1, *[0] * 100], [1, -1]])
    problem.assert_close(problem.run(problem.layer()), problem.truth())


@pytest.mark.parametrize("cell", CELLS)
def test_positions_without_a_child(cell, device):
    """Weights of positions where no node has a child get no gradient, and no NaN."""
    problem = Problem(Case(cell, 3, F64, I=3, H=5, device=device), [[-1, 0, 0, 1]])
    layer = problem.layer()
    x = problem.tensor(problem.x).requires_grad_()
    trees = Trees(problem.each[0], positions=[0, 2, 0, 2])
    states = problem.call(layer, x, trees)
    sum(s.square().sum() for s in states.values()).backward()
    grad = layer.weight_hh.grad
    assert grad.isfinite().all()
    assert not grad[:, 5:10].any()
    assert grad[:, :5].any()
    assert grad[:, 10:].any()
    with torch.no_grad():
        schedule = trees.forest.schedule
        expected = composite.run(layer.config, schedule, x, layer._weights())
    for name, value in zip(problem.case.states, expected, strict=True):
        torch.testing.assert_close(states[name], value)


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_every_time_and_alone(cell, arity, device):
    """Kernels depend on no other tree; the products of whole forests may on a GPU."""
    case = Case(cell, arity, sizes=(40, 9, 70), H=21, device=device)
    problem = Problem(case)
    first = problem.run(problem.layer())
    assert_same_bits(problem.run(problem.layer()), first)
    if device == "cuda":
        return
    with torch.no_grad():
        alone = problem.layer()(problem.tensor(problem.x[40:49]), Trees(problem.each[1]))[0]
    alone = alone if cell == "tree_lstm" else (alone,)
    for name, value in zip(case.states, alone, strict=True):
        # (Input terms are torch's product, which may round otherwise for other rows.)
        torch.testing.assert_close(value, first[name][40:49], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", ["x", *WEIGHTS])
def test_any_part_of_the_gradients_has_the_bits_of_all(needed, device):
    problem = Problem(Case(sizes=(9, 4), device=device))
    layer = problem.layer()
    whole = problem.run(layer)
    x = problem.tensor(problem.x).requires_grad_(needed == "x")
    for name in WEIGHTS:
        layer.get_parameter(name).requires_grad_(name == needed)
    found = problem.call(layer, x)
    torch.autograd.backward(list(found.values()), problem.gradients_in())
    grad = x.grad if needed == "x" else layer.get_parameter(needed).grad
    assert_same_bits({"": grad}, {"": whole[f"gradient of {needed}"]})


@pytest.mark.parametrize("state", ["h", "c"])
def test_a_gradient_of_one_state_alone(state, device):
    problem = Problem(Case(arity=2, dtype=F64, sizes=(9, 4), device=device))
    problem.root_grads = [0 * grad for grad in problem.root_grads]
    problem.grads["hc".index(state) ^ 1] *= 0
    expected = problem.truth()
    layer, x = problem.layer(), problem.tensor(problem.x).requires_grad_()
    given = problem.tensor(problem.grads["hc".index(state)])
    problem.call(layer, x)[state].backward(given)
    torch.testing.assert_close(x.grad.cpu(), expected["gradient of x"])
    for name in WEIGHTS:
        wanted = expected[f"gradient of {name}"]
        torch.testing.assert_close(layer.get_parameter(name).grad.cpu(), wanted)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("cell", CELLS)
def test_16_bits_are_computed_in_float32(cell, dtype, device):
    problem = Problem(Case(cell, 2, dtype, sizes=(20, 9), device=device))
    wide = problem.layer().float()
    with torch.no_grad():
        found = problem.call(problem.layer(), problem.tensor(problem.x))
        expected = problem.call(wide, problem.tensor(problem.x).float())
    for name, value in found.items():
        assert value.dtype is dtype
        assert torch.equal(value, expected[name].to(dtype)), name


def test_a_deep_chain_has_gradients(device):
    problem = Problem(Case(dtype=F64, sizes=(150,), shape="chain", H=3, device=device))
    problem.assert_close(problem.run(problem.layer()), problem.truth())


@pytest.mark.parametrize("arity", [None, 2])
def test_second_derivatives(arity, device):
    problem = Problem(Case("tree_lstm", arity, F64, sizes=(4, 1), I=2, H=2, device=device))
    layer = problem.layer()
    x = problem.tensor(problem.x).requires_grad_()
    run = lambda x: tuple(problem.call(layer, x).values())  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_the_operators(cell, arity, device):
    problem = Problem(Case(cell, arity, F64, sizes=(6, 2), device=device))
    layer, trees = problem.layer(), problem.trees
    x, weights = problem.tensor(problem.x), [w.detach() for w in layer._weights()]
    operands = (weights, trees.parents, trees.positions)
    for keep in (False, True):
        arguments = (x, *operands, *layer.config, keep)
        torch.library.opcheck(torch.ops.fastcell.tree_forward.default, arguments)
    states, kept = torch.ops.fastcell.tree_forward(x, *operands, *layer.config, True)
    grads = [torch.randn_like(states[0]), *[None] * (len(states) - 1)]
    torch.library.opcheck(
        torch.ops.fastcell.tree_backward.default,
        (grads, x, *operands, states, kept, *layer.config, [True] * 5),
    )


def test_torch_compile(device):
    problem = Problem(Case(arity=2, sizes=(6, 2), device=device))
    layer = problem.layer()
    expected = problem.run(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = problem.tensor(problem.x).requires_grad_()
    found = problem.call(compiled, x)
    torch.autograd.backward(list(found.values()), problem.gradients_in())
    values = {name: value.detach() for name, value in found.items()}
    values |= {f"gradient of {n}": layer.get_parameter(n).grad for n in WEIGHTS}
    values["gradient of x"] = x.grad
    assert_same_bits(values, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(cell, device):
    problem = Problem(Case(cell, sizes=(), device=device), [])
    for name, value in problem.run(problem.layer()).items():
        if name.startswith(PARAMETERS):
            assert not value.any()
        else:
            assert value.numel() == 0


def test_prepared_trees_serve_again_and_in_other_processes(device):
    """What was made for a device is made once, and stays behind."""
    problem = Problem(Case(device=device))
    layer, x = problem.layer(), problem.tensor(problem.x)
    with torch.inference_mode():
        first = layer(x, problem.trees)[0][0]
    placed = dict(problem.trees.forest._placed)
    assert {what for what, *_ in placed} == ({"levels"} if device == "cpu" else {"levels", "roots"})
    assert torch.equal(problem.call(layer, x)["h"], first)
    found = problem.trees.forest._placed
    assert [id(kept) for kept in found.values()] == [id(kept) for kept in placed.values()]
    again = pickle.loads(pickle.dumps(problem.trees))
    assert again.forest._placed == {}
    assert torch.equal(problem.call(layer, x, again)["h"], first)


def test_no_warning_and_what_explain_says(device):
    problem = Problem(Case(device=device))
    layer = problem.layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.run(layer)
    said = fastcell.explain(layer, problem.tensor(problem.x))
    assert (said.engine, said.path, said.products) == ("cuda", "kernel", "float32")
    assert said.isa is not None
    assert said.isa.startswith("sm_")
    assert said.schedule == "a few launches per level"
    assert said.schedule in str(said)


def test_nan_stays_in_its_tree(device):
    problem = Problem(Case(sizes=(40, 33), device=device))
    x = problem.tensor(problem.x)
    x[0] = torch.nan
    with torch.no_grad():
        h = problem.call(problem.layer(), x)["h"]
    up = 0
    while up >= 0:
        assert h[up].isnan().all()
        up = int(problem.trees.parents[up])
    assert h[40:].isfinite().all()
    ancestors = int(h.isnan().all(1).sum())
    assert 0 < ancestors < 40
    assert int(h.isnan().any(1).sum()) == ancestors


@pytest.mark.parametrize("arity", [None, 2])
def test_graph_capture_of_a_training_step(arity, device):
    """With trees that were there before; on a stream of its own, without waiting for the device."""
    if device == "cpu":
        pytest.skip("graphs are a GPU's")
    problem = Problem(Case(arity=arity, sizes=(40, 9), H=33, device=device))
    layer, x = problem.layer(), problem.tensor(problem.x).requires_grad_()

    def step():
        states = problem.call(layer, x)
        leaves = [x, *layer.parameters()]
        return torch.autograd.grad(list(states.values()), leaves, gradients)

    gradients = problem.gradients_in()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
        with torch.cuda.graph(graph, stream=side):
            captured = step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_there_are_no_kernels_for_is_refused(device):
    if device != "cpu":
        pytest.skip("the engine's own checks are those of the emulated one")
    offsets = np.zeros(1, np.int64)
    for cell, real, text in (
        ("lstm", "float32", "no CUDA kernels for cell lstm"),
        ("tree_lstm", "float16", "no CUDA kernels for trees in float16"),
    ):
        with pytest.raises(ValueError, match=text):
            emulated().cuda_tree(
                0, cell, real, False, False, 0, offsets.ctypes.data, offsets.ctypes.data,
                1, 1, True, (0,) * 4, (0,) * 22, 0, 0, 0,
            )  # fmt: skip
