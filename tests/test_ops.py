"""The operators and the choice of a path: schemas, fake kernels, refusals, what torch sees."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastcell
from against_torch import CELLS as CELL_MODULES
from against_torch import LAYERS, same_values, states, twins
from fastcell import cpu, functional, ops
from fastcell.plan import NO_EXTRAS
from operands import CASES, Operands, operands, run_kernel, run_operator
from support import assert_equal_bits

# torch's own: its rules of forward-mode differentiation are scripted when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

sequence = torch.ops.fastcell.sequence.default
sequence_forward = torch.ops.fastcell.sequence_forward.default
sequence_backward = torch.ops.fastcell.sequence_backward.default

DROPPED = [c._replace(layers=2) for c in CASES if c.cell in ("lstm", "gru") and c.hx]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_sequence(case, requires_grad):
    opcheck(sequence, operands(case, requires_grad=requires_grad))


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_opcheck_with_dropout_masks(case):
    opcheck(sequence, operands(case, masks=True))


@pytest.mark.parametrize("case", [c for c in CASES if not c.packed], ids=str)
@pytest.mark.parametrize("lengths", [[1, 3], [0, 2]])
def test_opcheck_with_lengths(case, lengths):
    opcheck(sequence, operands(case)._replace(batch_sizes=torch.tensor(lengths)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_forward_call(case, keep):
    opcheck(sequence_forward, (*operands(case, requires_grad=False), keep))


def backward_arguments(o: Operands, needs: list[bool]):
    output, finals, reserve = sequence_forward(*o, True)
    grads = (torch.ones_like(output), [torch.ones_like(s) for s in finals])
    return (*grads, *o[:8], reserve, *o.config, needs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_backward_call(case):
    o = operands(case, requires_grad=False)
    opcheck(sequence_backward, backward_arguments(o, [i % 2 == 0 for i in range(len(o.leaves))]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_runs_the_same_kernels(case):
    o = operands(case)
    results = []
    for run in (run_kernel, run_operator):
        out = run(o)
        grads = torch.autograd.grad(sum((i + 1) * t.sum() for i, t in enumerate(out)), o.leaves)
        results.append([*out, *grads])
    for mine, theirs in zip(*results, strict=True):
        assert_equal_bits(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_missing_states_are_zeros():
    o = operands(CASES[5])
    zeros = o._replace(hx=[torch.zeros_like(h) for h in o.hx])
    for run in (run_kernel, run_operator):
        for mine, theirs in zip(run(o._replace(hx=[])), run(zeros), strict=True):
            assert_equal_bits(mine, theirs)


def test_only_what_needs_a_gradient_is_computed(monkeypatch):
    asked = []
    original = cpu.backward

    def observed(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(cpu, "backward", observed)
    layer = fastcell.LSTM(3, 4)
    layer.weight_hh_l0.requires_grad_(False)
    layer(torch.randn(2, 1, 3))[0].sum().backward()
    assert [list(needs) for needs in asked] == [[False, True, False, True, True]]


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    kept = []
    original = cpu.forward

    def observed(*args, **kwargs):
        found = original(*args, **kwargs)
        kept.append(found[2] is not None)
        return found

    monkeypatch.setattr(cpu, "forward", observed)
    layer, x = fastcell.GRU(3, 4), torch.randn(2, 1, 3)
    arguments = (
        x,
        [],
        layer._flat_weights,
        None,
        *NO_EXTRAS,
        "gru",
        1,
        False,
        True,
        False,
        "exact",
    )
    layer(x)
    sequence(*arguments)
    assert kept == [True, True]
    with torch.no_grad():
        layer(x)
        sequence(*arguments)
    layer.requires_grad_(False)
    layer.__dict__.pop("_remembered")  # a call that comes again would not be seen here
    layer(x)
    sequence(*arguments)
    assert kept == [True, True, False, False, False, False]


# --- refusals: an operator can be called by anyone ------------------------------------------------

GOOD = operands(CASES[3], requires_grad=False)
PACKED = operands(CASES[5], requires_grad=False)
WRONG = {
    "input of another rank": GOOD._replace(input=torch.zeros(2, 3).double()),
    "input of another size": GOOD._replace(input=torch.zeros(2, 3, 5).double()),
    "input of another dtype": GOOD._replace(input=GOOD.input.float()),
    "integers": GOOD._replace(input=GOOD.input.long()),
    "a narrow input": GOOD._replace(input=GOOD.input.half()),
    "a state of another size": GOOD._replace(hx=[GOOD.hx[0][:, :1], GOOD.hx[1]]),
    "one state of two": GOOD._replace(hx=GOOD.hx[:1]),
    "a state of another dtype": GOOD._replace(hx=[GOOD.hx[0].float(), GOOD.hx[1]]),
    "a weight too few": GOOD._replace(weights=GOOD.weights[:-1]),
    "no weights": GOOD._replace(weights=[]),
    "a weight of another shape": GOOD._replace(weights=[*GOOD.weights[:-1], torch.zeros(9, 9)]),
    "a weight of another dtype": GOOD._replace(
        weights=[*GOOD.weights[:-1], GOOD.weights[-1].float()]
    ),
    "masks of another shape": GOOD._replace(dropout=torch.zeros(1, 2, 2, 3).double()),
    "masks of another dtype": GOOD._replace(dropout=torch.zeros(1, 3, 2, 4)),
    "recurrent factors of another shape": GOOD._replace(recurrent=torch.zeros(2, 3).double()),
    "resets that are numbers": GOOD._replace(reset=torch.zeros(3, 2)),
    "resets of another shape": GOOD._replace(reset=torch.zeros(9, 2) > 0),
    "a narrow seed": GOOD._replace(seed=torch.zeros(1).int()),
    "two seeds": GOOD._replace(seed=torch.zeros(2).long()),
    "batch sizes that increase": PACKED._replace(batch_sizes=torch.tensor([1, 2, 1, 1])),
    "too large batch sizes": PACKED._replace(batch_sizes=torch.tensor([200, 2])),
    "negative batch sizes": PACKED._replace(batch_sizes=torch.tensor([9, -4])),
    "no batch sizes": PACKED._replace(batch_sizes=torch.tensor([], dtype=torch.int64)),
    "32-bit batch sizes": PACKED._replace(batch_sizes=PACKED.batch_sizes.int()),
    "no step": GOOD._replace(input=GOOD.input[:, :0]),
    "an unknown cell": GOOD._replace(cell="lstn"),
    "no layers": GOOD._replace(num_layers=0),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_operands_are_refused(what):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        sequence(*WRONG[what])
    assert len(str(caught.value)) > 20


def test_a_wrong_backward_call_is_refused():
    needs = [True] * len(GOOD.leaves)
    right = backward_arguments(GOOD, needs)
    sequence_backward(*right)
    reserve = right[10]
    for position, wrong in [
        (0, right[0][:, 1:]),
        (1, right[1][:1]),
        (1, [right[1][0], right[1][1].float()]),
        (10, reserve[1:]),
        (10, reserve.float()),
        (len(right) - 1, needs[:-1]),
    ]:
        arguments = list(right)
        arguments[position] = wrong
        with pytest.raises((RuntimeError, ValueError)):
            sequence_backward(*arguments)


def test_the_kernel_calls_have_no_gradient_of_their_own():
    output, *_ = sequence_forward(*operands(CASES[0]), True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        output.sum().backward()


# --- fake, meta, traced ---------------------------------------------------------------------------


def make(name, *args, **kwargs):
    layer = getattr(fastcell, name)(3, 4, *args, **kwargs)
    return layer, (5, 3) if name.endswith("Cell") else (2, 5, 3)


def layout(result):
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [layout(t) if isinstance(t, tuple) else (t.shape, t.stride(), t.dtype) for t in tensors]


@pytest.mark.parametrize("name", [*LAYERS, *CELL_MODULES])
@pytest.mark.parametrize("hx", [True, False])
def test_fake_and_meta_tensors_have_the_real_layout(name, hx):
    kwargs = {} if name.endswith("Cell") else {"batch_first": True, "bidirectional": True}
    layer, shape = make(name, **kwargs)
    state_shape = (5, 4) if name.endswith("Cell") else (2, 2, 4)

    def call(layer, device):
        x = torch.randn(shape, device=device, requires_grad=True)
        arguments = (x, states(name, *state_shape, device=device)) if hx else (x,)
        result = layer(*arguments)
        first = result if isinstance(result, torch.Tensor) else result[0]
        first.sum().backward()
        return [*layout(result), *layout([x.grad, *[p.grad for p in layer.parameters()]])]

    expected = call(layer, "cpu")
    assert call(layer.to("meta"), "meta") == expected
    with FakeTensorMode():
        assert call(make(name, **kwargs)[0], "cpu") == expected


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_kernel_calls(mode):
    layer = fastcell.LSTM(3, 4, bidirectional=True)

    def gradients(x):
        return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))

    x = torch.randn(5, 2, 3)
    graph = make_fx(gradients, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    called = [n.target for n in graph.graph.nodes if "fastcell" in str(n.target)]
    assert called == [sequence_forward, sequence_backward]
    for mine, theirs in zip(graph(x), gradients(x), strict=True):
        assert_equal_bits(mine, theirs)


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_kernel_calls():
    layer, x = fastcell.GRU(3, 4), torch.randn(2, 5, 3)
    expected = layer(x)[0]
    with Recorded() as mode:
        output = layer(x)[0]
        output.sum().backward()
    assert sequence_forward in mode.called
    assert sequence_backward in mode.called
    assert_equal_bits(output, expected)


class Labelled(torch.Tensor):
    pass


def test_a_tensor_subclass_goes_through_the_operator():
    layer, x = fastcell.GRU(3, 4), torch.randn(2, 5, 3)
    labelled = x.as_subclass(Labelled)
    assert ops.route(labelled, layer._flat_weights) == "operator"
    output = layer(labelled)[0]
    assert type(output) is Labelled
    assert_equal_bits(output.as_subclass(torch.Tensor), layer(x)[0])


@pytest.mark.parametrize("name", [*LAYERS, *CELL_MODULES])
def test_jit_trace(name, tmp_path):
    layer, shape = make(name)
    x = torch.randn(shape)
    with warnings.catch_warnings():  # of every comparison of sizes, and of torch.jit's age
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
        traced.save(tmp_path / "layer.pt")
        loaded = torch.jit.load(tmp_path / "layer.pt")
    other = torch.randn(shape[0] + 2, *shape[1:])
    with torch.no_grad():
        same_values(loaded(other), layer(other))


def test_default_device_and_function_modes_change_nothing():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    layer, x = fastcell.LSTM(3, 4, num_layers=2), torch.randn(2, 5, 3)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    expected = layer(x)[0], layer(packed)[0].data
    for context in (torch.device("meta"), Mode()):
        with context:
            # New tensors of a version of their own: packed anew in here.
            fastcell.packing.clear_packed_weights()
            found = layer(x)[0], layer(packed)[0].data
            found[0].sum().backward()
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal_bits(mine, theirs)


# --- which path -----------------------------------------------------------------------------------


def test_routes():
    weights, x = fastcell.LSTM(3, 4)._flat_weights, torch.randn(2, 5, 3)
    seen = []

    def look(x, *rest):
        seen.append(ops.route(x, weights))
        return x.sum()

    look(x)
    look(x.to("meta"))
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.vmap(torch.func.grad(look))(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.grad(torch.func.grad(lambda x: look(x) ** 3))(x[0, 0, 0])
    with forward_ad.dual_level():
        look(x)
    assert seen == ["kernel", *["operator"] * 5, *["composite"] * 3]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, and computes with the one it wraps."""

    @staticmethod
    def __new__(cls, wrapped):
        return torch.Tensor._make_wrapper_subclass(
            cls, wrapped.shape, dtype=wrapped.dtype, device="lazy"
        )

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(t):
            return t.wrapped if isinstance(t, cls) else t

        def wrap(t):
            return cls(t) if isinstance(t, torch.Tensor) else t

        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "device"}
        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_device_without_kernels_runs_composite_and_says_so_once(cell):
    ops._warned.clear()
    run = getattr(functional, cell)
    layer = getattr(fastcell, cell.upper())(3, 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    weights = [Elsewhere(w.detach()).requires_grad_() for w in layer._flat_weights]
    with pytest.warns(UserWarning, match="no kernels for device type 'lazy'") as caught:
        run(Elsewhere(x), None, weights, bidirectional=True)
        output, _ = run(Elsewhere(x), None, weights, bidirectional=True)
    assert len(caught) == 1
    assert output.device.type == "lazy"
    expected, _ = layer(x)
    same_values(output.wrapped, expected.detach())
    output.sum().backward()
    expected.sum().backward()
    for w, p in zip(weights, layer.parameters(), strict=True):
        same_values(w.grad.wrapped, p.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dtype_without_kernels_runs_composite_and_says_so_once(name):
    ops._warned.clear()
    with warnings.catch_warnings():  # torch's, of complex modules as such
        warnings.filterwarnings("ignore", "Complex modules are a new feature")
        ours, theirs = twins(name, 3, 4, num_layers=2, dtype=torch.complex128)
    x = torch.randn(5, 2, 3, dtype=torch.complex128)
    with pytest.warns(UserWarning, match="no kernels for dtype torch.complex128") as caught:
        mine = ours(x)[0]
        ours(x)
    assert len(caught) == 1
    torch.testing.assert_close(mine, theirs(x)[0])
