"""What only a GPU can show: streams, graphs, memory, autocast, torch.compile, other devices."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastcell
from fastcell import cuda
from support import Case, Problem, skip_lacking

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not cuda.architectures(), reason="built without CUDA kernels"),
]
PLACES = ("step", "grid", "cluster")
GPU = "cuda"


def layer_and_input(**options) -> tuple[fastcell.LSTM, torch.Tensor]:
    layer = fastcell.LSTM(16, 64, device=GPU, **options)
    return layer, torch.randn(20, 8, 16, device=GPU)


def warm_stream(run: Callable[[], object]) -> torch.cuda.Stream:
    """A stream of its own on which ``run`` has run: torch has memory and a workspace for it there.

    Asking the driver for them would wait for the device.
    """
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    return side


@pytest.mark.parametrize("place", PLACES)
def test_the_current_stream_is_used(place):
    """Work on a side stream is ordered there, and nothing waits for the host."""
    layer, x = layer_and_input()
    with cuda.choose_engine(place), torch.no_grad():
        expected = layer(x)[0]
        side = warm_stream(lambda: layer(x * 1.0))
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late = x * 1.0
            output = layer(late)[0]
            assert not side.query(), "the call waited for the device"
        side.synchronize()
        assert torch.equal(output, expected)


def training_step(layer: torch.nn.RNNBase, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, final states and the gradients of input and weights."""
    output, (h, c) = layer(x)
    loss = output.square().sum() + h.sum() + c.sum()
    return [output, h, c, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("place", PLACES)
def test_two_streams_at_once(place):
    """Both have the bits of a call alone."""
    layer, x = layer_and_input(bidirectional=True)
    inputs = [torch.randn_like(x).requires_grad_() for _ in range(2)]
    with cuda.choose_engine(place):
        expected = [training_step(layer, given) for given in inputs]
        streams = [warm_stream(lambda g=given: training_step(layer, g)) for given in inputs]
        found: list[list[list[torch.Tensor]]] = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
        for _ in range(10):
            for stream, given, into in zip(streams, inputs, found, strict=True):
                with torch.cuda.stream(stream):
                    into.append(training_step(layer, given))
        torch.cuda.synchronize()
    for right, repeated in zip(expected, found, strict=True):
        for values in repeated:
            for a, b in zip(values, right, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("place", PLACES)
def test_two_threads_at_once(place):
    """Each with a stream and a layer of its own."""
    problems = [layer_and_input(bidirectional=True) for _ in range(2)]
    problems = [(layer, x.requires_grad_()) for layer, x in problems]
    started = threading.Barrier(2)

    def work(number: int) -> list[list[torch.Tensor]]:
        layer, x = problems[number]
        with torch.cuda.stream(torch.cuda.Stream()):
            started.wait(60)
            found = [training_step(layer, x) for _ in range(10)]
            torch.cuda.current_stream().synchronize()
        return found

    with cuda.choose_engine(place):
        expected = [training_step(layer, x) for layer, x in problems]
        torch.cuda.synchronize()
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(work, range(2)))
    for right, repeated in zip(expected, found, strict=True):
        for values in repeated:
            for a, b in zip(values, right, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("place", PLACES)
def test_graph_capture_of_a_training_step(place):
    layer, x = layer_and_input(bidirectional=True)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]

    def step():
        output, (h, c) = layer(x)
        return [output, *torch.autograd.grad(output.sum() + h.sum() + c.sum(), leaves)]

    with cuda.choose_engine(place):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


def test_device_lengths_do_not_wait_for_the_device():
    layer, x = layer_and_input()
    lengths = torch.randint(1, 21, (8,), device=GPU)
    layer(x, lengths=lengths)[0].sum().backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x, lengths=lengths)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    expected, (h, _) = layer(packed)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, total_length=20)
    output, (h_n, _) = layer(x, lengths=lengths)
    torch.testing.assert_close(output, padded)
    torch.testing.assert_close(h_n, h)


