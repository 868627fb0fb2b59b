"""Layers of a stack at the same time: values, order of work, and when it is chosen.

On a GPU where there is one, and emulated in any case, as in test_cuda.py; emulated launches run at
once, so that the order of work is looked at apart from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastcell
from emulation_build import emulated
from fastcell import cuda
from fastcell import cuda_wavefront as wavefront
from fastcell.autograd import differentiable
from fastcell.cells import with_options
from fastcell.plan import Config, Extras
from option_cases import CHOICES, extras_for, input_for, results, tensors
from support import Case, Problem, skip_lacking

pytestmark = pytest.mark.usefixtures("poison")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LAYERS, BATCH, SIZES = 3, 17, (5, 13)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Torch's sums may have another order where there are fewer rows; these are rounded once."""

    def product(a, b):
        return (a.double() @ b.double()).to(a.dtype)

    def mm(a, b, *, out):
        return out.copy_(product(a, b))

    def addmm(c, a, b, *, out):
        return out.copy_(c.double() + a.double() @ b.double())

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(cuda, "product", lambda a, b, dtype: (a.double() @ b.double()).to(dtype))


@contextmanager
def overlapping(chunk: int) -> Iterator[list[wavefront.Wavefront]]:
    """Wherever it can be, in chunks of that many steps; what was chosen."""
    chosen = []

    def watched(*arguments: Any) -> Any:
        chosen.append(choose(*arguments))
        return chosen[-1]

    choose = wavefront.choose
    with pytest.MonkeyPatch.context() as patch, cuda.choose_wavefront(True):
        # The chunk asked for is the quickest of all.
        patch.setattr(
            wavefront, "_time", lambda _plan, _layers, _steps, n, _at_once: abs(n - chunk)
        )
        patch.setattr(wavefront, "choose", watched)
        yield chosen


def cases() -> Iterator[tuple[str, tuple[str, ...], str, int]]:
    every = ("dropout", "recurrent", "reset")
    for form in ("padded", "lengths"):
        yield "lstm", every, form, 0
        yield "gru", (), form, 0
        yield "lstm", every, form, 9
        yield "rnn_tanh", ("reset",), form, 0


