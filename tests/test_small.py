"""Small calls that come again take a shorter way: same results, and nothing goes unnoticed."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.utils.prune

import fastcell
from fastcell import _core, packing, small
from support import assert_equal_bits, python, threads

pytestmark = pytest.mark.skipif(
    small._EXCHANGE_API is None, reason="this torch has no DLPack exchange API"
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
    make_call = _core.small_call

    def observed(*arguments):
        call = make_call(*arguments)

        def run(*args):
            found = call(*args)
            taken.append(found is not None)
            return found

        return run

    monkeypatch.setattr(_core, "small_call", observed)
    return lambda: sum(taken)


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_the_same_bits_and_layout(kind, shape, given, count):
    layer = make(kind, **shape)
    dtype = layer.weight_ih_l0.dtype
    sizes = (2, 3, 5) if layer.batch_first else (3, 2, 5)
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    for i in range(5):
        x = torch.randn(sizes, dtype=dtype)
        hx = None
        if given:
            h = torch.randn(stacked, 2, layer.proj_size or 7, dtype=dtype)
            hx = (h, torch.randn(stacked, 2, 7, dtype=dtype)) if layer.mode == "LSTM" else h
        with torch.no_grad():
            found = flat(layer(x, hx))
        expected = flat(layer(x, hx))  # with gradients: the long way
        for a, b in zip(found, expected, strict=True):
            assert_equal_bits(a, b.detach())
            assert a.stride() == b.stride()
            assert not a.requires_grad
        assert count() == max(0, i - 1)


@pytest.fixture
def layer():
    layer = make("LSTM")
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(1, 2, 5))
    assert layer.__dict__["_small"].call is not small.no_call
    return layer


def fresh(layer):
    """The same layer without a memory."""
    return copy.deepcopy(layer)


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
        assert "_small" not in other.__dict__
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
            layer.weight_ih_l0.add_(0.01)  # so that the memory serves no call
            made.append(layer.__dict__["_small"].call is not small.no_call)
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
from fastcell import _core, small
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
assert layer.__dict__["_small"].call is small.no_call
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
        assert layer.__dict__["_small"].call is not small.no_call
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
