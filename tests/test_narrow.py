"""Products of 16 and 8 bits: against loops that round the same operands, and as modules.

A step's operands are rounded to few bits, its sums are float32. So one step is compared with the
same step in float64 on equally rounded operands under the policy for float32; after several steps
a rounding may fall to the other side, and what is asked then is the policy of the narrow dtype.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastcell
from fastcell import _core
from support import assert_equal_bits, threads
from tolerances import assert_close

KINDS = ["RNN", "LSTM", "GRU"]
SMALL = [torch.bfloat16, torch.int8]
SIZES = [(1, 1), (2, 3), (19, 38), (64, 64), (35, 129)]
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
]


@pytest.fixture(
    params=[True, False] if _core.dot_products() else [False], ids=lambda d: f"dots={d}"
)
def dots(request):
    """With the CPU's own dot products, and without."""
    before = _core.dot_products(request.param)
    yield request.param
    _core.dot_products(before)


def layer(kind: str, *sizes: int, **kwargs) -> torch.nn.RNNBase:
    torch.manual_seed(sum(sizes))
    return getattr(fastcell, kind)(*sizes, **kwargs).requires_grad_(False)


def states_of(kind: str, *shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for _ in range(2 if kind == "LSTM" else 1))


def given(kind: str, states: tuple[Tensor, ...]):
    return states if kind == "LSTM" else states[0]


