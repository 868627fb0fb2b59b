"""Networks over trees: against the reference, the layers for sequences, finite differences."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcell
from fastcell import Trees, reference
from fastcell.trees import composite
from fastcell.trees import ops as tree_ops
from support import Values, assert_equal_bits, assert_same_bits, pairwise, threads
from tolerances import accumulation_length, assert_close, finite_difference_tolerance
from tree_problems import CELLS, PARAMETERS, WEIGHTS, Case, Problem

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

F32, F64 = torch.float32, torch.float64
FACTORS = {
    "cell": list(CELLS),
    "arity": [None, 1, 2, 3, 5],
    "dtype": [F32, F64],
    "bias": [True, False],
    "sizes": [(1,), (2,), (40,), (3, 1, 17, 2), (1,) * 7, (200, 150)],
    "shape": ["random", "star", "chain"],
    "I": [0, 1, 6, 35],
    "H": [1, 3, 17, 64, 129],
}


@pytest.mark.parametrize(
    "case", [Case(**row) for row in pairwise(FACTORS, lambda row: True, 0)], ids=str
)
def test_equals_the_reference(case):
    problem = Problem(case)
    problem.assert_close(problem.run(problem.layer()), problem.truth())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        draw(st.sampled_from(CELLS)),
        draw(st.sampled_from([None, 1, 2, 3, 4])),
        draw(st.sampled_from([F32, F64])),
        draw(st.booleans()),
        tuple(draw(st.lists(st.integers(1, 25), min_size=1, max_size=5))),
        draw(st.sampled_from(["random", "star", "chain"])),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 70)),
        draw(st.integers(0, 1000)),
    )


# The fixture outlives an example, which changes nothing for the next.
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.data())
def test_random_trees(case, data):
    """The reference's numbers; and those of one tree alone, with the same bits."""
    problem = Problem(case)
    whole = problem.run(problem.layer())
    problem.assert_close(whole, problem.truth())
    assert_alone(problem, whole, data.draw(st.integers(0, len(case.sizes) - 1)))


def assert_alone(problem: Problem, whole: Values, which: int) -> None:
    """A tree has the same bits alone as in its batch."""
    first = sum(len(tree) for tree in problem.each[:which])
    rows = slice(first, first + len(problem.each[which]))
    part = copy.copy(problem)
    part.each = [problem.each[which]]
    part.trees = Trees(part.each[0])
    part.x = problem.x[rows]
    part.grads = [grad[rows] for grad in problem.grads]
    part.root_grads = [grad[which : which + 1] for grad in problem.root_grads]
    for name, value in part.run(part.layer()).items():
        if not name.startswith(PARAMETERS):
            within = whole[name][which : which + 1] if "roots" in name else whole[name][rows]
            assert_equal_bits(value, within, name)


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_by_finite_differences(cell, arity):
    # Far from relu's kink: no argument changes its sign within a step.
    problem = Problem(Case(cell, arity, F64, sizes=(6, 1), I=3, H=4))
    truth = problem.truth()
    rng = np.random.default_rng(1)

    def loss() -> float:
        values = problem.truth()
        outer = dict(zip(problem.case.states, problem.grads, strict=True))
        outer |= {
            f"{n} of roots": g for n, g in zip(problem.case.states, problem.root_grads, strict=True)
        }
        return float(sum((values[name].numpy() * g).sum() for name, g in outer.items()))

    step = np.finfo(float).eps ** (1 / 3)
    for name, value in (("x", problem.x), *zip(WEIGHTS, problem.weights, strict=True)):
        direction = rng.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        before = value.copy()
        value += step * direction
        above = loss()
        value[...] = before - step * direction
        below = loss()
        value[...] = before
        gradient = truth[f"gradient of {name}"].numpy()
        found = float((gradient * direction).sum())
        size = max(abs(above), float(np.linalg.norm(gradient)))
        allowed = finite_difference_tolerance(F64) * size
        assert abs(found - (above - below) / (2 * step)) <= allowed, name


