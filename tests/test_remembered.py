"""Calls that come again take a shorter way: same results, and nothing goes unnoticed."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.utils.prune

import fastcell
from fastcell import _core, packing, remembered
from support import assert_equal_bits, python, threads

pytestmark = pytest.mark.skipif(
    remembered._EXCHANGE_API is None, reason="this torch has no DLPack exchange API"
)
KINDS = ["RNN", "LSTM", "GRU"]
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"dtype": torch.float64},
]


def make(kind, **kwargs):
    torch.manual_seed(0)
    if kind == "projected":
        return fastcell.LSTM(5, 7, proj_size=3, **kwargs)
    return getattr(fastcell, kind)(5, 7, **kwargs)


def flat(result):
    output, states = result
    return [output, *(states if isinstance(states, tuple) else (states,))]


@pytest.fixture
def count(monkeypatch):
    """How many calls took the short way."""
    taken = []
    make_call = _core.remembered_call

    def observed(*arguments):
        call = make_call(*arguments)

        def run(*args):
            found = call(*args)
            taken.append(found is not None)
            return found

        return run

    monkeypatch.setattr(_core, "remembered_call", observed)
    return lambda: sum(taken)


def fresh(layer):
    """The same layer without a memory."""
    return copy.deepcopy(layer)


def states_for(layer, batch, requires_grad=False):
    """Random initial states, as the layer takes them."""
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_ih_l0.dtype
    h = torch.randn(stacked, batch, layer.proj_size or 7, dtype=dtype, requires_grad=requires_grad)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(stacked, batch, 7, dtype=dtype, requires_grad=requires_grad)


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_the_same_bits_and_layout(kind, shape, given, graph, count):
    layer = make(kind, **shape)
    dtype = layer.weight_ih_l0.dtype
    sizes = (2, 3, 5) if layer.batch_first else (3, 2, 5)
    for i in range(5):
        x = torch.randn(sizes, dtype=dtype)
        hx = states_for(layer, 2) if given else None
        with torch.set_grad_enabled(graph):
            found = flat(layer(x, hx))
            expected = flat(fresh(layer)(x, hx))
        for a, b in zip(found, expected, strict=True):
            assert_equal_bits(a.detach(), b.detach())
            assert a.stride() == b.stride()
            assert a.requires_grad is graph
            assert a.is_leaf is not graph
        assert count() == max(0, i - 1)


def gradients(module, x, hx, **kwargs):
    """Of a loss of all results: those of input, states and parameters that have one."""
    states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    results = module(x, hx)
    results = results if isinstance(results, tuple) else (results,)
    tensors = [t for r in results for t in (r if isinstance(r, tuple) else (r,))]
    torch.manual_seed(1)
    loss = sum([(t * torch.randn_like(t)).sum() for t in tensors])
    wanted = [t for t in (x, *states, *module.parameters()) if t.requires_grad]
    return torch.autograd.grad(loss, wanted, **kwargs)


def assert_same_gradients(module, x, hx, **kwargs):
    found = gradients(module, x, hx, **kwargs)
    for a, b in zip(found, gradients(fresh(module), x, hx, **kwargs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_equal_bits(a.detach(), b.detach())
            assert a.stride() == b.stride()


def remember(module, x, hx=None):
    """Call it until it remembers the call."""
    for _ in range(3):
        module(x, hx)
    assert module.__dict__["_remembered"].call is not remembered.no_call


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_the_same_gradients(kind, shape, given, count):
    layer = make(kind, **shape)
    dtype = layer.weight_ih_l0.dtype
    sizes = (2, 3, 5) if layer.batch_first else (3, 2, 5)
    x = torch.randn(sizes, dtype=dtype, requires_grad=True)
    hx = states_for(layer, 2, requires_grad=True) if given else None
    remember(layer, x, hx)
    before = count()
    assert_same_gradients(layer, x, hx)
    layer.weight_ih_l0.requires_grad_(False)
    assert_same_gradients(layer, x, hx)
    assert_same_gradients(layer, x.detach(), hx)
    wide = torch.randn((*sizes[:2], 9), dtype=dtype)[..., :5].requires_grad_()
    assert_same_gradients(layer, wide, hx)
    assert count() == before + 4


@pytest.fixture
def backward_count(monkeypatch):
    """How many backward calls did not go to the kernels alone."""
    taken = []
    whole = remembered._backward

    def observed(*arguments):
        taken.append(1)
        return whole(*arguments)

    monkeypatch.setattr(remembered, "_backward", observed)
    return lambda: len(taken)


def test_any_gradient_of_the_results(backward_count):
    layer = make("LSTM")
    x = torch.randn(3, 2, 5, requires_grad=True)
    remember(layer, x)
    other = fresh(layer)
    for part in (
        lambda output, h, c: output.sum(),
        lambda output, h, c: output[-1].square().sum(),
        lambda output, h, c: h.sum(),
        lambda output, h, c: c[0, :, ::2].sum(),
        lambda output, h, c: (
            (output.transpose(0, 1) * output.detach().transpose(0, 1)).sum() + c.sum()
        ),
    ):
        ours = torch.autograd.grad(part(*flat(layer(x))), [x, *layer.parameters()])
        theirs = torch.autograd.grad(part(*flat(other(x))), [x, *other.parameters()])
        for a, b in zip(ours, theirs, strict=True):
            assert_equal_bits(a, b)
    assert backward_count() == 0
    loss = layer(x)[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, b in zip(layer.parameters(), theirs[1:], strict=True):
        assert parameter.grad.shape == b.shape


def test_a_graph_of_the_gradients(backward_count):
    layer = make("GRU", dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)
    remember(layer, x, h)
    assert_same_gradients(layer, x, h, create_graph=True)
    assert backward_count() == 1
    assert torch.autograd.gradcheck(lambda x, h: layer(x, h)[0], (x, h))
    assert torch.autograd.gradgradcheck(lambda x, h: layer(x, h)[0], (x, h))

    def rows(layer):
        grads = torch.randn(4, 3, 2, 7, dtype=torch.float64, generator=torch.manual_seed(0))
        return torch.autograd.grad(layer(x, h)[0], [x, h], grads, is_grads_batched=True)

    for a, b in zip(rows(layer), rows(fresh(layer)), strict=True):
        assert_equal_bits(a, b)


def test_saved_tensors():
    layer, x = make("LSTM"), torch.randn(3, 2, 5, requires_grad=True)
    remember(layer, x)
    output = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        assert_same_gradients(layer, x, None)
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float())
    with packed:
        assert_same_gradients(layer, x, None)
    output = layer(x)[0]
    output.mul_(2)  # the caller may
    output.sum().backward()


def test_backward_from_another_thread():
    layer, x = make("GRU"), torch.randn(3, 2, 5)
    remember(layer, x)
    wanted = torch.autograd.grad(fresh_output(layer, x), list(layer.parameters()))
    losses = [layer(x)[0].square().sum() for _ in range(4)]
    found = []

    def work():
        for loss in losses:
            found.append(torch.autograd.grad(loss, list(layer.parameters())))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert len(found) == 4
    for a, b in zip(found[-1], wanted, strict=True):
        assert_equal_bits(a, b)


def fresh_output(layer, x):
    """Of a layer that remembers nothing, with the same parameters."""
    call = layer.__dict__.pop("_remembered")
    loss = layer(x)[0].square().sum()
    layer.__dict__["_remembered"] = call
    return loss


def test_training_goes_on_with_new_weights(count):
    layer = make("LSTM")
    other = fresh(layer)
    x = torch.randn(4, 3, 5)
    losses = []
    for module in (layer, other):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        losses.append([])
        for _ in range(8):
            if module is other:
                module.__dict__.pop("_remembered", None)
            loss = module(x)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        if module is layer:
            assert count() == 6
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_nothing_wants_a_gradient(count):
    layer, x = make("RNN").requires_grad_(False), torch.randn(1, 2, 5)
    remember(layer, x)
    assert not layer(x)[0].requires_grad
    assert count() > 0
    recomputing = make("RNN", recompute=True).requires_grad_(False)
    remember(recomputing, x)
    before = count()
    recomputing(x)  # with gradients on, but none to be computed
    assert count() == before + 1
    assert layer(x.requires_grad_())[0].requires_grad


def test_recompute_and_drawing_layers_train_the_long_way(count):
    x = torch.randn(3, 2, 5)
    layer = make("GRU", recompute=True)
    for _ in range(4):
        layer(x)
    assert count() == 0
    with torch.no_grad():
        layer(x)
    assert count() == 1
    for options in (
        {"zoneout": 0.5},
        {"dropout": 0.5, "num_layers": 2},
        {"recurrent_dropout": 0.5},
    ):
        layer = make("GRU", **options)
        results = [layer(x)[0] for _ in range(4)]
        assert count() == 1
        assert not torch.equal(results[2], results[3])


def test_a_graph_that_is_dropped_keeps_nothing_alive():
    layer, x = make("LSTM"), torch.randn(3, 2, 5)
    remember(layer, x)
    output = layer(x)[0]
    kept = [weakref.ref(layer), weakref.ref(layer.weight_ih_l0)]
    del layer
    gc.collect()
    assert kept[0]() is None
    output.sum().backward()
    del output
    gc.collect()
    assert [k() for k in kept] == [None, None]


CELLS = ["RNNCell", "GRUCell", "LSTMCell", "peephole", "IndRNNCell", "LeakyRNNCell", "no bias"]


def make_cell(kind, dtype=None):
    torch.manual_seed(0)
    if kind == "peephole":
        return fastcell.LSTMCell(5, 7, peephole=True, dtype=dtype)
    if kind == "no bias":
        return fastcell.GRUCell(5, 7, bias=False, dtype=dtype)
    return getattr(fastcell, kind)(5, 7, dtype=dtype)


def cell_states(cell, batch, dtype=None):
    made = [torch.randn(batch, 7, dtype=dtype, requires_grad=True) for _ in range(2)]
    return tuple(made) if isinstance(cell, fastcell.LSTMCell) else made[0]


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, dtype, given, count):
    cell = make_cell(kind, dtype)
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    hx = cell_states(cell, 3, dtype) if given else None
    remember(cell, x, hx)
    before = count()
    assert_same_gradients(cell, x, hx)
    with torch.no_grad():
        found, expected = cell(x, hx), fresh(cell)(x, hx)
    for a, b in zip(flat_states(found), flat_states(expected), strict=True):
        assert_equal_bits(a, b)
        assert a.stride() == b.stride()
        assert not a.requires_grad
    assert count() == before + 2
    for other in (x[:2], x[0]):
        hx_of = (
            None
            if hx is None
            else map_states(lambda s, n=other: s[: len(n)] if n.dim() > 1 else s[0], hx)
        )
        assert_same_gradients(cell, other.detach().requires_grad_(), hx_of)
    assert count() == before + 2


def flat_states(states):
    return states if isinstance(states, tuple) else (states,)


def map_states(function, states):
    if isinstance(states, tuple):
        return tuple([function(s).detach().requires_grad_() for s in states])
    return function(states).detach().requires_grad_()


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_of_cells(kind, backward_count):
    cell = make_cell(kind, torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    hx = cell_states(cell, 2, torch.float64)
    remember(cell, x, hx)
    assert_same_gradients(cell, x, hx, create_graph=True)
    assert backward_count() == 1
    states = flat_states(hx)

    def run(x, *states):
        return cell(x, states if len(states) > 1 else states[0])

    assert torch.autograd.gradgradcheck(run, (x, *states))


def test_a_loop_over_steps_that_cuts_its_graph(count):
    cell, other = make_cell("LSTMCell"), make_cell("LSTMCell")
    x = torch.randn(12, 3, 5)
    grads = []
    for module in (cell, other):
        state = None
        for t in range(12):
            if module is other:
                module.__dict__.pop("_remembered", None)
            state = module(x[t], state)
            if t % 4 == 3:
                (state[0].sum() + state[1].square().sum()).backward()
                for s in state:
                    s.detach_()
        grads.append([p.grad for p in module.parameters()])
    assert count() > 0
    for a, b in zip(*grads, strict=True):
        assert_equal_bits(a, b)


def test_a_bias_that_comes_later(count):
    cell, x = make_cell("no bias"), torch.randn(2, 5)
    remember(cell, x)
    cell.bias_ih, cell.bias_hh = (torch.nn.Parameter(torch.randn(21)) for _ in range(2))
    before = count()
    assert_equal_bits(cell(x).detach(), fresh(cell)(x).detach())
    assert count() == before

    for name in ("bias_ih", "bias_hh"):
        delattr(cell, name)
        cell.register_buffer(name, torch.randn(21))
    for _ in range(4):
        assert_equal_bits(cell(x).detach(), fresh(cell)(x).detach())


def test_weights_that_go_and_come_back():
    """As an average of weights is put in their place for a while, past the version counter."""
    cell, x = make_cell("GRUCell"), torch.randn(2, 5)
    with torch.no_grad():
        remember(cell, x)
        wanted = cell(x).clone()
        kept = [p.data.clone() for p in cell.parameters()]
        for p in cell.parameters():
            p.data.mul_(2)
        cell(x[0])  # packs them, and is not remembered
        for p, old in zip(cell.parameters(), kept, strict=True):
            p.data.copy_(old)
        assert_equal_bits(cell(x), wanted)


def test_packed_weights_are_never_written_again():
    """Another thread's kernels may be reading them."""
    layer, x = make("LSTM"), torch.randn(3, 2, 5)
    remember(layer, x)
    packed = packing._entries[tuple(map(id, layer.parameters()))].packed
    kept = packed.clone()
    with torch.no_grad():
        layer.weight_ih_l0.add_(1)
    for _ in range(3):
        layer(x)
    assert torch.equal(packed, kept)


