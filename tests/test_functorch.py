"""torch.func on every layer: vmap, ensembles, per-sample gradients, forward mode, second order.

torch.nn's own layers fail most of these, so the answers come from loops over single calls and from
torch.autograd, which other tests hold to torch.nn.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import hvp, jacobian, vhp
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import pack_sequence

import fastcell
from against_torch import CELLS, LAYERS, same_values, states, tensors
from fastcell import cpu
from support import assert_equal_bits
from tolerances import finite_difference_tolerance

# torch's own: its rules of forward-mode differentiation are scripted when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

EVERY = [*LAYERS, *CELLS]
N = 4  # elements that are mapped over


def make(name, **kwargs):
    torch.manual_seed(0)
    if not name.endswith("Cell"):
        kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True} | kwargs
    module = getattr(fastcell, name)(3, 4, dtype=torch.float64, **kwargs)
    shape = (2, 3) if name.endswith("Cell") else (2, 5, 3)
    return module, torch.randn(N, *shape, dtype=torch.float64)


def state_shape(name):
    return (2, 4) if name.endswith("Cell") else (4, 2, 4)


def flat(module):
    """A module as a function to a tuple of tensors."""
    return lambda *inputs: tuple(tensors(module(*inputs)))


def total(module):
    """A module as a function to one number."""
    return lambda *inputs: sum(
        (i + 1) * t.square().sum() for i, t in enumerate(flat(module)(*inputs))
    )


def each(f, *mapped):
    """What vmap should give: the results of one call after the other, stacked."""
    return tuple(torch.stack(parts) for parts in zip(*map(f, *mapped), strict=True))


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernels' calls, forward and backward."""
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        original = getattr(cpu, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cpu, name, counted)
    return counts


# --- vmap over inputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_vmap_over_inputs_is_one_call_and_the_same_bits(name, calls):
    module, xs = make(name)
    mapped = vmap(flat(module))(xs)
    assert calls["forward"] == 1
    for mine, theirs in zip(mapped, each(flat(module), xs), strict=True):
        assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("mapped", ["x", "hx", "both"])
