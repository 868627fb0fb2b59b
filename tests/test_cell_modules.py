"""RNNCell, LSTMCell and GRUCell against torch.nn's contract."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastcell
from against_torch import (
    CELLS,
    has_two_states,
    same_error,
    same_error_type,
    same_gradients,
    same_values,
    states,
    tensors,
    twins,
)
from tolerances import assert_close

B, I, H = 3, 5, 6  # noqa: E741
GATES = {"RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}

each_cell = pytest.mark.parametrize("name", CELLS)

CONSTRUCTIONS = [
    *[(name, args, {}) for name in CELLS for args in ((I, H), (I, H, False), (I, H, True))],
    *[(name, (I, H), {"dtype": torch.float64}) for name in CELLS],
    *[(name, (I, H), {"device": "meta", "bias": False}) for name in CELLS],
    *[(name, (I, H, 3), {}) for name in CELLS],
    ("RNNCell", (I, H, True, "relu"), {}),
    ("RNNCell", (I, H), {"nonlinearity": "relu", "bias": False}),
    ("RNNCell", (I, H, True, "relu", "meta", torch.float64), {}),
    ("LSTMCell", (I, H, True, "meta", torch.float64), {}),
    ("GRUCell", (I, H, True, "meta", torch.float64), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS, ids=str)
def test_construction_is_torchs(name, args, kwargs):
    torch.manual_seed(3)
    ours = getattr(fastcell, name)(*args, **kwargs)
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNCellBase)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: v for k, v in vars(ours).items() if k != "_parameters"} == {
        k: v for k, v in vars(theirs).items() if k != "_parameters"
    }
    for (key, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
        assert mine.is_meta or torch.equal(mine, other), key


@each_cell
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((I,), {}),
        ((I, H), {"unknown": 1}),
        ((I, H), {"num_chunks": 2}),
        ((-I, H), {}),
        ((I, -H), {}),
        ((5.0, H), {}),
        ((I, 6.0), {}),
        ((I, H), {"dtype": torch.int64}),
        ((I, H), {"device": "nowhere"}),
        ((I, H, True, "tanh", None, None, 1), {}),
    ],
    ids=str,
)
def test_construction_is_refused_as_by_torch(name, args, kwargs):
    same_error(lambda library: getattr(library, name)(*args, **kwargs))


def variants():
    for name in CELLS:
        yield name, {}
        yield name, {"bias": False}
    yield "RNNCell", {"nonlinearity": "relu"}


@pytest.mark.parametrize(("name", "options"), [*variants()], ids=str)
@pytest.mark.parametrize("batch", [(), (B,), (1,)])
def test_call_and_gradients_equal_torchs(name, options, batch):
    ours, theirs = twins(name, I, H, **options, dtype=torch.float64)
    torch.manual_seed(1)
    x = torch.randn(*batch, I, dtype=torch.float64)
    hx = states(name, *batch, H, dtype=torch.float64)
    for args in ((x,), (x, hx), (x, None)):
        same_values(ours(*args), theirs(*args))
    same_gradients(ours, theirs, lambda m: m(x, hx))
    same_gradients(ours, theirs, lambda m: m(x))

    def input_gradients(module):
        leaves = [t.clone().requires_grad_() for t in (x, *tensors(hx))]
        given = tuple(leaves[1:]) if has_two_states(name) else leaves[1]
        sum(t.square().sum() for t in tensors(module(leaves[0], given))).backward()
        return [leaf.grad for leaf in leaves]

    same_values(input_gradients(ours), input_gradients(theirs))
    # One step after another, as cells are used.
    for module in (ours, theirs):
        module.result = hx
        for _ in range(4):
            module.result = module(x, module.result)
    same_values(ours.result, theirs.result)


def test_gradient_through_one_of_two_states():
    ours, theirs = twins("LSTMCell", I, H)
    x, hx = torch.randn(B, I), states("LSTMCell", B, H)
    for which in (0, 1):
        same_gradients(ours, theirs, lambda m, i=which: m(x, hx)[i])


@each_cell
def test_states_may_be_a_list_and_tensors_strided(name):
    ours, theirs = twins(name, I, H)
    x = torch.randn(I, 2 * B).t()[::2]
    h = torch.randn(1, H).expand(B, H)
    hx = [h, h] if has_two_states(name) else h
    same_values(ours(x, hx), theirs(x, hx))


@each_cell
def test_sizes_of_zero(name):
    ours, theirs = twins(name, I, H)
    x = torch.randn(0, I, requires_grad=True)
    same_values(ours(x), theirs(x))
    same_values(ours(x, states(name, 0, H)), theirs(x, states(name, 0, H)))
    tensors(ours(x))[0].sum().backward()
    assert x.grad.shape == x.shape
    no_input, no_state = twins(name, 0, H), twins(name, I, 0)
    same_values(*[m(torch.randn(B, 0)) for m in no_input])
    for batch in ((), (B,)):
        x = torch.randn(*batch, I)
        same_values(*[m(x) for m in no_state])
        same_values(*[m(x, states(name, *batch, 0)) for m in no_state])


@each_cell
def test_one_bias_may_be_missing(name):
    ours, theirs = twins(name, I, H)
    x, hx = torch.randn(B, I), states(name, B, H)
    for key in ("bias_hh", "bias_ih"):
        for module in (ours, theirs):
            setattr(module, key, None)
        same_values(ours(x, hx), theirs(x, hx))
        same_gradients(ours, theirs, lambda m: m(x, hx))


@each_cell
def test_meta_device(name):
    ours, theirs = twins(name, I, H, device="meta")
    for batch in ((), (B,)):
        mine, other = (m(torch.randn(*batch, I, device="meta")) for m in (ours, theirs))
        assert [t.shape for t in tensors(mine)] == [t.shape for t in tensors(other)]
        assert all(t.is_meta for t in tensors(mine))


@each_cell
@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_autocast_gives_torchs_dtypes(name, inside):
    ours, theirs = twins(name, I, H)
    x, hx = torch.randn(B, I, dtype=inside), states(name, B, H, dtype=inside)
    with torch.autocast("cpu", torch.bfloat16):
        for args in ((x,), (x, hx)):
            for mine, other in zip(tensors(ours(*args)), tensors(theirs(*args)), strict=True):
                assert mine.dtype is other.dtype
                assert_close(mine, other, dtype=torch.bfloat16, steps=1, length=I + H)
        with pytest.raises(RuntimeError, match="inconsistent input_size"):
            ours(x[:, :2])


@each_cell
def test_compiles_without_a_graph_break(name):
    cell = twins(name, I, H)[0]
    x, hx = torch.randn(B, I), states(name, B, H)
    torch.compiler.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    same_values(compiled(x), cell(x))
    same_values(compiled(x, hx), cell(x, hx))
    torch.compiler.reset()


# --- refused calls --------------------------------------------------------------------------------


def call(name, x, hx=None, **options):
    return lambda library: getattr(library, name)(I, H, **options)(x, hx)


@each_cell
def test_wrong_input_is_refused_as_by_torch(name):
    x = torch.randn(B, I)
    for bad in (
        torch.tensor(1.0),
        torch.randn(1, B, I),
        torch.randn(B, I + 1),
        torch.randn(I - 1),
        x.double(),
        x.half(),
        x.long(),
        [1.0, 2.0],
        None,
        x.numpy(),
        "text",
    ):
        same_error(call(name, bad))
    same_error(lambda library: getattr(library, name)(I, H)())
    same_error(lambda library: getattr(library, name)(I, H)(x, None, None))
    same_error_type(call(name, x.to("meta")))
    same_error_type(call(name, x, device="meta"))


@each_cell
def test_wrong_states_are_refused_as_by_torch(name):
    x = torch.randn(B, I)
    for shape in ((1, B, H), (), (B + 1, H), (1, H), (B, H + 1), (B, 1), (B + 1, H + 1), (H,)):
        same_error(call(name, x, states(name, *shape)))
    for shape in ((1, H), (H + 1,), (1, 1, H)):
        same_error(call(name, x[0], states(name, *shape)))
    same_error(call(name, torch.randn(B, I + 1), states(name, B + 1, H)))
    same_error(call(name, x, states(name, B, H, dtype=torch.float64)))
    same_error_type(call(name, x, states(name, B, H, device="meta")))
    for bad in ("ab", 3, (torch.randn(B, H),), (torch.randn(B, H),) * 3):
        same_error(call(name, x, bad))
    same_error(call(name, x, torch.randn(2, B, H)))
    if has_two_states(name):
        good = torch.randn(B, H)
        same_error(call(name, x, good))
        for bad in (torch.randn(B, H + 1), torch.randn(B + 1, H), torch.randn(1, B, H)):
            same_error(call(name, x, (good, bad)))
            same_error(call(name, x, (bad, good)))
    else:
        same_error(call(name, x, (torch.randn(B, H),) * 2))


def test_unknown_nonlinearity():
    same_error(call("RNNCell", torch.randn(B, I), nonlinearity="sigmoid"))
    same_error(call("RNNCell", torch.randn(B, I + 1), nonlinearity="sigmoid"))
    same_error(call("RNNCell", torch.randn(1, B, I), nonlinearity="sigmoid"))


@each_cell
def test_corrupt_weights_are_refused(name):
    x, rows = torch.randn(B, I), GATES[name] * H

    def with_attribute(key, value):
        def change(library):
            cell = getattr(library, name)(I, H)
            setattr(cell, key, value)
            return cell(x)

        return change

    same_error(with_attribute("weight_hh", None))
    same_error(with_attribute("weight_ih", None))
    same_error(with_attribute("hidden_size", H + 1))
    for key, shape in (
        ("weight_ih", (rows + 1, I)),
        ("weight_ih", (rows,)),
        ("weight_hh", (rows,)),
        ("weight_hh", (rows + 1, H)),
        ("bias_ih", (rows + 1,)),
        ("bias_hh", (rows, 1)),
    ):
        same_error_type(with_attribute(key, nn.Parameter(torch.zeros(shape))))
    same_error_type(with_attribute("weight_hh", nn.Parameter(torch.zeros(rows, H).double())))

    def without_bias(library):
        cell = getattr(library, name)(I, H)
        del cell.bias_hh
        return cell(x)

    same_error(without_bias)


# --- life as a module -----------------------------------------------------------------------------


@each_cell
def test_saving_copying_moving(name):
    ours, theirs = twins(name, I, H)
    x = torch.randn(B, I)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        same_values(again(x), ours(x))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    same_values(ours.double()(x.double()), theirs.double()(x.double()))
    same_error(
        lambda library: getattr(library, name)(I, H).load_state_dict(
            getattr(nn, name)(I, H + 1).state_dict()
        )
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@each_cell
def test_weights_that_are_something_else(name):
    x, hx = torch.randn(B, I), states(name, B, H)

    def check(pair, change):
        for module in pair:
            change(module)
        same_values(pair[0](x, hx), pair[1](x, hx))
        same_gradients(*pair, lambda m: m(x, hx))

    check(twins(name, I, H), lambda m: nn.utils.weight_norm(m, "weight_hh"))
    check(twins(name, I, H), lambda m: prune.l1_unstructured(m, "weight_ih", amount=0.4))
    pair = twins(name, I, H)
    check(pair, lambda m: parametrizations.weight_norm(m, "weight_hh"))
    same_values(copy.deepcopy(pair[0])(x, hx), pair[1](x, hx))
    check(twins(name, I, H), lambda m: m.weight_hh.requires_grad_(False))

    def write(module):
        module.weight_hh.data.mul_(0.5)

    pair = twins(name, I, H)
    same_values(pair[0](x, hx), pair[1](x, hx))
    check(pair, write)
    other = {key: p.detach() + 1 for key, p in pair[0].named_parameters()}
    same_values(*[torch.func.functional_call(m, other, (x, hx)) for m in pair])


@pytest.mark.parametrize(
    ("name", "options"),
    [("LeakyRNN", {"alpha": 0.3}), ("LeakyRNN", {"nonlinearity": "relu", "learn_alpha": True}),
     ("IndRNN", {}), ("IndRNN", {"nonlinearity": "tanh"})],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_cells_of_our_own_are_a_step_of_the_layer(name, options, bias):
    layer = getattr(fastcell, name)(I, H, bias=bias, **options)
    cell = getattr(fastcell, name + "Cell")(I, H, bias, **options)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, h = torch.randn(B, I, requires_grad=True), torch.randn(B, H, requires_grad=True)
    wanted, found = layer(x[None], h[None])[0][0], cell(x, h)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(cell(x[0], h[0]), found[0])
    torch.testing.assert_close(cell(x), layer(x[None])[0][0])
    leaves = [[x, h, *[p for p in m.parameters() if p.requires_grad]] for m in (cell, layer)]
    got, due = (
        torch.autograd.grad(o.sin().sum(), own)
        for o, own in zip((found, wanted), leaves, strict=True)
    )
    assert len(got) == len(due)
    for a, b in zip(got, due, strict=True):
        torch.testing.assert_close(a, b)
    assert f"{name}Cell({I}, {H}" in repr(cell)
    again = pickle.loads(pickle.dumps(copy.deepcopy(cell)))
    assert torch.equal(again(x, h), found)
    assert fastcell.explain(cell, x).path == "kernel"


def test_cells_of_our_own_begin_as_their_layers():
    leaky = fastcell.LeakyRNNCell(I, H, alpha=torch.linspace(0, 1, H))
    torch.testing.assert_close(leaky.weight_leak[0], torch.linspace(0, 1, H))
    assert not leaky.weight_leak.requires_grad
    leaky.reset_parameters()
    torch.testing.assert_close(leaky.weight_leak[0], torch.linspace(0, 1, H))
    independent = fastcell.IndRNNCell(I, H)
    assert independent.weight_hh.shape == (1, H)
    assert ((independent.weight_hh >= 0) & (independent.weight_hh <= 1)).all()
    assert "nonlinearity=tanh" in repr(fastcell.IndRNNCell(I, H, nonlinearity="tanh"))
    with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
        fastcell.LeakyRNNCell(I, H, alpha=1.5)
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        fastcell.LeakyRNNCell(I, H, nonlinearity="elu")
    with pytest.raises(ValueError, match="Expected input to be 1D or 2D, got 3D"):
        independent(torch.zeros(1, 1, I))
    for cell in (leaky, independent):
        model = nn.Sequential(cell)
        assert fastcell.revert(model)[0] is cell
        with pytest.raises(ValueError, match="cannot be quantized"):
            fastcell.quantize(cell)