def test_weights_replaced_while_the_kernels_run():
    python("""
import threading, time, torch, fastcell
layer, x = fastcell.LSTM(256, 512), torch.randn(100, 1, 256)

def replace():
    time.sleep(0.0008)
    for name, p in list(layer._parameters.items()):
        setattr(layer, name, torch.nn.Parameter(torch.zeros_like(p)))

for _ in range(25):
    for _ in range(3):
        layer(x)
    thread = threading.Thread(target=replace)
    thread.start()
    for _ in range(3):
        y = layer(x)[0]
    thread.join()
    y.sum().backward()
""")


def test_tied_cells_are_swapped():
    a, b = make_cell("GRUCell"), make_cell("GRUCell")
    for name in list(a._parameters):
        setattr(b, name, getattr(a, name))
    x = torch.randn(2, 5)
    remember(a, x)
    remember(b, x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        torch.nn.ModuleList([a, b]).double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert b(x.double()).dtype is torch.float64


def test_a_wrong_number_of_tensors_is_refused():
    layer, x = make("LSTM"), torch.randn(3, 2, 5)
    remember(layer, x)
    run = layer(x)[0].grad_fn.run
    with torch.no_grad():
        for wrong in [((), (), ()), ((x,) * 6, (None,) * 3, (True,) * 3), (1, 2, 3)]:
            with pytest.raises(RuntimeError, match="backward call"):
                run(*wrong)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_reverted_modules_pickle(kind):
    model = torch.nn.Sequential(getattr(torch.nn, kind)(5, 7))
    fastcell.convert(model)
    remember(model[0], torch.randn(2, 5) if kind == "LSTMCell" else torch.randn(2, 2, 5))
    fastcell.revert(model)
    assert type(model[0]) is getattr(torch.nn, kind)
    pickle.loads(pickle.dumps(model))


@pytest.fixture
def layer():
    layer = make("LSTM")
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(1, 2, 5))
    assert layer.__dict__["_remembered"].call is not remembered.no_call
    return layer