@pytest.mark.parametrize(("kind", "projection"), [("LSTM", 0), ("LSTM", 24), ("GRU", 0)])
def test_layer_norm_in_a_graph_and_without_waiting(kind, projection):
    """A training step with lengths and resets on the device, beside one in float64 on the CPU."""
    options = {"layer_norm": True, "bidirectional": True}
    if projection:
        options["proj_size"] = projection
    layer = getattr(fastcell, kind)(16, 64, **options, device=GPU)
    x = torch.randn(20, 8, 16, device=GPU, requires_grad=True)
    lengths = torch.randint(1, 21, (8,), device=GPU)
    reset = torch.rand(20, 8, device=GPU) < 0.1
    leaves = [x, *layer.parameters()]

    def step():
        output, _ = layer(x, lengths=lengths, reset=reset)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        lengths.copy_(lengths.flip(0))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
    cpu = getattr(fastcell, kind)(16, 64, **options, dtype=torch.float64)
    cpu.load_state_dict(layer.state_dict())
    output, _ = cpu(x.detach().cpu().double(), lengths=lengths.cpu(), reset=reset.cpu())
    torch.testing.assert_close(captured[0].cpu().double(), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["step", "cluster"])
def test_layers_at_the_same_time(place):
    """Beside one after another; on a side stream, without waiting; in a graph."""
    layer = fastcell.LSTM(16, 64, 4, device=GPU, dropout=0.0)
    x = torch.randn(200, 8, 16, device=GPU, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def step():
        output, (h, c) = layer(x)
        return [output, *torch.autograd.grad(output.sum() + h.sum() + c.sum(), leaves)]

    def run(wave):
        with cuda.choose_engine(place), cuda.choose_wavefront(wave):
            return step()

    expected = run(False)
    first = run(True)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    side = warm_stream(lambda: run(True))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        found = run(True)
        assert not side.query(), "the call waited for the device"
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(True)
    graph.replay()
    for a, b, c in zip(found, captured, first, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.parametrize("layers", [1, 4])
def test_nothing_is_left_behind(layers):
    layer, x = layer_and_input(num_layers=layers)

    def step():
        layer.zero_grad()
        with cuda.choose_wavefront(True):
            layer(x)[0].sum().backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_the_call_after_out_of_memory_works():
    layer, x = layer_and_input()
    expected = layer(x)[0]
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_allocated()
    steps = free // (64 * 4) // 8
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.zeros(1, 1, 16, device=GPU).expand(steps, 8, 16))
    gc.collect()  # what the traceback held
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(layer(x)[0], expected)


def test_the_call_after_out_of_memory_in_a_backward_pass_works():
    """There is no room for the gradients of gates, which are as large as the gates."""
    layer, x = layer_and_input()
    x = x.repeat(50, 8, 1)  # 1000 steps, 64 samples: 64 MiB of gates
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    output, _ = layer(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gates = 1000 * 64 * 4 * 64 * 4
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gates // 4) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(output.sum(), list(layer.parameters()), retain_graph=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()  # what the traceback held
    assert torch.cuda.memory_allocated() == before
    found = torch.autograd.grad(output.sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_training_step_takes_no_more_memory_than_torchs(kind):
    """At its peak, above what lives before it; of a sequence that outweighs the weights."""
    steps, batch, size = 500, 32, 256
    x = torch.randn(steps, batch, size, device=GPU)
    peaks = []
    for library in (fastcell, torch.nn):
        layer = getattr(library, kind)(size, size, device=GPU)
        for _ in range(2):  # the first allocates workspaces and gradients
            layer(x)[0].sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x)[0].sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    ours, theirs = peaks
    assert ours <= theirs


@pytest.mark.parametrize("place", PLACES)
def test_very_long_sequences(place):
    layer = fastcell.GRU(4, 32, device=GPU)
    x = torch.randn(100_001, 2, 4, device=GPU, requires_grad=True)
    with cuda.choose_engine(place):
        output, _ = layer(x)
        output[-1].sum().backward()
    cpu = fastcell.GRU(4, 32)
    cpu.load_state_dict(layer.state_dict())
    tail = cpu(x[-2000:].detach().cpu())[0]
    torch.testing.assert_close(output[-500:].detach().cpu(), tail[-500:], rtol=1e-4, atol=1e-4)
    assert x.grad is not None
    assert x.grad[-1].any()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_gives_the_dtypes_of_torch(kind):
    x = torch.randn(*([5] if not kind.endswith("Cell") else []), 3, 8, device=GPU)
    results = []
    for library in (fastcell, torch.nn):
        torch.manual_seed(0)
        layer = getattr(library, kind)(8, 16, device=GPU)
        with torch.autocast("cuda", torch.float16):
            results.append(layer(x))

    def flat(value):
        return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]

    for ours, theirs in zip(flat(results[0]), flat(results[1]), strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


def test_torch_compile():
    layer, x = layer_and_input(num_layers=2)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x)[0])
    gradients = [
        torch.autograd.grad(run(x).sum(), list(layer.parameters()))
        for run in (compiled, lambda x: layer(x)[0])
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("place", PLACES)
def test_another_device_than_the_current_one(place):
    """Values and gradients, beside the CPU."""
    skip_lacking("cuda:1", place=place)
    problem = Problem(Case("lstm", torch.float32, 2, True, T=20, B=8, I=16, H=64, device="cuda:1"))
    with torch.cuda.device(0), cuda.choose_engine(place):
        found = problem.run(problem.layer(fastcell))
        assert torch.cuda.current_device() == 0
    assert {value.device for value in found.values()} == {torch.device("cuda:1")}
    problem.assert_close(found, problem.truth())


def test_no_warning_of_torchs_about_weights():
    layer, x = layer_and_input()
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_backward_in_eval_mode():
    layer, x = layer_and_input()
    layer.eval()
    layer(x)[0].sum().backward()
    assert layer.weight_ih_l0.grad.any()


EVERYTHING = """if True:
    import fastcell, torch
    limits = fastcell._core.cuda_limits(0)
    places = ["step", "grid", "cluster"][: 3 if limits["max_cluster"] > 1 else 2]
    dtypes = [torch.float32, torch.bfloat16 if limits["capability"] >= 80 else torch.float16]
    for place in places:
        for dtype in dtypes:
            for kind in (fastcell.LSTM, fastcell.GRU):
                layer = kind(5, 37, bidirectional=True, device="cuda", dtype=dtype)
                x = torch.randn(4, 19, 5, device="cuda", dtype=dtype)
                with fastcell.cuda.choose_engine(place):
                    layer(x)[0].sum().backward()
    for kind, more in (("LSTM", {}), ("LSTM", {"proj_size": 37}), ("GRU", {})):
        layer = getattr(fastcell, kind)(5, 300, layer_norm=True, device="cuda", **more)
        layer(torch.randn(4, 19, 5, device="cuda"))[0].sum().backward()
    torch.cuda.synchronize()
    print("ran")
"""
# One layer in every place.
LITTLE = """if True:
    import fastcell, torch
    layer = fastcell.LSTM(5, 20, device="cuda")
    x = torch.randn(3, 3, 5, device="cuda")
    clusters = fastcell._core.cuda_limits(0)["max_cluster"] > 1
    for place in ["step", "grid", "cluster"][: 3 if clusters else 2]:
        with fastcell.cuda.choose_engine(place):
            layer(x)[0].sum().backward()
    torch.cuda.synchronize()
    print("ran")
"""


def assert_sanitizer_reports_nothing(tool: str, code: str) -> None:
    """Under NVIDIA's compute-sanitizer, where it is installed and knows the device."""
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(checker):
        pytest.skip("compute-sanitizer is not installed")
    # Of all kernels, torch's too: the names of some cannot be told apart by every version. Without
    # torch's cache of memory, in which an access beside a tensor hits another one.
    environment = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    options = ["--tool", tool, "--error-exitcode", "9"]
    done = subprocess.run(
        [checker, *options, sys.executable, "-c", code],
        capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ran" in done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_compute_sanitizer_reports_nothing_of_a_small_layer(tool):
    assert_sanitizer_reports_nothing(tool, LITTLE)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_reports_nothing(tool):
    """Accesses to memory, races in shared memory, barriers."""
    assert_sanitizer_reports_nothing(tool, EVERYTHING)