def run(
    cell: str, which: tuple[str, ...], form: str, proj: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """Output, final states and gradients, then output and states of a call that keeps nothing."""
    weights, states = tensors(
        cell, layers=LAYERS, directions=1, proj=proj, sizes=SIZES, batch=BATCH, dtype=dtype,
        scale=0.125,
    )  # fmt: skip
    lengths, extras = extras_for(
        form, layers=LAYERS, directions=1, batch=BATCH, output=proj or SIZES[1], dtype=dtype
    )
    extras = Extras(
        *[None if n not in which else t.to(device) for n, t in extras._asdict().items()]
    )
    lengths = None if lengths is None else lengths.to(device)
    x, *rest = [
        t.detach().to(device).requires_grad_()
        for t in (input_for(form, BATCH, SIZES[0], dtype), *states, *weights)
    ]
    hx, w = rest[: len(states)], rest[len(states) :]
    config = Config(cell, LAYERS, False, True, False)

    def call():
        return differentiable(config, x, hx, w, lengths, extras)

    with torch.no_grad():
        output, finals, _ = cuda.forward(config, x, hx, w, lengths, extras, keep=False)
    return [*results(call, [x, *rest]), output, *finals]


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(("dtype", "chunk"), [(F32, 1), (F32, 4), (BF16, 2)])
@pytest.mark.parametrize(("cell", "which", "form", "proj"), list(cases()))
def test_same_bits_as_layer_by_layer(cell, which, form, proj, dtype, chunk, device):
    """Several tiles and blocks, in clusters; of 6 steps, so that a last chunk may be shorter."""
    skip_lacking(device, place="cluster")
    if device == "cpu":
        emulated().pretend(multiprocessors=32)
    arguments = (cell, which, form, proj, dtype, device)
    with cuda.choose_engine("cluster"):
        with cuda.choose_wavefront(False):
            expected = run(*arguments)
        with overlapping(chunk) as chosen:
            found = run(*arguments)
    assert {wave.chunk for wave in chosen} == {chunk}
    assert all(wave.plan.place == "cluster" and wave.at_once >= 2 for wave in chosen)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole_general", "gru_before"])
def test_same_bits_where_each_step_is_a_launch(cell, device):
    named = with_options(cell, CHOICES[cell]) if cell in CHOICES else cell
    which = ("dropout", "recurrent", "reset", "seed")
    with cuda.choose_engine("step"):
        with cuda.choose_wavefront(False):
            expected = run(named, which, "lengths", 0, F32, device)
        with overlapping(2) as chosen:
            found = run(named, which, "lengths", 0, F32, device)
    assert {wave.plan.place for wave in chosen} == {"step"}
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hx", [False, True])
def test_a_layer(batch_first, hx, device):
    """With torch's own products, beside the reference."""
    case = Case("lstm", F32, 3, T=11, B=5, I=6, H=20, hx=hx, batch_first=batch_first, device=device)
    problem = Problem(case)
    with overlapping(4) as chosen:
        problem.assert_close(problem.run(problem.layer(fastcell)), problem.truth())
    assert len(chosen) == 2
    assert None not in chosen


def test_gradients_that_nobody_asks_for(device):
    """No gradient of the input; of the states alone."""
    layer = fastcell.GRU(3, 20, 3, device=device)
    x, h = torch.randn(7, 4, 3, device=device), torch.randn(3, 4, 20, device=device)
    h.requires_grad_()

    def run():
        return torch.autograd.grad(layer(x, h)[1].square().sum(), [h, layer.weight_ih_l0])

    expected = run()
    with overlapping(2) as chosen:
        found = run()
    assert None not in chosen
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_run_one_after_another(device):
    """Both directions, packed rows, one layer, one step, a grid, no room for two."""
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(4, 3, 5, device=device), torch.tensor([4, 2, 1])
    )
    x = torch.randn(4, 3, 5, device=device)
    for options, given, engine in (
        ({"bidirectional": True}, x, None),
        ({}, packed, None),
        ({}, x[:1], None),
        ({}, x, "grid"),
        ({"num_layers": 1}, x, None),
    ):
        layer = fastcell.LSTM(**{"input_size": 5, "hidden_size": 20, "num_layers": 2} | options)
        with overlapping(1) as chosen, cuda.choose_engine(engine), torch.no_grad():
            layer.to(device)(given)
        assert [wave for wave in chosen if wave is not None] == []
    if device == "cpu":
        emulated().pretend(multiprocessors=1)
        with overlapping(1) as chosen, torch.no_grad():
            fastcell.LSTM(5, 20, 2)(x)
        assert chosen == [None]


# --- the order of work ----------------------------------------------------------------------------


class Recorded(wavefront.Lanes):
    """Lanes that write down what happens in them, and let nothing happen."""

    log: list[tuple[Any, ...]]

    def __init__(self, _device: torch.device, count: int) -> None:
        self.count, self.lane = count, 0

    def fork(self) -> None:
        self.log.append(("fork",))

    def join(self) -> None:
        self.log.append(("join",))

    @contextmanager
    def on(self, lane: int) -> Iterator[None]:
        assert 0 <= lane < self.count
        self.lane = lane
        yield

    def mark(self, lane: int) -> int:
        self.log.append(("mark", lane))
        return len(self.log)

    def wait(self, lane: int, mark: int) -> None:
        self.log.append(("wait", lane, mark))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    log: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Recorded, "log", log, raising=False)
    monkeypatch.setattr(wavefront, "Lanes", Recorded)
    return log


def happens_before(log: list[tuple[Any, ...]]) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """For each piece of work (layer, begin) what is done when it begins, by the lanes' rules."""
    done: dict[int, set[tuple[int, int]]] = {}  # of each lane
    marks: dict[int, set[tuple[int, int]]] = {}
    found = {}
    for at, (kind, *rest) in enumerate(log):
        if kind == "work":
            lane, layer, begin = rest
            found[layer, begin] = set(done.get(lane, ()))
            done.setdefault(lane, set()).add((layer, begin))
        elif kind == "mark":
            marks[at + 1] = set(done.get(rest[0], ()))
        elif kind == "wait":
            lane, mark = rest
            done.setdefault(lane, set()).update(marks[mark])
    return found