def tensors(result) -> list[Tensor]:
    output, states = result
    return [output, *(states if isinstance(states, tuple) else (states,))]


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product of this kind sees of rows, in float64."""
    if dtype is torch.bfloat16:
        return rows.bfloat16().double()
    largest = rows.float().abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    # The kernels multiply and round in one: in float64 that product is exact.
    whole = (rows.double() * inverse.double()).round()
    return whole * (largest / 127).double()


def one_step(module: torch.nn.RNNBase, x: Tensor, states: tuple[Tensor, ...], dtype: torch.dtype):
    """One step of torch's cell in float64 on rounded operands: the new states."""
    kind = type(module).__name__
    cell = getattr(torch.nn, kind + "Cell")(*module.weight_ih_l0.shape[1:], module.hidden_size)
    cell = cell.double()
    with torch.no_grad():
        cell.weight_ih.copy_(rounded(module.weight_ih_l0, dtype))
        cell.weight_hh.copy_(rounded(module.weight_hh_l0, dtype))
        cell.bias_ih.copy_(module.bias_ih_l0)
        cell.bias_hh.copy_(module.bias_hh_l0)
        h, *c = (s.double() for s in states)
        gates = rounded(states[0], dtype)
        if kind == "RNN":
            return (cell(rounded(x, dtype), gates),)
        if kind == "LSTM":
            return cell(rounded(x, dtype), (gates, c[0]))
        # h enters a GRU twice: rounded in the product, and as it is.
        found, z = cell(rounded(x, dtype), gates), None
        pre = rounded(x, dtype) @ cell.weight_ih.T + cell.bias_ih
        pre = pre + gates @ cell.weight_hh.T + cell.bias_hh
        z = torch.sigmoid(pre.chunk(3, 1)[1])
        return (found + z * (h - gates),)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind, dtype, sizes, dots):
    module = layer(kind, *sizes)
    x = 3 * torch.randn(1, 5, sizes[0])
    states = states_of(kind, 1, 5, sizes[1])
    found = tensors(fastcell.quantize(module, dtype)(x, given(kind, states)))
    expected = one_step(module, x[0], tuple(s[0] for s in states), dtype)
    for mine, theirs in zip(found[1:], expected, strict=True):
        assert_close(mine[0], theirs, dtype=torch.float32, steps=1, length=sum(sizes), unit=3)
    assert_equal_bits(found[0][0], found[1][0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_near_the_exact_layer(kind, dtype, shape, dots):
    projected = {"proj_size": 17} if kind == "projected" else {}
    module = layer("LSTM" if projected else kind, 19, 38, **shape, **projected)
    x = torch.randn(6, 7, 19)
    small = fastcell.quantize(module, dtype)
    # 1/127 of a row's largest against bfloat16's 2^-8 of each: integers are no finer.
    for mine, exact in zip(tensors(small(x)), tensors(module(x)), strict=True):
        assert mine.dtype is torch.float32
        assert_close(mine, exact, dtype=torch.bfloat16, steps=12, length=19 + 38)
        assert not torch.equal(mine, exact)


@pytest.mark.skipif(not _core.dot_products(), reason="the CPU has no such instructions")
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_the_same_with_and_without_dot_products(kind):
    small = fastcell.quantize(layer(kind, 35, 129, num_layers=2), torch.int8)
    x = torch.randn(9, 20, 35)
    with_dots = tensors(small(x))
    try:
        _core.dot_products(False)
        without = tensors(small(x))
    finally:
        _core.dot_products(True)
    for a, b in zip(with_dots, without, strict=True):
        assert_equal_bits(a, b)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(kind, dtype, dots):
    """Threads, batch, cuts in time, packed or padded, a stream: nothing changes a bit."""
    small = fastcell.quantize(layer(kind, 35, 65, num_layers=2), dtype)
    x = torch.randn(11, 33, 35)
    with threads(1):
        whole = small(x)
    for count in (2, 3):
        with threads(count):
            for a, b in zip(tensors(whole), tensors(small(x)), strict=True):
                assert_equal_bits(a, b)
    output, states = whole
    first, between = small(x[:4])
    second, end = small(x[4:], between)
    assert_equal_bits(torch.cat([first, second]), output)
    for a, b in zip(tensors((output, states))[1:], tensors((second, end))[1:], strict=True):
        assert_equal_bits(a, b)
    assert_equal_bits(small(x[:, 5:6])[0], output[:, 5:6])
    assert_equal_bits(small(x[:, 5])[0], output[:, 5])
    lengths = torch.arange(33) % 11 + 1
    packed = small(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
    assert isinstance(packed, PackedSequence)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    for b, length in enumerate(lengths.tolist()):
        assert_equal_bits(padded[:length, b], output[:length, b])
    stream = fastcell.Stream(small, batch_size=33)
    blocks = [stream(x[a:b]).clone() for a, b in ((0, 1), (1, 6), (6, 11))]
    assert_equal_bits(torch.cat(blocks), output)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_sample(kind, dtype, value, dots):
    small = fastcell.quantize(layer(kind, 19, 38), dtype)
    x = torch.randn(4, 3, 19)
    clean = small(x)[0]
    x[2, 1, 18] = value
    output = small(x)[0]
    assert_equal_bits(output[:, [0, 2]], clean[:, [0, 2]])
    assert_equal_bits(output[:2], clean[:2])
    if dtype is torch.int8 or math.isnan(value):
        assert output[2:, 1].isnan().all()
    else:
        assert not torch.equal(output[2, 1], clean[2, 1])


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_rows_of_any_size(dtype, scale, dots):
    """No overflow or division by nothing on the way to 8 bits and back."""
    module = layer("RNN", 19, 38, nonlinearity="relu", bias=False)
    x = torch.randn(1, 5, 19)
    expected = fastcell.quantize(module, dtype)(x)[0].double() * scale
    found = fastcell.quantize(module, dtype)(x * scale)[0].double()
    tiny = 19 * 2.0**-126
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max() + tiny
    module.weight_hh_l0.zero_()
    module.weight_ih_l0[:19].zero_()
    assert (fastcell.quantize(module, dtype)(x)[0][..., :19] == 0).all()


# --- 16-bit storage -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.3333, 3.1, 2.0**-9, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_written_right(dtype, factor, dots):
    """y = relu(w x) of all 65,536 numbers: one product, rounded once."""
    module = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_ih_l0.fill_(factor)
        module.weight_hh_l0.fill_(0)
    module = fastcell.convert(module).to(dtype).requires_grad_(False)
    x = torch.from_numpy(np.arange(-32768, 32768).astype(np.int16)).view(dtype).reshape(1, -1, 1)
    found = module(x)[0]
    assert found.dtype is dtype
    product = x.float() * module.weight_ih_l0.item()
    # A weight of 0 on h keeps NaN and nothing else; subnormal products of bfloat16 may be 0.
    expected = torch.relu(product).to(dtype)
    subnormal = product.abs() < 2.0**-126
    subnormal |= (dtype is torch.bfloat16) & (x.float().abs() < 2.0**-126)
    right = (found == expected) | (found.isnan() & expected.isnan()) | (subnormal & (found == 0))
    assert right.all(), [t[~right][:5] for t in (x, found, expected)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_no_worse_than_torch(kind, dtype, shape, dots):
    """The error against float64 of outputs, states and gradients is at most that of torch.nn."""
    projected = {"proj_size": 17} if kind == "projected" else {}
    kind = "LSTM" if projected else kind
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(35, 65, **shape, **projected).to(dtype)
    x = torch.randn(14, 12, 35).to(dtype)
    errors = []
    exact = None
    for module in (
        copy.deepcopy(theirs).double(), fastcell.convert(copy.deepcopy(theirs)), theirs,
    ):  # fmt: skip
        leaf = x.to(module.weight_ih_l0.dtype).requires_grad_()
        try:
            values = tensors(module(leaf))
            gradients = torch.autograd.grad(
                sum((v.double() ** 2).sum() for v in values), [leaf, *module.parameters()]
            )
        except RuntimeError as error:  # oneDNN has no kernel for that on this CPU
            pytest.skip(f"torch.nn.{kind} in {dtype}: {error}")
        found = [t.detach().double() for t in (*values, *gradients)]
        if exact is None:
            exact = found
        errors.append(
            [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        )
    for mine, other in zip(errors[1], errors[2], strict=True):
        assert mine <= other + 2.0 ** (-9 if dtype is torch.bfloat16 else -12), (mine, other)
    assert sum(errors[1]) <= sum(errors[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_and_without_a_graph(kind, dtype):
    module = layer(kind, 19, 38, num_layers=2, dtype=dtype)
    x = torch.randn(6, 5, 19).to(dtype)
    inferred = tensors(module(x))
    module.requires_grad_(True)
    for a, b in zip(inferred, tensors(module(x)), strict=True):
        assert_equal_bits(a, b.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_weights_are_packed_once(dtype, monkeypatch):
    module = layer("GRU", 19, 38, dtype=dtype)
    x = torch.randn(6, 5, 19).to(dtype)
    packs = []
    pack = _core.Stack.pack
    monkeypatch.setattr(_core.Stack, "pack", lambda *a: (packs.append(1), pack(*a))[1])
    first = module(x)[0]
    module(x)
    assert len(packs) == 1
    module.weight_ih_l0.mul_(2)
    assert not torch.equal(module(x)[0], first)
    assert len(packs) == 2


# --- quantized modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("library", [torch.nn, fastcell])
def test_cells_are_layers_of_one_step(library, kind, dtype):
    torch.manual_seed(0)
    cell = getattr(library, kind)(19, 38).requires_grad_(False)
    module = getattr(fastcell, kind[:-4])(19, 38).requires_grad_(False)
    for name, p in cell.named_parameters():
        getattr(module, name + "_l0").copy_(p)
    small, whole = fastcell.quantize(cell, dtype), fastcell.quantize(module, dtype)
    x, states = torch.randn(5, 19), states_of(kind[:-4], 5, 38)
    found = small(x, given(kind[:-4], states))
    found = found if isinstance(found, tuple) else (found,)
    expected = tensors(whole(x[None], given(kind[:-4], tuple(s[None] for s in states))))[1:]
    for a, b in zip(found, expected, strict=True):
        assert_equal_bits(a, b[0])
    alone = small(x[2], given(kind[:-4], tuple(s[2] for s in states)))
    assert_equal_bits(alone[0] if isinstance(alone, tuple) else alone, found[0][2])


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.rnn = torch.nn.LSTM(5, 6, batch_first=True)
        self.again = self.rnn
        self.heads = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["a"](self.rnn(self.embed(x))[0])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_quantize_a_model(dtype, inplace):
    model = Tagger()
    before = copy.deepcopy(model)
    small = fastcell.quantize(model, dtype, inplace=inplace)
    assert (small is model) == inplace
    assert type(small.rnn) is fastcell.QuantizedLayer
    assert small.again is small.rnn
    assert type(small.embed) is torch.nn.Embedding
    if not inplace:
        assert type(model.rnn) is torch.nn.LSTM
        assert small.embed.weight.data_ptr() != model.embed.weight.data_ptr()
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        assert_close(small(x), before(x), dtype=torch.bfloat16, steps=3, length=11)
    stored = small.rnn.weight_ih_l0
    assert stored.dtype is dtype
    assert stored.element_size() == (1 if dtype is torch.int8 else 2)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_a_quantized_layer_is_saved_and_loaded(dtype, tmp_path):
    small = fastcell.quantize(layer("GRU", 5, 6, num_layers=2), dtype)
    x = torch.randn(3, 2, 5)
    other = fastcell.quantize(fastcell.GRU(5, 6, num_layers=2), dtype)
    other.load_state_dict(small.state_dict())
    assert_equal_bits(other(x)[0], small(x)[0])
    torch.save(small, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert_equal_bits(loaded(x)[0], small(x)[0])
    assert_equal_bits(copy.deepcopy(small)(x)[0], small(x)[0])
    assert str(dtype) in repr(small)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_16_bit_input_to_a_quantized_layer(dtype, narrow):
    small = fastcell.quantize(layer("LSTM", 5, 6), dtype)
    x = torch.randn(3, 2, 5).to(narrow)
    for mine, wide in zip(tensors(small(x)), tensors(small(x.float())), strict=True):
        assert mine.dtype is narrow
        assert_equal_bits(mine, wide.to(narrow))


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_compiled(dtype):
    small = fastcell.quantize(layer("LSTM", 5, 6, num_layers=2), dtype)
    x = torch.randn(3, 2, 5)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(tensors(compiled(x)), tensors(small(x)), strict=True):
            assert_equal_bits(a, b)


def test_what_cannot_be_is_refused():
    module = layer("LSTM", 5, 6)
    with pytest.raises(ValueError, match=r"torch\.int8 or torch\.bfloat16, got torch\.float16"):
        fastcell.quantize(module, torch.float16)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        fastcell.quantize(3)
    module.weight_hh_l0[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"2: weight_hh_l0 holds NaN or infinite values"):
        fastcell.quantize(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU(), module))
    small = fastcell.quantize(layer("LSTM", 5, 6))
    x = torch.randn(3, 2, 5)
    for bad, error, words in (
        (x.double(), ValueError, "takes float32, bfloat16 or float16"),
        (x[..., :4], RuntimeError, "Expected input with 5 features, got 4"),
        (x[:0], RuntimeError, "larger than 0"),
        (x[None], ValueError, "2D or 3D, got 4D"),
        (x.clone().requires_grad_(), RuntimeError, "a quantized layer has no gradient"),
        (x.to("meta").to(torch.int32), ValueError, "takes float32"),
    ):
        with pytest.raises(error, match=words):
            small(bad)
    with pytest.raises(RuntimeError, match=r"Expected h_0 of size \[1, 2, 6\], got \[1, 3, 6\]"):
        small(x, (torch.zeros(1, 3, 6), torch.zeros(1, 2, 6)))
    with pytest.raises(RuntimeError, match="but a state is"):
        small(x, (torch.zeros(1, 2, 6).double(), torch.zeros(1, 2, 6).double()))
    cell = fastcell.quantize(torch.nn.GRUCell(5, 6))
    for bad, states, error in (
        (x, None, ValueError),
        (x[0, :, :4], None, RuntimeError),
        (x[0], torch.zeros(3, 6), RuntimeError),
        (x[0], torch.zeros(6), ValueError),
        (x[0], torch.zeros(2, 6).half(), RuntimeError),
    ):
        with pytest.raises(error):
            cell(bad, states)


def test_what_is_left_alone_is_named():
    class Mine(torch.nn.LSTM):
        pass

    model = torch.nn.Sequential(Mine(5, 6), torch.nn.GRU(6, 6))
    with pytest.warns(UserWarning, match=r"left 1 module\(s\) alone:\n  0: Mine, left"):
        small = fastcell.quantize(model)
    assert type(small[0]) is Mine
    assert type(small[1]) is fastcell.QuantizedLayer


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_conversions_of_a_model_leave_stored_weights_alone(dtype):
    small = fastcell.quantize(layer("LSTM", 5, 6), dtype)
    x = torch.randn(3, 2, 5)
    expected = small(x)[0]
    for convert in (lambda m: m.double(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)):
        assert_equal_bits(convert(copy.deepcopy(small))(x)[0], expected)
    with pytest.raises(RuntimeError, match="on cpu, got"):
        copy.deepcopy(small).to("meta")(x)
    wrong = copy.deepcopy(small)
    wrong.load_state_dict(layer("LSTM", 5, 6).double().state_dict(), strict=False, assign=True)
    with pytest.raises(RuntimeError, match="weights for products of"):
        wrong(x)
    with pytest.raises(RuntimeError, match="weights for products of"):
        fastcell.Stream(wrong)


def test_flags_and_empty_batches():
    assert not fastcell.quantize(torch.nn.LSTM(4, 5).eval()).training
    assert fastcell.quantize(torch.nn.LSTM(4, 5)).training
    h, c = fastcell.quantize(torch.nn.LSTMCell(4, 5))(torch.zeros(0, 4))
    assert h.shape == c.shape == (0, 5)
    with pytest.raises(ValueError, match="100001 columns"):
        fastcell.quantize(torch.nn.RNN(100_001, 1))
