"""Streams: a layer that hears its input block by block says what it says of the whole."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcell
from tolerances import tolerance

I, H, T = 5, 19, 40  # noqa: E741
LAYERS = {
    "RNN": lambda **k: fastcell.RNN(I, H, **k),
    "RNN relu": lambda **k: fastcell.RNN(I, H, nonlinearity="relu", **k),
    "LSTM": lambda **k: fastcell.LSTM(I, H, **k),
    "LSTM projected": lambda **k: fastcell.LSTM(I, H, proj_size=7, **k),
    "GRU": lambda **k: fastcell.GRU(I, H, **k),
    "GRU of two layers": lambda **k: fastcell.GRU(I, H, num_layers=2, dropout=0.5, **k),
    "LSTM without bias": lambda **k: fastcell.LSTM(I, H, bias=False, **k),
    "torch.nn.GRU": lambda **k: torch.nn.GRU(I, H, **k),
}


def blocks(total, generator):
    at = 0
    while at < total:
        size = int(torch.randint(1, 12, (), generator=generator))
        yield at, min(at + size, total)
        at += size


def whole(layer, x, hx=None):
    ours = fastcell.convert(layer) if type(layer).__module__.startswith("torch") else layer
    ours.eval()
    with torch.no_grad():
        output, state = ours(x, hx)
    return output, state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_any_blocks_give_the_bits_of_the_whole(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=dtype)
    x = torch.randn(T, 3, I, dtype=dtype)
    stream = fastcell.Stream(layer, batch_size=3)
    expected, final = whole(layer, x)
    for numpy in (False, True):
        stream.reset()
        heard = [
            torch.as_tensor(stream(x[a:b].numpy() if numpy else x[a:b])).clone()
            for a, b in blocks(T, torch.Generator().manual_seed(int(numpy)))
        ]
        assert torch.equal(torch.cat(heard), expected)
        for mine, theirs in zip(stream.state, final, strict=True):
            assert torch.equal(mine, theirs)


def test_kinds_and_shapes_of_blocks():
    layer = fastcell.GRU(I, H, batch_first=True)
    x = torch.randn(1, T, I)
    expected, _ = whole(layer, x)
    stream = fastcell.Stream(layer)
    for form in (
        x,
        x.numpy(),
        x[0],
        x[0].numpy(),
        x.mT.contiguous().mT,
        x.numpy()[..., ::-1][..., ::-1],
    ):
        stream.reset()
        heard = stream(form)
        assert type(heard) is type(form)
        assert heard.shape == (*form.shape[:-1], H)
        assert torch.equal(torch.as_tensor(heard).reshape(expected.shape), expected)
    stream.reset()
    for t in range(T):
        assert torch.equal(stream(x[0, t]), expected[0, t])
        assert stream(x.numpy()[0, t]).shape == (H,)
        stream.reset([s[:, :] for s in whole(layer, x[:, : t + 1])[1]])


BLOCKS = [
    ("array", 4), ("array", 4), ("tensor", 4), ("array", 4), ("tensor", 2), ("array", 2),
    ("array", 4), ("strided", 4), ("columns", 4), ("array", 4),
]  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_arrays_that_come_again(batch, batch_first):
    """Those take a shorter way; whatever comes between, each block gives what the whole does."""
    taken = []
    layer = fastcell.LSTM(I, H, batch_first=batch_first)
    x = torch.randn((batch, T, I) if batch_first else (T, batch, I))
    axis = int(batch_first)
    expected, _ = whole(layer, x)
    stream = fastcell.Stream(layer, batch)
    again = stream._again

    def observed(block):
        heard = again(block)
        taken.append(heard is not None)
        return heard

    stream._again = observed
    at, ways = 0, []
    for kind, size in BLOCKS:
        block = x.narrow(axis, at, size)
        if kind != "tensor":
            block = block.numpy()
        if kind == "strided":
            block = np.repeat(block, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
        if kind == "columns":
            block = np.asfortranarray(block)
        taken.clear()
        heard = stream(block)
        assert type(heard) is type(block)
        assert torch.equal(torch.as_tensor(heard), expected.narrow(axis, at, size))
        ways.append((kind, size, *taken))
        at += size
    assert ways == [
        ("array", 4, False), ("array", 4, True), ("tensor", 4, False), ("array", 4, True),
        ("tensor", 2, False), ("array", 2, False), ("array", 4, False), ("strided", 4, True),
        ("columns", 4, False), ("array", 4, True),
    ]  # fmt: skip


def test_columns_of_one_feature_come_again():
    """x[a:b, None] has a stride there that means nothing: it is no reason to copy or look up."""
    layer = fastcell.GRU(1, H)
    x = torch.randn(12, 1)
    expected, _ = whole(layer, x[:, None])
    stream = fastcell.Stream(layer)
    samples = x[:, 0].numpy()
    for start in (0, 4, 8):
        again = stream._again(samples[start : start + 4, None])
        assert (again is not None) == (start > 0)
        heard = again if start else stream(samples[start : start + 4, None])
        assert torch.equal(torch.as_tensor(heard), expected[start : start + 4, 0])


def test_arrays_with_a_dtype_of_their_own_come_again():
    """As those that were pickled have, on their way from another process."""
    stream = fastcell.Stream(fastcell.LSTM(I, H))
    x = np.ones((2, I), np.float32)
    stream(x)
    other = pickle.loads(pickle.dumps(x))
    assert other.dtype is not x.dtype
    assert stream._again(other) is not None
    assert stream._again(x.astype(">f4")) is None


def test_what_runs_arrays_keeps_the_memory():
    layer = fastcell.LSTM(I, H)
    x = torch.randn(6, I)
    expected, _ = whole(layer, x[:, None])
    stream = fastcell.Stream(layer)
    stream(x[:3].numpy())
    again = stream._again
    del stream
    torch.full((1 << 16,), torch.nan)  # what was freed would be this
    assert torch.equal(torch.as_tensor(again(x[3:].numpy())), expected[3:, 0])


def test_arrays_that_come_again_are_still_checked():
    stream = fastcell.Stream(fastcell.GRU(I, H))
    x = np.ones((2, I), np.float32)
    for _ in range(3):
        stream(x)
    before = stream.state[0]
    for bad in (
        x.astype(np.float64), x.astype(">f4"), x[:, 1:], x.astype(np.int32), x[None].repeat(2, 1),
        np.ones((2, 2, 2, I), np.float32), x.view(np.int32), x[:0], np.float32(1) + np.zeros(()),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            stream(bad)
    with pytest.raises(TypeError):
        stream(np.ma.masked_array(x))
    assert torch.equal(stream.state[0], before)
    stream.reload()
    assert stream(x).shape == (2, H)


def test_state_goes_in_and_out():
    layer = fastcell.LSTM(I, H)
    x = torch.randn(T, 2, I)
    hx = torch.randn(1, 2, H), torch.randn(1, 2, H)
    stream = fastcell.Stream(layer, 2)
    assert [s.abs().max().item() for s in stream.state] == [0, 0]
    stream.reset(hx)
    expected, final = whole(layer, x, hx)
    assert torch.equal(stream(x), expected)
    kept = stream.state
    stream(x)
    assert torch.equal(kept[1], final[1])
    assert not torch.equal(stream.state[1], kept[1])
    stream.reset()
    assert [s.abs().max().item() for s in stream.state] == [0, 0]


def test_weights_are_taken_when_asked():
    layer = fastcell.GRU(I, H)
    x = torch.randn(T, 1, I)
    stream = fastcell.Stream(layer)
    before = stream(x).clone()
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    stream.reset()
    assert torch.equal(stream(x), before)
    stream.reload()
    stream.reset()
    assert torch.equal(stream(x), whole(layer, x)[0])
    assert not torch.equal(stream(x), before)


def test_parametrized_weights():
    layer = torch.nn.utils.parametrizations.weight_norm(fastcell.GRU(I, H), "weight_hh_l0")
    x = torch.randn(T, 1, I)
    assert torch.equal(fastcell.Stream(layer)(x), whole(layer, x)[0])


def test_nothing_is_allocated_and_no_graph_is_built():
    layer = fastcell.LSTM(I, H)
    stream = fastcell.Stream(layer)
    x = torch.randn(8, 1, I, requires_grad=True)
    y = stream(x)
    assert not y.requires_grad
    address = y.data_ptr()
    for _ in range(10):
        assert stream(x) is y
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(500):
        stream(x)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert stream(x).data_ptr() == address
    assert after - before < 2000


def test_made_under_inference_mode():
    layer = fastcell.GRU(I, H)
    with torch.inference_mode():
        stream = fastcell.Stream(layer)
    stream.reset()
    x = torch.randn(T, 1, I)
    assert torch.equal(stream(x), whole(layer, x)[0])


def test_streams_in_threads():
    layer = fastcell.LSTM(I, 64)
    x = torch.randn(400, 1, I)
    expected, _ = whole(layer, x)
    wrong = []

    def hear():
        stream = fastcell.Stream(layer)
        for _ in range(3):
            stream.reset()
            heard = torch.cat([stream(x[t : t + 4]).clone() for t in range(0, 400, 4)])
            if not torch.equal(heard, expected):
                wrong.append(heard)

    threads = [threading.Thread(target=hear) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("block", "error", "text"),
    [
        (torch.zeros(4, 2, I), ValueError, r"\(T, 1, 5\), \(T, 5\) or \(5,\) .* got \(4, 2, 5\)"),
        (torch.zeros(4, 1, I + 1), ValueError, "got"),
        (torch.zeros(0, 1, I), ValueError, "T >= 1"),
        (torch.zeros(4, 1, 1, I), ValueError, "got"),
        (torch.zeros(()), ValueError, "got"),
        (torch.zeros(4, I, dtype=torch.float64), TypeError, "torch.float32 .* torch.float64"),
        (np.zeros((4, I)), TypeError, "float32.* float64"),
        (torch.zeros(4, I, device="meta"), TypeError, "meta"),
        ([0.0] * I, TypeError, "list"),
    ],
)
def test_bad_blocks(block, error, text):
    stream = fastcell.Stream(fastcell.RNN(I, H))
    x = torch.randn(3, I)
    stream(x)
    kept = stream.state
    with pytest.raises(error, match=text):
        stream(block)
    assert torch.equal(stream.state[0], kept[0])


def test_bad_layers_and_states():
    for module, name in (
        (torch.nn.Linear(2, 3), "needs an RNN, LSTM or GRU layer, got Linear"),
        ([], "needs an RNN, LSTM or GRU layer, got list"),
        (fastcell.LSTMCell(2, 3), "takes RNN, LSTM, GRU and Linear .* got LSTMCell"),
        ([fastcell.GRU(2, 3), torch.nn.GELU()], "got GELU"),
        ([fastcell.GRU(2, 3), torch.nn.ELU(2.0)], "got ELU.alpha=2.0"),
        ([fastcell.GRU(2, 3), torch.tanh], "got builtin"),
    ):
        with pytest.raises(TypeError, match=name):
            fastcell.Stream(module)
    with pytest.raises(ValueError, match="bidirectional"):
        fastcell.Stream(fastcell.GRU(I, H, bidirectional=True))
    with pytest.raises(ValueError, match="bfloat16"):
        fastcell.Stream(fastcell.GRU(I, H, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="meta"):
        fastcell.Stream(fastcell.GRU(I, H, device="meta"))
    layer = fastcell.GRU(I, H)
    stream = fastcell.Stream(layer)
    for hx in (
        torch.zeros(1, 2, H),
        torch.zeros(1, 1, H, dtype=torch.float64),
        [torch.zeros(1, 1, H)] * 2,
    ):
        with pytest.raises(ValueError, match="state must be"):
            stream.reset(hx)
    layer.double()
    with pytest.raises(ValueError, match="float32, these are torch.float64"):
        stream.reload()
    small, large = fastcell.GRU(I, 4), fastcell.GRU(I, 40)
    stream = fastcell.Stream(small)
    for mine, other in zip(small.parameters(), large.parameters(), strict=True):
        mine.data = other.data
    with pytest.raises(ValueError, match=r"states of \(4,\), .* for \(40,\) now"):
        stream.reload()
    for wrong in ((None,), "a", [None, None]):
        with pytest.raises(ValueError, match="state must be"):
            stream.reset(wrong)
    for number in (2.0, True, 0, "1"):
        with pytest.raises(ValueError, match="batch_size must be a positive integer"):
            fastcell.Stream(layer, number)
    with pytest.raises(TypeError, match="MaskedArray"):
        stream(np.ma.masked_array(np.zeros((2, I), np.float32)))
    assert "GRU(5, 4)" in repr(stream)


class Chain(torch.nn.Module):
    """Modules one after the other, over a whole sequence."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def linear(*sizes, **kwargs):
    return torch.nn.Linear(*sizes, **kwargs)