@pytest.mark.parametrize("at_once", [2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_a_chunk_waits_for_the_one_below_and_the_one_before(chunk, at_once, recorded):
    layers, steps = 5, 10
    wave = wavefront.Wavefront(None, at_once, chunk, 0.0)

    def work(layer: int, begin: int, end: int) -> None:
        assert end == min(begin + chunk, steps)
        recorded.append(("work", layer % at_once, layer, begin))

    wavefront.run(torch.device("cpu"), wave, layers, steps, work)
    assert (recorded[0], recorded[-1]) == (("fork",), ("join",))
    before = happens_before(recorded)
    assert before.keys() == {(layer, t) for layer in range(layers) for t in range(0, steps, chunk)}
    for (layer, begin), done in before.items():
        assert layer == 0 or (layer - 1, begin) in done
        assert begin == 0 or (layer, begin - chunk) in done
    # And for no more: a layer's first chunk does not wait for the second of the one below.
    assert (0, chunk) not in before[1, 0]


def test_lanes_are_joined_after_an_error(recorded):
    """What was forked in a capture must be; and memory that lanes still read must not go."""

    def work(layer: int, begin: int, end: int) -> None:
        if layer == 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        wavefront.run(torch.device("cpu"), wavefront.Wavefront(None, 2, 1, 0.0), 3, 5, work)
    assert recorded[-1] == ("join",)


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[None]:
    """An H100 as far as plans ask."""
    emulated().pretend(multiprocessors=132)
    yield
    emulated().pretend()


def chosen_for(
    *, T: int = 1000, B: int = 8, H: int = 256, layers: int = 4, cell: str = "lstm"
) -> wavefront.Wavefront | None:
    def plan(place: str) -> Any:
        return emulated().CudaPlan(0, cell, "bfloat16", False, T, B, H, H, 1, False, place)

    beside = []
    for place in wavefront.PLACES:
        try:
            beside.append(plan(place))
        except ValueError:
            assert place == "cluster"
    return wavefront.choose(plan(""), beside, layers, T)


@pytest.mark.usefixtures("gpu")
def test_long_narrow_stacks_overlap():
    wave = chosen_for()
    assert wave is not None
    assert wave.plan.place == "cluster"
    assert wave.at_once == 4
    assert 1 < wave.chunk < 1000
    assert wave.plan.unit_blocks * wave.plan.tiles * wave.at_once <= 132
    # Nor are more layers at once than fit.
    deep = chosen_for(layers=40)
    assert deep is not None
    assert 1 < deep.at_once < 40
    assert deep.plan.unit_blocks * deep.plan.tiles * deep.at_once <= 132


@pytest.mark.usefixtures("gpu")
def test_short_and_wide_ones_do_not():
    assert chosen_for(T=1) is None
    assert chosen_for(T=50) is None  # the host would take longer than the steps
    assert chosen_for(layers=1) is None
    assert chosen_for(H=1024) is None  # a layer fills the device
    assert chosen_for(B=2000) is None  # its samples do
    with cuda.choose_wavefront(True):
        assert chosen_for(T=50) is not None
    with cuda.choose_wavefront(False):
        assert chosen_for() is None


def test_the_model_counts_rounds(monkeypatch):
    """Steps of 1, nothing besides: as many rounds as the diagonals of layers and chunks need."""
    for name in ("_CHUNK_TIME", "_HOST_TIME", "_LAUNCH_TIME"):
        monkeypatch.setattr(wavefront, name, 0.0)
    plan = SimpleNamespace(time=8.0, place="cluster")
    assert wavefront._time(plan, 2, 8, 2, 2) == 5 * 2  # 4 chunks, 2 layers: 5 rounds
    assert wavefront._time(plan, 3, 8, 4, 2) == (1 + 1 + 1 + 1) * 4
    assert wavefront._time(plan, 4, 8, 2, 2) == (1 + 1 + 2 + 2 + 2 + 1 + 1) * 2


def test_explain_says_it(device):
    if device != "cpu":
        pytest.skip("what other GPUs hold is theirs to say")
    emulated().pretend(multiprocessors=132)
    layer, x = fastcell.LSTM(16, 256, 4, dtype=BF16), torch.zeros(1000, 8, 16, dtype=BF16)
    with torch.no_grad():
        said = fastcell.explain(layer, x).schedule
        with cuda.choose_wavefront(False):
            alone = fastcell.explain(layer, x).schedule
    assert said is not None
    assert alone is not None
    assert "4 of 4 layers at a time" in said
    assert said.startswith(alone)
