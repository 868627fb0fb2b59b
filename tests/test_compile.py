"""torch.compile and torch.export: one graph, the same numbers, any batch and number of steps."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fastcell
from against_torch import CELLS, LAYERS, same_values, states, tensors

# torch's own, of what it calls inside of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

EVERY = [*LAYERS, *CELLS]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Model(torch.nn.Module):
    """A layer with something before and behind it that torch compiles itself."""

    def __init__(self, name, **kwargs):
        super().__init__()
        self.before = torch.nn.Linear(3, 3)
        self.layer = getattr(fastcell, name)(3, 4, **kwargs)

    def forward(self, x, hx=None):
        return tuple(t * 2 for t in tensors(self.layer(self.before(x), hx)))


def model_and_shapes(name, **kwargs):
    if name.endswith("Cell"):
        return Model(name), [(2, 3), (5, 3), (7, 3)]
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True} | kwargs
    return Model(name, **kwargs), [(2, 4, 3), (2, 6, 3), (5, 9, 3)]


def gradients(call, model, *inputs):
    outputs = call(*inputs)
    value = sum((i + 1) * t.square().sum() for i, t in enumerate(outputs))
    return outputs, torch.autograd.grad(value, [*inputs, *model.parameters()])


def compiled(f, **kwargs):
    return torch.compile(f, **{"fullgraph": True, "backend": "aot_eager"} | kwargs)


def test_packing_inside_breaks_the_graph_without_a_warning():
    """torch breaks it at pack_padded_sequence; what runs behind the operators is not traced."""
    layer = fastcell.GRU(3, 4)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 4, 2])

    def run(x, lengths):
        return layer(pack_padded_sequence(x, lengths))[0].data.relu()

    compiled = torch.compile(run, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(compiled(x, lengths), run(x, lengths))
    assert not [w for w in caught if "Dynamo" in str(w.message)]


@pytest.mark.parametrize("name", EVERY)
def test_compiled_equals_eager_for_every_shape(name):
    model, shapes = model_and_shapes(name)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(model, backend=counter)
    for shape in shapes:
        x = torch.randn(shape, requires_grad=True)
        same_values(gradients(call, model, x), gradients(model, model, x))
    # One for the first shape, at most one for each dimension that then turns out to vary.
    assert counter.frame_count <= len(shapes)
    with torch.no_grad():
        x = torch.randn(shapes[0])
        same_values(call(x), model(x))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_dynamic_shapes_are_compiled_once(name):
    model, shapes = model_and_shapes(name)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(model, backend=counter, dynamic=True)
    counts = []
    for shape in shapes:
        # Sizes of batch and steps that are those of nothing else.
        x = torch.randn(*[n + 10 for n in shape[:-1]], shape[-1], requires_grad=True)
        same_values(gradients(call, model, x), gradients(model, model, x))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_initial_states(name):
    model, shapes = model_and_shapes(name)
    call = compiled(lambda x, *hx: model(x, hx if len(hx) == 2 else hx[0]))
    batch = shapes[0][0]
    shape = (batch, 4) if name.endswith("Cell") else (4, batch, 4)
    hx = tensors(states(name, *shape, requires_grad=True))
    x = torch.randn(shapes[0], requires_grad=True)

    def eager(x, *hx):
        return model(x, hx if len(hx) == 2 else hx[0])

    same_values(gradients(call, model, x, *hx), gradients(eager, model, x, *hx))


@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(enforce_sorted, with_states):
    layer = fastcell.LSTM(3, 4, bidirectional=True)
    call = compiled(layer)
    for lengths in ([5, 3, 2], [4, 4, 1]):
        order = lengths if enforce_sorted else lengths[1:] + lengths[:1]
        packed = pack_sequence([torch.randn(n, 3) for n in order], enforce_sorted=enforce_sorted)
        hx = states("LSTM", 2, 3, 4) if with_states else None
        results = []
        for run in (call, layer):
            output, final = run(packed, hx)
            value = output.data.square().sum() + sum(t.sum() for t in final)
            results.append((output, final, torch.autograd.grad(value, list(layer.parameters()))))
        same_values(*results)


def test_dropout_draws_the_same_masks():
    model, shapes = model_and_shapes("GRU", dropout=0.5)
    call = compiled(model)
    x = torch.randn(shapes[0], requires_grad=True)
    results = []
    for run in (call, model):
        torch.manual_seed(1)
        results.append(gradients(run, model, x))
    same_values(*results)
    same_values(call.eval()(x), model.eval()(x))


def test_training_in_compiled_mode():
    losses = []
    for compile in (True, False):
        torch.manual_seed(0)
        model, shapes = model_and_shapes("LSTM")
        call = compiled(model) if compile else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x = torch.randn(shapes[0])
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = call(x)[0].square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    same_values(*map(torch.stack, losses))
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_autocast_inside_and_outside_of_the_graph():
    model, shapes = model_and_shapes("LSTM")
    x = torch.randn(shapes[0])

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = inside(x)
    assert all(t.dtype is torch.bfloat16 for t in expected)
    same_values(compiled(inside)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        same_values(compiled(model)(x), expected)


def test_transforms_inside_of_the_graph():
    layer = fastcell.LSTM(3, 4)

    def loss(x):
        return layer(x)[0].square().sum()

    xs = torch.randn(3, 4, 2, 3)
    # (The operands of jvp are no views: those torch cannot compile, whatever the function.)
    for f, inputs in (
        (lambda xs: vmap(lambda x: layer(x)[0])(xs), (xs,)),
        (lambda xs: vmap(grad(loss))(xs), (xs,)),
        (lambda x, v: jvp(loss, (x,), (v,)), (xs[0].clone(), xs[1].clone())),
    ):
        same_values(compiled(f)(*inputs), f(*inputs))


def test_inductor():
    model, shapes = model_and_shapes("LSTM")
    call = compiled(model, backend="inductor")
    x = torch.randn(shapes[0], requires_grad=True)
    same_values(gradients(call, model, x), gradients(model, model, x))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("strict", [True, False])
def test_export(name, strict):
    model, shapes = model_and_shapes(name)
    dynamic = {0: Dim("batch")} | ({} if name.endswith("Cell") else {1: Dim("steps")})
    program = torch.export.export(
        model, (torch.randn(shapes[0]),), dynamic_shapes={"x": dynamic}, strict=strict
    )
    operators = {torch.ops.fastcell.sequence.default}
    assert operators <= {node.target for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with warnings.catch_warnings():
        loaded = torch.export.load(file)
    x = torch.randn(shapes[2], requires_grad=True)
    expected = gradients(model, model, x)
    for exported in (program.module(), loaded.module()):
        same_values(gradients(exported, exported, x), expected)
    with torch.no_grad():
        lowered = program.run_decompositions().module()
        same_values(lowered(x), expected[0])