def test_vmap_over_states(name, mapped, calls):
    module, xs = make(name)
    many = states(name, N, *state_shape(name), dtype=torch.float64)
    one = tuple(t[0] for t in many) if isinstance(many, tuple) else many[0]
    dims = {"x": (0, None), "hx": (None, 0), "both": (0, 0)}[mapped]
    x = xs if dims[0] == 0 else xs[0]
    hx = many if dims[1] == 0 else one
    found = vmap(flat(module), in_dims=dims)(x, hx)
    assert calls["forward"] == 1
    for i in range(N):
        state = (
            hx if dims[1] is None else tuple(t[i] for t in hx) if isinstance(hx, tuple) else hx[i]
        )
        expected = flat(module)(x if dims[0] is None else x[i], state)
        same_values(tuple(t[i] for t in found), expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
def test_vmap_over_any_dimension(name, batch_first, unbatched):
    module, xs = make(name, batch_first=batch_first)
    if unbatched:
        xs = xs[:, 0]
    expected = each(flat(module), xs)
    for at in range(1, xs.dim()):
        found = vmap(flat(module), in_dims=at, out_dims=1)(xs.movedim(0, at))
        for mine, theirs in zip(found, expected, strict=True):
            same_values(mine.movedim(1, 0), theirs)


def test_nested_vmap(calls):
    module, xs = make("LSTM")
    deep = torch.stack([xs, 2 * xs])
    found = vmap(vmap(flat(module)))(deep)
    assert calls["forward"] == 1
    same_values(tuple(t.flatten(0, 1) for t in found), each(flat(module), deep.flatten(0, 1)))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_through_vmap(name, calls):
    module, xs = make(name)
    leaves = [xs.requires_grad_(), *module.parameters()]
    mapped = torch.autograd.grad(vmap(total(module))(xs).sum(), leaves)
    assert calls == {"forward": 1, "backward": 1}
    same_values(mapped, torch.autograd.grad(sum(map(total(module), xs)), leaves))


def test_vmap_over_batches_of_no_sample():
    module, xs = make("GRU")
    found = vmap(flat(module))(xs[:, :0])
    assert [t.shape for t in found] == [(N, 0, 5, 8), (N, 4, 0, 4)]


def test_vmap_over_packed_sequences():
    module, _ = make("LSTM", batch_first=False)
    packed = [pack_sequence([torch.randn(n, 3).double() for n in (4, 2)]) for _ in range(N)]

    def run(data):
        output, (h, c) = module(packed[0]._replace(data=data))
        return output.data, h, c

    data = torch.stack([p.data for p in packed])
    same_values(vmap(run)(data), each(run, data))


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_dropout_follows_the_randomness_of_vmap(randomness):
    module, xs = make("GRU", dropout=0.5, num_layers=3)
    same = xs[:1].expand(xs.shape)
    mapped = vmap(flat(module), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="random"):
            mapped(same)
        return
    torch.manual_seed(0)
    output = mapped(same)[0]
    equal = [torch.equal(output[0], other) for other in output[1:]]
    assert equal == [randomness == "same"] * (N - 1)
    alone = vmap(flat(module.eval()), randomness=randomness)(same)[0]
    assert not torch.equal(output, alone)


# --- vmap over weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shared_input", [True, False])
def test_ensembles(name, shared_input):
    modules = [make(name)[0] for _ in range(N)]
    for i, module in enumerate(modules):
        for p in module.parameters():
            p.data.add_(0.1 * i)
    _, xs = make(name)
    stacked, _ = stack_module_state(modules)

    def run(parameters, x):
        return tuple(tensors(functional_call(modules[0], parameters, (x,))))

    inputs = [xs[0]] * N if shared_input else list(xs)
    dims = (0, None if shared_input else 0)
    found = vmap(run, in_dims=dims)(stacked, xs[0] if shared_input else xs)
    expected = [flat(m)(x) for m, x in zip(modules, inputs, strict=True)]
    same_values(found, tuple(map(torch.stack, zip(*expected, strict=True))))

    def loss(parameters, x):
        return sum(t.square().sum() for t in run(parameters, x))

    slopes = vmap(grad(loss), in_dims=dims)(stacked, xs[0] if shared_input else xs)
    for i, (module, x) in enumerate(zip(modules, inputs, strict=True)):
        parameters = {k: v.detach() for k, v in module.named_parameters()}
        same_values([s[i] for s in slopes.values()], list(grad(loss)(parameters, x).values()))


def test_every_model_on_every_input():
    modules = [make("LSTM")[0] for _ in range(3)]
    stacked, _ = stack_module_state(modules)
    _, xs = make("LSTM")

    def run(parameters, x):
        return functional_call(modules[0], parameters, (x,))[0]

    models_outside = vmap(vmap(run, in_dims=(None, 0)), in_dims=(0, None))(stacked, xs)
    inputs_outside = vmap(vmap(run, in_dims=(0, None)), in_dims=(None, 0))(stacked, xs)
    same_values(models_outside, inputs_outside.transpose(0, 1))
    for i, module in enumerate(modules):
        same_values(models_outside[i], each(lambda x, m=module: (m(x)[0],), xs)[0])


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_per_sample_gradients(name):
    module, xs = make(name)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters, x):
        return sum(t.square().sum() for t in tensors(functional_call(module, parameters, (x,))))

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        expected = torch.autograd.grad(total_squares(module, x), list(module.parameters()))
        same_values(tuple(g[i] for g in found.values()), expected)


def total_squares(module, x):
    return sum(t.square().sum() for t in tensors(module(x)))


@pytest.mark.parametrize("name", EVERY)
def test_per_sample_gradients_of_inputs_are_one_call_each_way(name, calls):
    module, xs = make(name)
    found = vmap(grad(total(module)))(xs)
    assert calls == {"forward": 1, "backward": 1}
    leaf = xs.clone().requires_grad_()
    same_values(found, torch.autograd.grad(sum(map(total(module), leaf)), leaf)[0])