CHANGES = {
    "an optimizer's step": lambda m: m.weight_ih_l0.add_(1),
    "data": lambda m: m.weight_ih_l0.data.mul_(2),
    "another tensor as data": lambda m: setattr(m.bias_ih_l0, "data", torch.randn(28)),
    "transposed data": lambda m: setattr(m.weight_ih_l0, "data", torch.randn(5, 28).t()),
    "a negated view": lambda m: setattr(
        m.weight_ih_l0, "data", torch._neg_view(m.weight_ih_l0.data)
    ),
    "another parameter": lambda m: setattr(
        m, "weight_ih_l0", torch.nn.Parameter(torch.randn(28, 5))
    ),
    "load_state_dict": lambda m: m.load_state_dict(make("LSTM").state_dict()),
    "batch_first": lambda m: setattr(m, "batch_first", True),
    "pruning": lambda m: torch.nn.utils.prune.random_unstructured(m, "weight_ih_l0", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(layer, change):
    torch.manual_seed(3)
    with torch.no_grad():
        before = layer(torch.ones(1, 2, 5))
        CHANGES[change](layer)
        found = flat(layer(torch.ones(1, 2, 5)))
        expected = flat(fresh(layer)(torch.ones(1, 2, 5)))
        for a, b in zip(found, expected, strict=True):
            assert_equal_bits(a, b)
        if change not in ("load_state_dict", "batch_first"):
            assert not torch.equal(found[0], before[0])


def test_other_calls_go_the_long_way(count, layer):
    x, begun = torch.randn(1, 2, 5), count()
    with torch.no_grad():
        layer(x)
        assert count() == begun + 1
        for other in (x[0], x[:, :1], torch.randn(2, 2, 5), x.expand(1, 2, 5).clone()[..., :5]):
            a, b = flat(layer(other)), flat(fresh(layer)(other))
            assert_equal_bits(a[0], b[0])
        wide = torch.randn(1, 2, 10)[..., ::2]
        assert_equal_bits(layer(wide)[0], fresh(layer)(wide)[0])
        negated = torch._neg_view(x)
        assert_equal_bits(layer(negated)[0], fresh(layer)(-x)[0])
        for bad in (x.double(), x[..., :4], x.int(), x.to("meta")):
            with pytest.raises((RuntimeError, ValueError)):
                flat(layer(bad))[0].item()
        with pytest.raises(RuntimeError):
            layer(x, (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)))
        with pytest.raises((RuntimeError, TypeError, IndexError)):
            layer(x, torch.zeros(1, 2, 7))
        strided = torch.randn(1, 7, 2).transpose(1, 2)
        assert_equal_bits(layer(x, (strided, strided))[0], fresh(layer)(x, (strided, strided))[0])
    assert layer(x)[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x)[0].dtype is torch.bfloat16


def test_threads_number_and_cleared_cache(count, layer):
    x, begun = torch.randn(1, 2, 5), count()
    with torch.no_grad():
        with threads(torch.get_num_threads() + 1):
            layer(x)
        assert count() == begun
        layer(x), layer(x), layer(x)
        before = count()
        assert before > begun
        packing.clear_packed_weights()
        layer(x)
        assert count() == before


def test_several_threads(layer):
    x = torch.randn(1, 2, 5)
    with torch.no_grad():
        expected = layer(x)[0]
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(300):
                if not torch.equal(layer(x)[0], expected):
                    wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_copies_and_pickles_have_no_memory(layer):
    x = torch.randn(1, 2, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert "_remembered" not in other.__dict__
        with torch.no_grad():
            assert_equal_bits(other(x)[0], layer(x)[0])


def test_results_are_the_callers_own(layer):
    x = torch.randn(1, 2, 5)
    with torch.no_grad():
        first, (h, _) = layer(x)
        kept = first.clone()
        layer(x + 1)
        assert_equal_bits(first, kept)
        first.zero_()
        assert not torch.equal(h, torch.zeros_like(h))
        first.resize_(5)
    with torch.inference_mode():
        assert layer(x)[0].is_inference()


def test_swapped_parameters(layer):
    x = torch.randn(1, 2, 5)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        assert layer(x.double())[0].dtype is torch.float64


def test_threads_that_come_and_go():
    """A thread's workspace goes with it; another thread may get its number."""
    layer, x = fastcell.LSTM(32, 64), torch.randn(4, 2, 32)
    with torch.no_grad():
        expected = layer(x)[0]
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(4):
                if not torch.equal(layer(x)[0], expected):
                    wrong.append(1)

    for _ in range(6):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert not wrong


def test_calls_under_autocast_are_not_remembered():
    layer, x = fastcell.LSTM(8, 16).bfloat16(), torch.randn(3, 1, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(4):
                layer(x)
        with pytest.raises(ValueError, match="dtype"):
            layer(x)


def test_calls_that_never_match_are_remembered_ever_less():
    layer, made = make("GRU"), []
    x = torch.randn(1, 2, 5)
    with torch.no_grad():
        for _ in range(40):
            layer(x)
            # So that the memory serves no call.
            layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.clone())
            made.append(layer.__dict__["_remembered"].call is not remembered.no_call)
    assert sum(made) <= 6


PRETEND = """
import ctypes, sys
import torch

class Api(ctypes.Structure):
    pass

Api._fields_ = [
    ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("earlier", ctypes.POINTER(Api)),
    ("functions", ctypes.c_void_p * 3), ("view", ctypes.c_void_p),
]
names = []

def capsule(api, name=b"dlpack_exchange_api"):
    names.append(ctypes.c_char_p(name))  # a capsule keeps no copy
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(api), names[-1], None)

first, blind, second = Api(major=1, view=1), Api(major=1), Api(major=2, view=1)
both = Api(major=2, view=1, earlier=ctypes.pointer(first))
torch.Tensor.__dlpack_c_exchange_api__ = capsule(second)

import fastcell
from fastcell import _core, remembered
"""


def test_an_exchange_api_of_another_version_is_left_alone():
    python(
        PRETEND
        + """
layer, x = fastcell.LSTM(5, 7), torch.randn(1, 2, 5)
expected = layer(x)[0]
with torch.no_grad():
    for _ in range(4):
        assert torch.equal(layer(x)[0], expected)
assert layer.__dict__["_remembered"].call is remembered.no_call
""",
        PYTHONWARNINGS="error",
    )


@pytest.mark.parametrize(
    ("api", "usable"),
    [("capsule(first)", True), ("capsule(both)", True), ("capsule(second)", False),
     ("capsule(blind)", False), ("capsule(first, b'another')", False), ("None", False)],
)  # fmt: skip
def test_which_exchange_apis_are_usable(api, usable):
    python(PRETEND + f"assert _core.has_exchange_api({api}) is {usable}")


@pytest.mark.parametrize(
    ("option", "value"),
    [("skip", 2), ("weight_dropout", 0.9), ("recurrent_dropout", 0.9), ("dropout", 0.5)],
)
def test_options_set_afterwards_are_noticed(option, value):
    layer, x, h = fastcell.RNN(3, 5, 2), torch.randn(3, 2, 3), torch.randn(2, 2, 5)

    def outcome(layer):
        torch.manual_seed(0)
        try:
            return layer(x, h)[0]
        except RuntimeError as error:
            return str(error)

    with torch.no_grad():
        for _ in range(4):
            layer(x, h)
        assert layer.__dict__["_remembered"].call is not remembered.no_call
        setattr(layer, option, value)
        found, wanted = outcome(layer), outcome(fresh(layer))
    if isinstance(wanted, str):
        assert found == wanted
    else:
        assert_equal_bits(found, wanted)


def test_a_learned_initial_state_is_served(count):
    layer, x = fastcell.GRU(5, 7), torch.randn(1, 2, 5)
    h = torch.nn.Parameter(torch.randn(1, 2, 7))
    with torch.no_grad():
        wanted = layer(x, h)[0]
        for _ in range(4):
            assert_equal_bits(layer(x, h)[0], wanted)
    assert count() > 0


def test_a_finalizer_may_make_the_same_call():
    """Wherever the garbage collector runs within one."""
    python("""
import gc, torch, fastcell
torch.set_num_threads(1)
layer, a, b = fastcell.LSTM(3, 5), torch.randn(1, 2, 3), torch.randn(1, 2, 3)

class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        layer(b)

with torch.no_grad():
    wanted = layer(a)[0].clone()
    for _ in range(4):
        layer(a)
    gc.disable(), gc.collect()
    for i in range(2000):
        Cycle()
        gc.set_threshold(1 + i % 12, 1000, 1000)
        gc.enable()
        found = layer(a)[0]
        gc.disable()
        assert torch.equal(found, wanted)
""")
