"""Same bits, always: however many threads, whatever batch, wherever a sequence is cut.

Equality here is of every bit. Gradients of parameters are sums over the whole batch, so they are
compared only where the rows are the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fastcell
from fastcell import _core, packing
from fastcell.cells import options_of
from fastcell.cpu_time import row_offsets
from fastcell.plan import bound_stack
from support import CELLS, VARIANTS, Case, Problem, Values, assert_same_bits, is_parameter, threads

F32, F64 = torch.float32, torch.float64

# One layer wider than every register tile, then a stack; then as many rows as fill several blocks.
SMALL = [
    Case(cell, dtype, layers, T=9, B=5, I=20, H=H, projected=projected)
    for cell, projected in [*((cell, False) for cell in CELLS), ("lstm", True)]
    for dtype, layers, H in [(F32, 1, 67), (F64, 2, 19)]
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def run(problem: Problem) -> Values:
    return problem.run(problem.layer(fastcell))


def per_sample(values: Values) -> Values:
    return {name: value for name, value in values.items() if not is_parameter(name)}


def schedule(case: Case, count: int) -> tuple[int, ...]:
    """How the kernels share a call out: (direction groups, batch groups, threads per group)."""
    stack = _core.Stack(
        case.cell,
        "float64" if case.dtype is F64 else "float32",
        "exact",
        case.I,
        case.H,
        case.proj,
        case.layers,
        case.directions,
        True,
        options_of(case.cell),
    )
    found: tuple[int, ...] = stack.explain(case.T, case.B, case.T * case.B, 0, count, True)
    return found


# Each is shared out in another way: hidden units, batch, directions, layers; with rows left over.
THREADED = [
    case
    for cell, projected in [*((cell, False) for cell in CELLS), ("lstm", True)]
    for case in [
        Case(cell, F32, T=12, B=5, I=35, H=129, projected=projected),
        Case(cell, F32, 3, T=26, B=2, I=35, H=129, projected=projected),
        Case(cell, F32, 2, T=12, B=1, I=7, H=385, projected=projected),
        Case(cell, F32, T=20, B=67, I=35, H=65, projected=projected),
        Case(cell, F64, 2, True, form="ragged", T=12, B=9, I=35, H=99, projected=projected),
        Case(cell, F32, 1, True, T=12, B=50, I=64, H=65, projected=projected),
    ]
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_any_number_of_threads(case):
    problem = Problem(case)
    alone = run(problem)
    for count in (2, 3):
        assert np.prod(schedule(case, count)) == count, "the call is too small to be shared out"
        with threads(count):
            assert_same_bits(run(problem), alone)


def test_every_way_to_share_out_is_tried():
    ways = {tuple(n > 1 for n in schedule(case, count)) for case in THREADED for count in (2, 3, 4)}
    assert {tuple(i == k for i in range(4)) for k in range(4)} <= ways


@pytest.mark.parametrize("batch", [33, 205])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_sample_alone_and_in_any_batch(case, batch):
    """Forward and the gradients of the sample's input and initial states."""
    problem = Problem(case._replace(B=batch, T=5))
    whole = per_sample(run(problem))
    last = batch - 1
    for chosen in ([0], [last], [7, 8], [3, 30, 1, 12, 25], range(1, 14), range(last, -1, -1)):
        part = problem.samples(list(chosen), "padded")
        expected = {name: value[:, list(chosen)] for name, value in whole.items()}
        assert_same_bits(per_sample(run(part)), expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_sample_alone_for_one_step(case):
    """A chunk of one row has a projection of its own kind."""
    problem = Problem(case._replace(T=1))
    whole = per_sample(run(problem))
    expected = {name: value[:, 2:3] for name, value in whole.items()}
    assert_same_bits(per_sample(run(problem.samples([2], "padded"))), expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cut_anywhere_in_time(case):
    """Two calls, the second from the first's final states; gradients flow back through those."""
    case = case._replace(T=23)
    problem = Problem(case)
    layer = problem.layer(fastcell)
    whole = per_sample(run(problem))
    for cut in (1, 2, 11, 22):
        inputs = problem.inputs()
        first = problem.steps(0, cut).call(layer, inputs | {"x": inputs["x"][:cut]})
        states = {f"{name}0": first[name] for name in case.state_names}
        second = problem.steps(cut, case.T).call(layer, states | {"x": inputs["x"][cut:]})
        values = second | {"output": torch.cat([first["output"], second["output"]])}
        torch.autograd.backward(list(values.values()), problem.gradients_in())
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in inputs.items()}
        assert_same_bits(values | gradients, whole)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_step_by_step(case):
    """Streaming: one call per step."""
    problem = Problem(case)
    layer, inputs = problem.layer(fastcell), problem.inputs()
    with torch.no_grad():
        whole = problem.call(layer, inputs)
        outputs, states = [], {name: inputs[name] for name in inputs if name != "x"}
        for t in range(case.T):
            step = problem.call(layer, states | {"x": inputs["x"][t : t + 1]})
            outputs.append(step["output"])
            states = {f"{name}0": step[name] for name in case.state_names}
    final = {name: states[f"{name}0"] for name in case.state_names}
    assert_same_bits({"output": torch.cat(outputs), **final}, whole)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_packed_and_padded(case, bidirectional):
    """Equal lengths packed: parameters' gradients too. Ragged ones: each sample alone."""
    case = case._replace(bidirectional=bidirectional, B=13, T=21)
    padded = Problem(case)
    packed = padded.samples(range(13), "sorted")
    packed.lengths = np.full(13, 21)
    assert_same_bits(run(packed), run(padded))

    packed = Problem(case._replace(form="ragged"))
    whole = per_sample(run(packed))
    for b, length in enumerate(packed.lengths):
        alone = packed.samples([b], "padded")
        expected = {name: value[:, [b]] for name, value in whole.items()}
        for name in ("output", "gradient of x"):
            assert not expected[name][length:].any(), "something beyond a sample's end"
            expected[name] = expected[name][:length]
        assert_same_bits(per_sample(run(alone)), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inference_and_training(case, bidirectional):
    problem = Problem(case._replace(bidirectional=bidirectional, layers=3, T=40, B=33))
    layer, inputs = problem.layer(fastcell), problem.inputs()
    training = problem.call(layer, inputs)
    assert training["output"].requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same_bits(problem.call(layer, inputs), training)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_batch_first_and_not(case, bidirectional):
    case = case._replace(bidirectional=bidirectional)
    time_first = run(Problem(case))
    batch_first = run(Problem(case._replace(batch_first=True)))
    for name in ("output", "gradient of x"):
        batch_first[name] = batch_first[name].transpose(0, 1)
    assert_same_bits(batch_first, time_first)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_unbatched_and_a_batch_of_one(case):
    batched = run(Problem(case._replace(B=1)))
    unbatched = run(Problem(case._replace(B=1, form="unbatched")))
    squeezed = {
        name: value if is_parameter(name) else value.squeeze(1) for name, value in batched.items()
    }
    assert_same_bits(unbatched, squeezed)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_direction_alone_and_beside_the_other(case):
    """The forward direction of a bidirectional layer is the unidirectional layer."""
    case = case._replace(layers=1)
    both = Problem(case._replace(bidirectional=True))
    alone = Problem(case)
    alone.x, alone.weights = both.x, both.weights[: len(both.weights) // 2]
    alone.states = [state[:1] for state in both.states]
    alone.grad_output = both.grad_output[..., : case.output]
    alone.grad_states = [grad[:1] for grad in both.grad_states]
    whole, found = run(both), run(alone)
    found.pop("gradient of x")  # both directions add to it
    expected = {}
    for name, _value in found.items():
        if name == "output":
            expected[name] = whole[name][..., : case.output]
        else:
            expected[name] = whole[name] if is_parameter(name) else whole[name][:1]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_one_call_after_the_other(case):
    """Nothing of a call is left for the next: workspaces and caches hold no state."""
    problem, other = Problem(case), Problem(case._replace(B=2, T=30, seed=1))
    first = run(problem)
    run(other)
    assert_same_bits(run(problem), first)


@pytest.mark.parametrize("features", [1, 8, 9])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("cell", [*CELLS, *VARIANTS])
def test_a_sample_alone_with_few_features(cell, dtype, features):
    """Whose steps add the input's terms themselves, up to 8 features. Sizes: parts of a panel,
    whole ones, and a last one that is padded or has its gates close."""
    for hidden in (3, 8, 16, 20, 40, 48, 50, 70, 97):
        problem = Problem(Case(cell, dtype, T=6, B=3, I=features, H=hidden))
        together = per_sample(run(problem))
        for b in range(3):
            alone = per_sample(run(problem.samples([b], "padded")))
            assert_same_bits(alone, {n: v[:, b : b + 1] for n, v in together.items()})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_inputs_gradient_of_few_rows(bidirectional, dtype, count):
    """Which multiplies the weights as they are, and does not pack them."""
    layer = fastcell.GRU(150, 67, 2, bidirectional=bidirectional).to(dtype)
    x = torch.randn(1, 13, 150, dtype=dtype, requires_grad=True)

    def gradient(x):
        output, h = layer(x)
        (found,) = torch.autograd.grad(output.square().sum() + h.sum(), x)
        return found

    with threads(count):
        whole = gradient(x)
        for batch in (1, 2, 4, 7, 12):
            assert torch.equal(gradient(x[:, :batch]), whole[:, :batch])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_parts_of_a_ragged_batch(kind, bidirectional):
    """Which have nearly as many rows each, where threads had better not wait for each other."""
    layer = getattr(fastcell, kind)(20, 67, bidirectional=bidirectional)
    lengths = torch.tensor([9, 3, 7, 1, 5, 5, 2])
    x = torch.randn(9, 7, 20, requires_grad=True)
    weights = list(layer.parameters())

    def outcome():
        output, state = layer(x, lengths=lengths)
        states = state if isinstance(state, tuple) else (state,)
        total = output.square().sum() + sum(s.square().sum() for s in states)
        return [output, *states, *torch.autograd.grad(total, (x, *weights))]

    expected = outcome()
    config = packing._entries[tuple(map(id, weights))].call[0]
    stack = bound_stack(config, x, weights)
    try:
        for way in ((1, 3, 1, 1), (1, 2, 1, 1), (1, 1, 3, 1), (1 + bidirectional, 1, 1, 1)):
            stack.force_schedule(*way)
            with threads(way[0] * way[1] * way[2]):
                for found, wanted in zip(outcome(), expected, strict=True):
                    assert torch.equal(found, wanted), way
    finally:
        stack.force_schedule(0, 0, 0, 1)


def test_when_a_ragged_batch_is_cut_into_parts():
    stack = _core.Stack("gru", "float32", "exact", 256, 256, 0, 1, 1, True, options_of("gru"), 0)
    offsets = row_offsets(torch.arange(64, 0, -1))
    time = (64, 64, int(offsets[-1]), offsets.data_ptr(), 2)
    assert stack.explain(*time, True) == (1, 1, 2, 1)
    assert stack.explain(*time, True, barriers=False) == (1, 2, 1, 1)