CHAINS = {
    "a head": lambda **k: [fastcell.LSTM(I, H, **k), linear(H, 1, **k)],
    "wide head": lambda **k: [torch.nn.GRU(I, H, **k), linear(H, 70, bias=False, **k)],
    "both sides": lambda **k: [
        linear(I, 9, **k), torch.nn.Tanh(), fastcell.GRU(9, H, **k), linear(H, 7, **k),
        torch.nn.ReLU(), torch.nn.Dropout(0.5), linear(7, 3, **k), torch.nn.Sigmoid(),
    ],
    "several layers": lambda **k: [
        torch.nn.ELU(), fastcell.RNN(I, H, **k), torch.nn.Softsign(), torch.nn.Identity(),
        fastcell.LSTM(H, 33, 2, proj_size=6, **k), torch.nn.Tanh(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, dtype, batch):
    torch.manual_seed(0)
    parts = CHAINS[name](dtype=dtype)
    x = torch.randn(T, batch, I, dtype=dtype)
    stream = fastcell.Stream(torch.nn.Sequential(*parts), batch)
    whole_stream = fastcell.Stream(parts, batch)
    at_once = whole_stream(x).clone()
    fastcell.convert(model := Chain(*parts).eval())
    with torch.no_grad():
        expected = model(x)
    assert at_once.shape == expected.shape
    scale = expected.abs().max()
    assert (at_once - expected).abs().max() <= tolerance(dtype, T, 70) * scale
    for numpy in (False, True):
        stream.reset()
        heard = [
            torch.as_tensor(stream(x[a:b].numpy() if numpy else x[a:b])).clone()
            for a, b in blocks(T, torch.Generator().manual_seed(int(numpy)))
        ]
        assert torch.equal(torch.cat(heard), at_once)


def test_a_chain_from_views_of_a_larger_block():
    parts = [torch.nn.Tanh(), linear(I, 4), fastcell.GRU(4, H, batch_first=True), linear(H, 2)]
    wide = torch.randn(3, 2 * T, 2 * I)
    x = wide[:, ::2, :I]
    stream = fastcell.Stream(parts, 3)
    found = stream(x).clone()
    stream.reset()
    assert found.shape == (3, T, 2)
    assert torch.equal(stream(x.contiguous()), found)
    stream.reset()
    assert np.array_equal(stream(x.numpy()), found.numpy())


def test_large_linear_layers_take_all_threads():
    parts = [fastcell.GRU(8, 300), linear(300, 500)]
    x = torch.randn(70, 2, 8)
    one, two = (fastcell.Stream(parts, 2, threads=n) for n in (1, 2))
    assert torch.equal(one(x), two(x))


def test_states_of_a_chain():
    gru, lstm = fastcell.GRU(I, H), fastcell.LSTM(H, 7)
    stream = fastcell.Stream([gru, torch.nn.Tanh(), lstm, linear(7, 1)])
    x = torch.randn(T, 1, I)
    first = stream(x).clone()
    (h,), (h2, c2) = stream.state
    assert h.shape == (1, 1, H)
    assert c2.shape == (1, 1, 7)
    second = stream(x).clone()
    assert not torch.equal(first, second)
    stream.reset([h, (h2, c2)])
    assert torch.equal(stream(x), second)
    stream.reset([None, (h2, c2)])
    assert not torch.equal(stream(x), second)
    stream.reset()
    assert torch.equal(stream(x), first)
    with pytest.raises(ValueError, match="expected 2 layers' states, got 1"):
        stream.reset([h])
    with pytest.raises(ValueError, match="state must be"):
        stream.reset([h, h])


def test_weights_of_a_chain_are_taken_all_or_none():
    gru, head = fastcell.GRU(I, H), linear(H, 2)
    stream = fastcell.Stream([gru, head])
    x = torch.randn(T, 1, I)
    before = stream(x).clone()
    with torch.no_grad():
        gru.weight_ih_l0.mul_(2)
        head.weight.mul_(3)
    kept, head.weight = head.weight, torch.nn.Parameter(torch.randn(2, H + 1))
    with pytest.raises(ValueError, match=r"made for a weight of \(2, 19\), it is \(2, 20\)"):
        stream.reload()
    stream.reset()
    assert torch.equal(stream(x), before)
    head.weight = kept
    stream.reload()
    stream.reset()
    assert not torch.equal(stream(x), before)


def test_chains_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Linear.* takes 3 features, but GRU.* gives 19"):
        fastcell.Stream([fastcell.GRU(I, H), linear(3, 1)])
    with pytest.raises(ValueError, match="other weights are torch.float32, these are torch.float6"):
        fastcell.Stream([fastcell.GRU(I, H), linear(H, 1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="bfloat16"):
        fastcell.Stream([fastcell.GRU(I, H), linear(H, 1, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="the same batch_first"):
        fastcell.Stream([fastcell.GRU(I, H, batch_first=True), fastcell.GRU(H, 2)])


def test_quantized_layers_in_a_chain():
    lstm, head = fastcell.LSTM(I, H), linear(H, 1)
    small = fastcell.quantize(lstm, torch.int8)
    x = torch.randn(T, 1, I)
    found = fastcell.Stream([small, head])(x)
    with torch.no_grad():
        expected = head(small(x)[0])
    assert (found - expected).abs().max() <= tolerance(torch.float32, T, H)


def test_the_audio_example(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "audio_effect.py"
    command = [sys.executable, str(script), "--steps", "5", "--seconds", "0.5", "--hidden", "8"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    factor = float(said.split("real-time factor ")[1].split(",")[0])
    assert 0 < factor < 1
    assert float(said.rsplit(" ", 1)[1]) < 1e-5