@pytest.mark.parametrize("name", EVERY)
def test_grad_and_vjp(name):
    module, xs = make(name)
    leaf = xs[0].clone().requires_grad_()
    value = total(module)(leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    slope, found = grad_and_value(total(module))(xs[0])
    same_values((slope, found), (expected, value))
    outputs, pull = vjp(flat(module), xs[0])
    cotangents = tuple(2 * (i + 1) * t for i, t in enumerate(outputs))
    same_values(pull(cotangents)[0], expected)
    # vjp's function is linear, and can itself be differentiated forwards.
    same_values(jvp(pull, (cotangents,), (cotangents,))[1][0], expected)


def test_parameters_outside_of_a_transform_get_their_gradients():
    """Of torch.func inside, .backward() outside: the derivative of a derivative."""
    module, xs = make("LSTM")
    leaf = xs[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(module)(leaf), leaf, create_graph=True)
    expected = torch.autograd.grad(slope.square().sum(), list(module.parameters()))
    found = torch.autograd.grad(
        grad(total(module))(xs[0]).square().sum(), list(module.parameters())
    )
    same_values(found, expected)


def test_a_tensor_that_a_transform_left_behind():
    """A state stored by a function under grad has no memory of its own; torch.nn takes it."""
    module, xs = make("GRU")
    kept = []

    def loss(x):
        output, state = module(x)
        kept.append(state)
        return output.sum()

    grad(loss)(xs[0])
    for inputs in ((xs[1], kept[0]), (kept[0][:2, :, :3], None)):
        same_values(module(*inputs)[0].detach(), module(inputs[0] + 0, inputs[1])[0].detach())
    _, state = module(xs[0])
    same_values(module(xs[1], kept[0])[0].detach(), module(xs[1], state)[0].detach())


# --- forward mode and second order ----------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_forward_mode(name):
    module, xs = make(name)
    x, v = xs[0], xs[1]
    step = torch.finfo(torch.float64).eps ** (1 / 3)
    ahead, behind = flat(module)(x + step * v), flat(module)(x - step * v)
    expected = tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
    allowed = finite_difference_tolerance(torch.float64) * v.norm().item()
    outputs, tangents = jvp(flat(module), (x,), (v,))
    same_values(outputs, flat(module)(x))
    for mine, theirs in zip(tangents, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=allowed)
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(t) for t in flat(module)(forward_ad.make_dual(x, v))]
    same_values(tuple(d.tangent for d in duals), tangents)


def test_linearize():
    module, xs = make("LSTM", num_layers=1)
    with warnings.catch_warnings():  # torch.fx's, of constants in the graph that it makes
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")
        _, push = linearize(flat(module), xs[0])
    same_values(push(xs[1]), jvp(flat(module), (xs[0],), (xs[1],))[1])


@pytest.mark.parametrize("name", EVERY)
def test_tangents_of_parameters(name):
    module, xs = make(name)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    tangents = {k: torch.ones_like(v) for k, v in parameters.items()}

    def loss(parameters):
        return sum(t.square().sum() for t in tensors(functional_call(module, parameters, (xs[0],))))

    _, found = jvp(loss, (parameters,), (tangents,))
    same_values(found, sum(g.sum() for g in grad(loss)(parameters).values()))


@pytest.mark.parametrize("name", EVERY)
def test_jacobians(name):
    module, xs = make(name)
    x = xs[0, :1] if name.endswith("Cell") else xs[0, :1, :2]

    def f(x):
        return flat(module)(x)[0]

    expected = jacobian(f, x)
    same_values(jacrev(f)(x), expected)
    same_values(jacfwd(f)(x), expected)
    same_values(jacobian(f, x, vectorize=True), expected)
    same_values(jacobian(f, x, vectorize=True, strategy="forward-mode"), expected)
    same_values(vmap(jacrev(f))(x[None])[0], expected)


@pytest.mark.parametrize("name", EVERY)
def test_second_order(name):
    module, xs = make(name)
    x = xs[0, :1] if name.endswith("Cell") else xs[0, :1, :2]
    f = total(module)
    expected = hessian_of(f, x)
    for found in (hessian(f), jacrev(jacrev(f)), jacrev(jacfwd(f)), jacfwd(jacfwd(f))):
        same_values(found(x), expected)
    product = torch.tensordot(expected, x, x.dim())
    same_values(hvp(f, x, x)[1], product)
    same_values(vhp(f, x, x)[1], product)
    same_values(jvp(grad(f), (x,), (x,))[1], product)
    same_values(grad(lambda y: (grad(f)(y) * x).sum())(x), product)
    same_values(vmap(hessian(f))(x[None])[0], expected)


def test_functionalize():
    module, xs = make("LSTM")
    same_values(functionalize(flat(module))(xs[0]), flat(module)(xs[0]))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_per_sample_gradients_with_dropout(randomness):
    """Forward and backward of an element see the same mask: checked by finite differences."""
    module, xs = make("LSTM", dropout=0.5)
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    directions = {k: torch.randn_like(v) for k, v in parameters.items()}
    step = torch.finfo(torch.float64).eps ** (1 / 3)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    def moved(by):
        torch.manual_seed(0)
        there = {k: v + by * directions[k] for k, v in parameters.items()}
        return vmap(loss, in_dims=(None, 0), randomness=randomness)(there, xs)

    torch.manual_seed(0)
    found = vmap(grad(loss), in_dims=(None, 0), randomness=randomness)(parameters, xs)
    along = sum((found[k] * directions[k]).flatten(1).sum(1) for k in found)
    expected = (moved(step) - moved(-step)) / (2 * step)
    allowed = finite_difference_tolerance(torch.float64) * sum(
        d.norm() for d in directions.values()
    )
    torch.testing.assert_close(along, expected, rtol=float(allowed), atol=float(allowed))
