"""Streams: a layer that hears its input block by block says what it says of the whole."""

from __future__ import annotations

import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcell
from fastcell import _core

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
def test_arrays_that_come_again(batch, batch_first, monkeypatch):
    """Those take a shorter way; whatever comes between, each block gives what the whole does."""
    taken = []
    run_array = _core.Stream.run_array

    def observed(*args):
        taken.append(run_array(*args))
        return taken[-1]

    monkeypatch.setattr(_core.Stream, "run_array", observed)
    layer = fastcell.LSTM(I, H, batch_first=batch_first)
    x = torch.randn((batch, T, I) if batch_first else (T, batch, I))
    axis = int(batch_first)
    expected, _ = whole(layer, x)
    stream = fastcell.Stream(layer, batch)
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
        ("array", 4, False), ("array", 4, True), ("tensor", 4), ("array", 4, True),
        ("tensor", 2), ("array", 2, False), ("array", 4, False), ("strided", 4, True),
        ("columns", 4, False), ("array", 4, True),
    ]  # fmt: skip


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
    for module in (torch.nn.Linear(2, 3), fastcell.LSTMCell(2, 3)):
        with pytest.raises(TypeError, match="needs an RNN, LSTM or GRU"):
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
    with pytest.raises(ValueError, match="float64 now"):
        stream.reload()
    small, large = fastcell.GRU(I, 4), fastcell.GRU(I, 40)
    stream = fastcell.Stream(small)
    for mine, other in zip(small.parameters(), large.parameters(), strict=True):
        mine.data = other.data
    with pytest.raises(ValueError, match=r"states of \(4,\) .* for \(40,\)"):
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


def test_the_audio_example(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "audio_effect.py"
    command = [sys.executable, str(script), "--steps", "5", "--seconds", "0.5", "--hidden", "8"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    factor = float(said.split("real-time factor ")[1].split(",")[0])
    assert 0 < factor < 1
    assert float(said.rsplit(" ", 1)[1]) < 1e-5