@pytest.mark.parametrize("arity", [None, 1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_by_finite_differences(cell, arity):
    problem = Problem(Case(cell, arity, F64, sizes=(5, 2, 1), I=2, H=3))
    layer = problem.layer()

    def run(x, *weights):
        parameters = dict(zip(WEIGHTS, weights, strict=True))
        held = copy.copy(layer)
        held._parameters = parameters
        return tuple(problem.call(held, x).values())

    x = problem.tensor(problem.x).requires_grad_()
    weights = [layer.get_parameter(name).detach().requires_grad_() for name in WEIGHTS]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


# --- beside the layers for sequences --------------------------------------------------------------


def chain(nodes: int) -> list[int]:
    """Time runs up: the first step is the leaf."""
    return [*range(1, nodes), -1]


@pytest.mark.parametrize("arity", [None, 1])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_chain_is_a_sequence(cell, dtype, arity):
    problem = Problem(Case(cell, arity, dtype, sizes=(30,), I=6, H=37), [chain(30)])
    layer = problem.layer()
    if cell == "tree_lstm":
        sequence = fastcell.LSTM(6, 37, dtype=dtype)
    else:
        kind = cell.removeprefix("tree_rnn_")
        sequence = fastcell.RNN(6, 37, nonlinearity=kind, dtype=dtype)
    sequence.load_state_dict({f"{name}_l0": value for name, value in layer.state_dict().items()})
    found = problem.run(layer)
    x = problem.tensor(problem.x).requires_grad_()
    output, finals = sequence(x)
    finals = finals if cell == "tree_lstm" else (finals,)
    assert_equal_bits(found["h"], output, "h")
    for name, final in zip(problem.case.states, finals, strict=True):
        assert_equal_bits(found[f"{name} of roots"], final, name)
    # The layer has no gradient that comes to the c of every step.
    problem.grads[1:] = [np.zeros_like(problem.x[:, :1].repeat(37, 1))] * len(problem.grads[1:])
    expected = problem.truth()
    gradients = problem.gradients_in()
    states = len(problem.case.states)
    leaves = [x, *sequence.parameters()]
    for name, value in zip(
        ("x", *WEIGHTS),
        torch.autograd.grad([output, *finals], leaves, [gradients[0], *gradients[states:]]),
        strict=True,
    ):
        expected[f"gradient of {name}"] = value
    problem.assert_close(problem.run(layer), expected)


def test_parameters_are_those_of_the_cells():
    layer = fastcell.TreeLSTM(5, 7)
    cell = torch.nn.LSTMCell(5, 7)
    layer.load_state_dict(cell.state_dict())
    h, c = cell(torch.ones(1, 5))
    (found_h, found_c), roots = layer(torch.ones(1, 5), [-1])
    assert torch.allclose(found_h, h)
    assert torch.allclose(found_c, c)
    assert torch.equal(roots[0], found_h)
    assert torch.equal(roots[1], found_c)
    fastcell.TreeRNN(5, 7).load_state_dict(torch.nn.RNNCell(5, 7).state_dict())
    shapes = {k: tuple(v.shape) for k, v in fastcell.TreeLSTM(5, 7, 3).named_parameters()}
    assert shapes == {
        "weight_ih": (28, 5), "weight_hh": (42, 21), "bias_ih": (28,), "bias_hh": (28,),
    }  # fmt: skip
    shapes = {
        k: tuple(v.shape) for k, v in fastcell.TreeRNN(5, 7, 3, bias=False).named_parameters()
    }
    assert shapes == {"weight_ih": (7, 5), "weight_hh": (7, 21)}
    assert all(p.abs().max() <= 7**-0.5 and p.any() for p in layer.parameters())
    assert repr(fastcell.TreeLSTM(5, 7, 3, bias=False)) == "TreeLSTM(5, 7, arity=3, bias=False)"
    assert repr(fastcell.TreeRNN(5, 7, nonlinearity="relu")) == "TreeRNN(5, 7, nonlinearity=relu)"


# --- one bit pattern ------------------------------------------------------------------------------


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("cell", ["tree_lstm", "tree_rnn_tanh"])
@pytest.mark.parametrize(
    ("sizes", "shape"), [((700, 700, 700), "star"), ((60,) * 20, "random"), ((90,), "chain")]
)
def test_same_bits_for_any_number_of_threads(cell, arity, sizes, shape):
    problem = Problem(Case(cell, arity, sizes=sizes, shape=shape, I=50, H=130))
    with threads(1):
        alone = problem.run(problem.layer())
    for count in (2, 3):
        with threads(count):
            assert_same_bits(problem.run(problem.layer()), alone)


@pytest.mark.parametrize("arity", [None, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_alone_and_in_a_batch(cell, arity):
    problem = Problem(Case(cell, arity, sizes=(120, 1, 35, 2, 80), I=9, H=70))
    whole = problem.run(problem.layer())
    for which in range(len(problem.each)):
        assert_alone(problem, whole, which)


@pytest.mark.parametrize("arity", [None, 2])
def test_nan_stays_in_its_tree(arity):
    problem = Problem(Case(arity=arity, sizes=(9, 30, 9), H=33))
    clean = problem.run(problem.layer())
    problem.x[:9] = np.nan
    found = problem.run(problem.layer())
    assert found["h"][:9].isnan().all()
    for name in ("h", "c", "gradient of x"):
        assert_equal_bits(found[name][9:], clean[name][9:], name)


# --- the order of nodes and children --------------------------------------------------------------


@pytest.mark.parametrize("arity", [None, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_nodes_may_be_numbered_anyhow(cell, arity):
    """With the children's positions given, the numbers of the nodes mean nothing."""
    problem = Problem(Case(cell, arity, sizes=(25,), H=20))
    layer, x = problem.layer(), problem.tensor(problem.x)
    found = problem.call(layer, x)
    old_of_new = torch.from_numpy(np.random.default_rng(1).permutation(25))
    new_of_old = torch.argsort(old_of_new)
    parents = problem.trees.parents[old_of_new]
    parents = torch.where(parents < 0, parents, new_of_old[parents])
    trees = Trees(parents, positions=problem.trees.positions[old_of_new])
    renamed = problem.call(layer, x[old_of_new], trees)
    for name in problem.case.states:
        assert_equal_bits(renamed[name], found[name][old_of_new], name)
        assert_equal_bits(renamed[f"{name} of roots"], found[f"{name} of roots"])


def test_positions_may_be_empty():
    layer = fastcell.TreeLSTM(3, 4, arity=3, dtype=F64)
    x = torch.randn(2, 3, dtype=F64)
    results = []
    for position in range(3):
        trees = Trees([-1, 0], positions=[0, position])
        (h, c), _ = layer(x, trees)
        weights = [w.detach().numpy() for w in (getattr(layer, name) for name in WEIGHTS)]
        states, _ = reference.tree.forward(
            "tree_lstm", x.numpy(), [-1, 0], weights, 3, [0, position]
        )
        assert_close(h, states[0], dtype=F64, steps=2, length=20)
        assert_close(c, states[1], dtype=F64, steps=2, length=20)
        results.append(h[0])
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def test_children_are_summed_in_any_order():
    layer = fastcell.TreeLSTM(3, 4, dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    first = layer(x, Trees([-1, 0, 0, 0]))[1][0]
    other = layer(x[[0, 2, 3, 1]], Trees([-1, 0, 0, 0]))[1][0]
    assert_close(first, other, dtype=F64, steps=2, length=20)


# --- sizes at the edge ----------------------------------------------------------------------------


@pytest.mark.parametrize("arity", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_no_tree_at_all(cell, arity):
    problem = Problem(Case(cell, arity, sizes=()), [])
    assert (len(problem.trees), problem.trees.nodes, problem.trees.levels) == (0, 0, 0)
    for name, value in problem.run(problem.layer()).items():
        if name.startswith(PARAMETERS):
            assert not value.any(), name
        else:
            assert value.shape[0] == 0, name


@pytest.mark.parametrize("arity", [None, 1])
@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_levels(cell, arity):
    nodes = 10_000
    problem = Problem(Case(cell, arity, sizes=(nodes,), I=2, H=5), [chain(nodes)])
    assert problem.trees.levels == nodes
    found = problem.run(problem.layer())
    assert all([value.isfinite().all() for value in found.values()])
    if cell != "tree_lstm" or arity:
        return
    # Also in torch operations, which must not recurse either.
    x = problem.tensor(problem.x).requires_grad_()
    layer = problem.layer()
    states = composite.run(layer.config, problem.trees.forest.schedule, x, layer._weights())
    (grad,) = torch.autograd.grad(states[0].sum(), x)
    assert grad.isfinite().all()
    assert_close(states[0], found["h"], dtype=F32, steps=nodes, length=7)


def test_a_star_of_a_thousand_leaves():
    each = [[1000, *[1000] * 999, -1]]
    problem = Problem(Case(sizes=(1001,), H=20), each)
    problem.assert_close(problem.run(problem.layer()), problem.truth())


def test_only_what_is_asked_for():
    problem = Problem(Case(arity=2, dtype=F64, sizes=(9, 4)))
    layer = problem.layer()
    everything = problem.run(layer)
    for names in (["weight_ih"], ["weight_hh"], ["bias_hh"], ["bias_ih", "weight_hh"]):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in names)
        found = problem.call(layer, problem.tensor(problem.x))
        grads = torch.autograd.grad(
            list(found.values()),
            [layer.get_parameter(name) for name in names],
            problem.gradients_in(),
        )
        for name, grad in zip(names, grads, strict=True):
            assert_equal_bits(grad, everything[f"gradient of {name}"], name)
    # And from some of the results alone.
    layer.requires_grad_(True)
    for chosen in ("h", "c", "h of roots"):
        one = problem.call(layer, problem.tensor(problem.x))[chosen]
        ones = [torch.ones_like(one)]
        other = torch.autograd.grad([one], list(layer.parameters()), ones)
        schedule = problem.trees.forest.schedule
        states = composite.run(layer.config, schedule, problem.tensor(problem.x), layer._weights())
        same = states[chosen.startswith("c")]
        same = same[problem.trees.roots] if "roots" in chosen else same
        truth = torch.autograd.grad([same], list(layer.parameters()), ones)
        for mine, theirs in zip(other, truth, strict=True):
            assert_close(mine, theirs, dtype=F64, steps=problem.trees.levels, length=40, unit=10.0)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_sixteen_bits_are_computed_in_float32(cell, dtype):
    problem = Problem(Case(cell, 2, dtype, sizes=(20, 9), H=40))
    found = problem.run(problem.layer())
    wide = copy.copy(problem)
    wide.case = problem.case._replace(dtype=F32)
    for name, value in wide.run(wide.layer()).items():
        assert found[name].dtype is dtype
        if "roots" in name or "gradient" not in name:
            assert torch.equal(found[name], value.to(dtype)), name
        else:  # the roots' gradients were added to the others in 16 bits
            length = accumulation_length(problem.case.I, 80, gates=5, batch=29)
            size = max(1.0, value.square().mean().sqrt().item())
            steps = problem.trees.levels
            assert_close(
                found[name], value, dtype=dtype, steps=steps, length=length, unit=size, name=name
            )


def test_autocast():
    problem = Problem(Case(sizes=(12, 3)))
    layer, x = problem.layer(), problem.tensor(problem.x)
    expected = problem.call(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.call(layer, x)
        again = problem.call(layer, x.bfloat16())
    assert_same_bits(found, expected)
    assert_same_bits(again, expected)
    found["h"].sum().backward()
    assert layer.weight_hh.grad.dtype is F32


# --- other paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arity", [None, 1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_operations_give_the_same(cell, arity):
    problem = Problem(Case(cell, arity, F64, sizes=(17, 1, 6)))
    layer, x = problem.layer(), problem.tensor(problem.x)
    states = composite.run(layer.config, problem.trees.forest.schedule, x, layer._weights())
    found = dict(zip(problem.case.states, states, strict=True))
    truth = problem.truth()
    for name, value in found.items():
        assert_close(
            value, truth[name], dtype=F64, steps=problem.trees.levels, length=60, name=name
        )


def test_devices_without_kernels_warn_once(monkeypatch):
    """Torch operations, and one warning that says so."""
    monkeypatch.setattr(fastcell.ops, "_warned", set())
    problem = Problem(Case(arity=2, dtype=F64))
    expected = problem.run(problem.layer())
    missing = tree_ops.no_kernels_for(torch.device("xpu"))
    assert "xpu" in missing
    monkeypatch.setattr(tree_ops, "no_kernels_for", lambda device: missing)
    with pytest.warns(UserWarning, match="no kernels for .*xpu.* plain torch operations"):
        found = problem.run(problem.layer())
    problem.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.run(problem.layer())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("arity", [None, 2])
def test_the_operators(cell, arity):
    problem = Problem(Case(cell, arity, F64, sizes=(6, 2)))
    layer, trees = problem.layer(), problem.trees
    x = problem.tensor(problem.x).requires_grad_()
    weights = [w.detach().requires_grad_() for w in layer._weights()]
    operands = (weights, trees.parents, trees.positions)
    torch.library.opcheck(torch.ops.fastcell.tree.default, (x, *operands, *layer.config))
    plain = (x.detach(), [w.detach() for w in weights], *operands[1:])
    for keep in (False, True):
        arguments = (*plain, *layer.config, keep)
        torch.library.opcheck(torch.ops.fastcell.tree_forward.default, arguments)
    states, kept = torch.ops.fastcell.tree_forward(*plain, *layer.config, True)
    grads = [torch.randn_like(states[0]), *[None] * (len(states) - 1)]
    for needs in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(
            torch.ops.fastcell.tree_backward.default,
            (grads, *plain, states, kept, *layer.config, needs),
        )


def test_operators_refuse_what_the_kernels_must_not_see():
    problem = Problem(Case(arity=2, dtype=F64, sizes=(3,)))
    layer, trees = problem.layer(), problem.trees
    x, weights = problem.tensor(problem.x), [w.detach() for w in layer._weights()]
    good = (x, weights, trees.parents, trees.positions, *layer.config)
    for position, wrong, message in (
        (0, x.float(), "one floating dtype"),
        (0, x[:2], "input has 2 rows, expected 3"),
        (1, [weights[0], weights[1][:, :3], *weights[2:]], r"weight_hh of size \[35, 14\]"),
        (2, torch.tensor([-1, 7, 0]), "parents must be -1 to 2"),
        (2, torch.tensor([1, 0, -1]), "cycle"),
        (2, trees.parents.int(), "parents must be int64"),
        (3, torch.tensor([0, 2, 2]), "arity 2|same position"),
        (3, trees.positions[:2], "positions must be int64"),
        (4, "tree_gru", "cell must be one of"),
    ):
        bad = (*good[:position], wrong, *good[position + 1 :])
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.fastcell.tree_forward(*bad, True)
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.fastcell.tree(*bad)
    states, kept = torch.ops.fastcell.tree_forward(*good, True)
    with pytest.raises(RuntimeError, match="what the forward call kept"):
        torch.ops.fastcell.tree_backward(
            [None, None], *good[:4], states, kept[:-1], *layer.config, [True] * 5
        )


@pytest.mark.parametrize("arity", [None, 2])
def test_compiles_without_a_break(arity):
    problem = Problem(Case(arity=arity, sizes=(9, 4)))
    layer = problem.layer()
    expected = problem.run(layer)
    assert_same_bits(
        problem.run(torch.compile(layer, fullgraph=True, backend="aot_eager")), expected
    )


def test_transforms_of_torch_func():
    problem = Problem(Case(arity=2, dtype=F64, sizes=(5, 3)))
    layer, x = problem.layer(), problem.tensor(problem.x)

    def h(x):
        return problem.call(layer, x)["h"]

    many = torch.stack([x, 2 * x, -x])
    assert_close(
        torch.func.vmap(h)(many), torch.stack([h(m) for m in many]), dtype=F64, steps=5, length=30
    )
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(h, (x,), (direction,))
    rows = torch.func.jacrev(h)(x)
    expected = (rows * direction).sum((-2, -1))
    assert_close(tangent, expected, dtype=F64, steps=5, length=30)
    leaf = x.clone().requires_grad_()
    some = torch.randn(3, *h(x).shape, dtype=F64)
    (together,) = torch.autograd.grad(h(leaf), leaf, some, is_grads_batched=True)
    each = [torch.autograd.grad(h(leaf), leaf, one)[0] for one in some]
    assert_close(together, torch.stack(each), dtype=F64, steps=5, length=30)
    loss = torch.func.grad(lambda x: h(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(h(leaf).square().sum(), leaf)
    assert_close(loss, truth, dtype=F64, steps=5, length=30)


def test_explain_says_what_will_run(monkeypatch):
    layer = fastcell.TreeLSTM(3, 4, arity=2)
    found = fastcell.explain(layer, torch.zeros(2, 3))
    assert (found.engine, found.path, found.gradients) == ("cpu", "kernel", True)
    assert "TreeLSTM(3, 4, arity=2)" in str(found)
    assert "packed by every call" in str(found)
    assert fastcell.explain(layer, torch.zeros(2, 3, device="meta")).path == "operator"
    assert fastcell.explain(layer.bfloat16()).arithmetic is F32
    monkeypatch.setattr(tree_ops, "no_kernels_for", lambda device: "trees here")
    found = fastcell.explain(layer)
    assert (found.engine, found.path) == ("torch", "composite")
    assert found.reason == "no kernels for trees here"


def test_copies():
    problem = Problem(Case(arity=2))
    layer, x = problem.layer(), problem.tensor(problem.x)
    expected = problem.call(layer, x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(problem.call(twin, x), expected)
    for twin in (copy.deepcopy(problem.trees), pickle.loads(pickle.dumps(problem.trees))):
        assert_same_bits(problem.call(layer, x, twin), expected)
    result = fastcell.functional.tree_lstm(x, problem.trees, layer._weights(), arity=2)
    assert torch.equal(result[0][0], expected["h"])
    strided = torch.empty(4, 14).T.copy_(x)
    assert_same_bits(problem.call(layer, strided), expected)


def test_the_page_is_right():
    import doctest

    from fastcell.trees import forest
    from test_readme import ROOT, blocks, run

    for module, examples in ((forest, 2), (reference.tree, 5)):
        assert doctest.testmod(module) == doctest.TestResults(0, examples)

    (source,) = blocks(ROOT / "docs" / "trees.md", "python")
    assert isinstance(run([source])["trees"], Trees)


# --- trees that are none --------------------------------------------------------------------------


def test_what_trees_know():
    trees = Trees(torch.tensor([2, 2, -1, 2, -1, 0, 1]), sizes=[4, 3])
    assert repr(trees) == "Trees(trees=2, nodes=7, levels=3)"
    assert trees.sizes.tolist() == [4, 3]
    assert trees.parents.tolist() == [2, 2, -1, 2, -1, 4, 5]
    assert trees.roots.tolist() == [2, 4]
    assert trees.positions.tolist() == [0, 1, 0, 2, 0, 0, 0]
    schedule = trees.forest.schedule
    assert schedule.order.tolist() == [0, 1, 3, 6, 2, 5, 4]
    assert schedule.level_offsets.tolist() == [0, 4, 6, 7]
    parents = torch.tensor([-1, 0])
    trees = Trees(parents)
    parents.zero_()
    assert trees.parents.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, -1.0],), TypeError, "parents must be int64, got torch.float32"),
        ((np.array([1, -1], np.int32),), TypeError, "parents must be int64, got torch.int32"),
        (([[1, -1]],), ValueError, r"parents must have one dimension, got shape \(1, 2\)"),
        ((torch.tensor(-1),), ValueError, r"parents must have one dimension, got shape \(\)"),
        (([-1], [1.0]), TypeError, "sizes must be int64"),
        (([-1, 0], [1]), ValueError, "sizes add up to 1 nodes, expected 2"),
        (([-1, -1], [1, 2]), ValueError, "sizes add up to 3 nodes, expected 2"),
        (([-1, -1], [1, 0, 1]), ValueError, "tree 1 has 0 nodes, expected at least one"),
        (([-1], [2, -1]), ValueError, "tree 1 has -1 nodes"),
        (([],), ValueError, "tree 0 has 0 nodes"),
        (([-1, 0, 2], [2, 1]), ValueError, "tree 1: node 0 has parent 2, expected -1 .* 0 to 0"),
        (([-1, -2],), ValueError, "tree 0: node 1 has parent -2, expected -1 .* 0 to 1"),
        (([-1, 0, -1, -1], [2, 2]), ValueError, r"tree 1 has 2 roots \(parent -1 at nodes 0, 1\)"),
        (([1, 0],), ValueError, r"tree 0 has 0 roots \(parent -1 at no node\), expected one"),
        (([-1, -1, 2, 1], [1, 3]), ValueError, "tree 1: nodes .* are a cycle, .* lead up to the"),
        (([-1, 1],), ValueError, "tree 0: nodes 1 are a cycle"),
        (([-1, 2, 3, 2],), ValueError, "tree 0: nodes (2, 3|3, 2) are a cycle"),
    ],
)
def test_what_is_no_tree_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Trees(*arguments)
    if len(arguments) == 1:
        with pytest.raises(error, match=message):
            fastcell.TreeLSTM(2, 3)(torch.zeros(2, 2), arguments[0])


def test_wrong_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions must have shape \(2,\), .* got \(1,\)"):
        Trees([-1, 0], positions=[0])
    with pytest.raises(TypeError, match="positions must be int64"):
        Trees([-1, 0], positions=[0.0, 1.0])
    with pytest.raises(ValueError, match="tree 1: node 1 is at position -3, expected 0 or more"):
        Trees([-1, -1, 0], [1, 2], positions=[-1, -1, -3])
    message = "tree 1: node 0 has two children at position 4, one of them node 2"
    with pytest.raises(ValueError, match=message):
        Trees([-1, -1, 0, 0], [1, 3], positions=[0, 0, 4, 4])
    layer = fastcell.TreeLSTM(2, 3, arity=2)
    message = "tree 1: node 0 has 3 children, expected at most 2, the arity"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(5, 2), Trees([-1, -1, 0, 0, 0], [1, 4]))
    message = "tree 1: node 1 is at position 2, expected 0 to 1 with arity 2"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(3, 2), Trees([-1, -1, 0], [1, 2], positions=[0, 0, 2]))


def test_wrong_operands_are_refused():
    layer, trees = fastcell.TreeLSTM(2, 3), Trees([-1, 0])
    for x, error, message in (
        (torch.zeros(2, 2, 1), ValueError, r"2D, \(nodes, features\), got 3D"),
        (torch.zeros(3, 2), RuntimeError, "input has 3 rows, expected 2"),
        (torch.zeros(2, 5), RuntimeError, "input_size: got 5, expected 2"),
        (torch.zeros(2, 2).double(), RuntimeError, "one floating dtype, got torch.float64"),
        (torch.zeros(2, 2).long(), RuntimeError, "one floating dtype, got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            layer(x, trees)
    weights = list(layer._weights())
    with pytest.raises(ValueError, match="takes 2 weights, weight_ih, weight_hh, got 3"):
        fastcell.functional.tree_lstm(torch.zeros(2, 2), trees, weights[:3])
    with pytest.raises(RuntimeError, match=r"weight_hh of size \[15, 6\], got \[12, 3\]"):
        fastcell.functional.tree_lstm(torch.zeros(2, 2), trees, weights, arity=2)
    for arity in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="arity must be None or a positive integer"):
            fastcell.TreeLSTM(2, 3, arity)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        fastcell.TreeRNN(2, 3, nonlinearity="gelu")
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        fastcell.TreeRNN(2, 0)
    with pytest.raises(ValueError, match="cell must be one of"):
        reference.tree.forward("tree_gru", np.zeros((1, 1)), [-1], [])
