"""The kernels in a process: threads, fork, OpenMP, the GIL, memory, the cache of packed weights."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastcell
from fastcell import packing
from support import CELLS, Case, Problem, assert_same_bits, python, threads

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Large enough to be shared out among threads.
CASES = [Case(cell, layers=2, T=15, B=6, I=64, H=96) for cell in CELLS]


# --- Python threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_python_threads(count):
    """Each with layers of its own and with one that all share; forward and backward."""
    shared = Problem(CASES[2])
    layer = shared.layer(fastcell)
    expected = [problem.run(problem.layer(fastcell)) for problem in map(Problem, CASES)]
    with torch.no_grad():
        same = shared.call(layer, shared.inputs())

    def work(index: int) -> None:
        torch.set_num_threads(count)
        for k in range(6):
            mine = (index + k) % len(CASES)
            problem = Problem(CASES[mine])
            assert_same_bits(problem.run(problem.layer(fastcell)), expected[mine])
            with torch.no_grad():
                assert_same_bits(shared.call(layer, shared.inputs()), same)

    with threads(count), ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, index) for index in range(4)]:
            future.result(timeout=100)


def test_layers_come_and_go_in_several_threads():
    """The cache of packed weights under contention: filled, found and emptied at once."""
    stop = time.monotonic() + 1.5

    def work(index: int) -> int:
        calls = 0
        while time.monotonic() < stop:
            layer = fastcell.GRU(3, 4, num_layers=2)
            x = torch.ones(2, 1, 3)
            with torch.no_grad():
                first, _ = layer(x)
                again, _ = layer(x)
                assert torch.equal(first, again)
                layer.weight_hh_l0.add_(1)
                other, _ = layer(x)
                assert not torch.equal(first, other)
            calls += 1
            if calls % 50 == 0:
                packing.clear_packed_weights()
        return calls

    with ThreadPoolExecutor(6) as pool:
        assert all(n > 10 for n in pool.map(work, range(6)))


def test_the_gil_is_released():
    """While one thread is inside of a kernel, another runs Python."""
    layer = fastcell.LSTM(256, 256)
    x = torch.zeros(400, 16, 256)
    busy, done, progress = threading.Event(), threading.Event(), []

    def work() -> None:
        with torch.no_grad():
            layer(x[:1])
            busy.set()
            layer(x)
            done.set()

    with threads(1):
        worker = threading.Thread(target=work)
        worker.start()
        busy.wait(10)
        before = time.perf_counter()
        while not done.is_set():
            progress.append(time.perf_counter())
        worker.join()
    took = progress[-1] - before
    assert took > 0.02, "the call was too short to tell"
    # Python gives a thread that wants the GIL its turn every 5 ms; a kernel that held it would
    # leave one gap as long as the call.
    moments = [before, *progress]
    gap = max(b - a for a, b in itertools.pairwise(moments))
    assert gap < took / 2, f"no Python for {gap:.3f} s of {took:.3f} s"


# --- OpenMP ---------------------------------------------------------------------------------------


@linux
def test_one_openmp_runtime():
    code = """
import torch, fastcell
fastcell.LSTM(128, 128)(torch.zeros(50, 4, 128))
torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
files = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(*files)
"""
    files = python(code).stdout.split()
    assert len(files) == 1, files
    assert "gomp" in files[0]


@linux
def test_the_number_of_threads_is_torchs():
    """Counted: threads that exist, and threads that used the CPU during the calls."""
    code = """
import os, time, torch, fastcell
def spent():
    found = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
        found[task] = int(fields[11]) + int(fields[12])
    return found
layer, x = fastcell.GRU(128, 192), torch.zeros(100, 8, 128)
for count in (1, 2, 3):
    torch.set_num_threads(count)
    layer(x)[0].sum().backward()
    before, stop = spent(), time.monotonic() + 0.7
    while time.monotonic() < stop:
        layer(x)[0].sum().backward()
    print(sum(ticks - before.get(task, 0) >= 3 for task, ticks in spent().items()))
"""
    assert python(code, OMP_NUM_THREADS="4").stdout.split() == ["1", "2", "3"]


@linux
def test_threads_of_ended_python_threads_go():
    """OpenMP keeps a team for each thread that calls; it must not outlive that thread."""
    code = """
import os, threading, time, torch, fastcell
torch.set_num_threads(2)
layer, x = fastcell.LSTM(64, 96), torch.zeros(20, 6, 64)
def count():
    return len(os.listdir("/proc/self/task"))
def work():
    torch.set_num_threads(2)
    with torch.no_grad():
        layer(x)
work()
before = count()
for _ in range(12):
    thread = threading.Thread(target=work)
    thread.start(); thread.join()
stop = time.monotonic() + 20  # join() returns while the system still takes the threads down
while count() > before and time.monotonic() < stop:
    time.sleep(0.01)
print(before, count())
"""
    before, after = map(int, python(code).stdout.split())
    assert after <= before


@linux
def test_two_threads_on_one_core_are_slow_and_not_stuck():
    """Each waits for the other while it holds the core: after a few calls, no more barriers."""
    code = """
import os, statistics, time, torch, fastcell
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
layer, x = fastcell.LSTM(256, 256), torch.zeros(100, 1, 256)
for count in (2, 1):
    torch.set_num_threads(count)
    times = []
    with torch.no_grad():
        for _ in range(60):
            begin = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - begin)
    print(statistics.median(times))
"""
    two, one = map(float, python(code).stdout.split())
    assert two < 2 * one


# --- fork -----------------------------------------------------------------------------------------


def forked(conn, number_of_threads: int, problem: Problem, layer: torch.nn.RNNBase) -> None:
    torch.set_num_threads(number_of_threads)
    conn.send({name: value.numpy() for name, value in problem.run(layer).items()})
    conn.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("before", [1, 2])
def test_in_a_child_after_fork(before):
    """The parent's team of threads does not exist in the child: it must not be waited for.

    The layer is the parent's: torch's own large operations do hang there (with several threads).
    """
    problem = Problem(CASES[2])
    layer = problem.layer(fastcell)
    with threads(before):
        expected = problem.run(problem.layer(fastcell))
        context = multiprocessing.get_context("fork")
        for count in (1, 2):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=forked, args=(theirs, count, problem, layer))
            child.start()
            theirs.close()
            try:
                assert ours.poll(60), "the child hangs"
                found = {name: torch.from_numpy(v) for name, v in ours.recv().items()}
            finally:
                child.join(5)
                child.kill()
            assert_same_bits(found, expected)
        # And the parent goes on.
        assert_same_bits(problem.run(problem.layer(fastcell)), expected)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_data_loader_workers():
    """Forked workers that run a layer, as data loaders do."""
    code = """
import torch, fastcell
layer = fastcell.GRU(64, 96)
torch.set_num_threads(2)
expected = layer(torch.ones(20, 6, 64))[0].detach()
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        with torch.no_grad():
            return layer(torch.ones(20, 6, 64))[0]
for batch in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=2):
    assert torch.equal(batch[0], expected) and torch.equal(batch[1], expected)
print("right")
"""
    assert python(code, timeout=60).stdout.strip() == "right"


# --- memory ---------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("mode", ["training", "inference", "new layers"])
def test_memory_does_not_grow(mode):
    """Resident memory over 1,000 calls, after a warm-up of 200."""
    code = """
import sys, torch, fastcell
from torch.nn.utils.rnn import pack_padded_sequence
mode = sys.argv[1]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4
layer = fastcell.LSTM(32, 48, 2, bidirectional=True, proj_size=24)
x = torch.ones(12, 6, 32)
lengths = torch.tensor([12, 11, 9, 9, 3, 1])
def call(k):
    global layer
    torch.set_num_threads(1 + (k % 20 == 0))
    if mode == "new layers":
        layer = fastcell.GRU(32, 48 + k % 5)
    inputs = pack_padded_sequence(x, lengths) if k % 2 else x
    if mode == "inference":
        with torch.no_grad():
            layer(inputs)
    else:
        output, _ = layer(inputs)
        (output.data if k % 2 else output).sum().backward()
        layer.zero_grad()
for k in range(200):
    call(k)
before = resident()
for k in range(1000):
    call(k)
print(resident() - before)
"""
    grown = int(python(code, mode).stdout)
    # A leak of one output, 12 x 6 x 48 floats, would be 13,500 KiB.
    assert grown < 4000, f"{grown} KiB more after 1,000 calls"


def test_a_graph_frees_what_it_kept():
    layer = fastcell.GRU(3, 4)
    x = torch.ones(5, 2, 3, requires_grad=True)
    output, state = layer(x)
    kept = weakref.ref(output.grad_fn)
    output.sum().backward()
    del output, state
    gc.collect()
    assert kept() is None


# --- the cache of packed weights ------------------------------------------------------------------


@pytest.fixture
def cache():
    packing.clear_packed_weights()
    yield packing._entries
    packing.clear_packed_weights()


def stack_of(kind):
    """Too large for a fingerprint of all elements: a change of one must be seen by its version."""
    return kind(3, 40, num_layers=2)


def fresh(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer with copies of these weights gives."""
    twin = stack_of(type(layer))
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        return twin(x)[0]


@pytest.mark.parametrize(
    ("sizes", "rows"), [((5, 10), (2, 3)), ((64, 64), (1, 1)), ((100, 90), (64, 64))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_elements_written_behind_the_version_counter(cache, sizes, rows, dtype):
    """As gradcheck writes them; all are noticed in small layers, and by large calls."""
    layer = fastcell.RNN(*sizes, dtype=dtype)
    x = torch.randn(*rows, sizes[0], dtype=dtype)
    with torch.no_grad():
        last = layer(x)[0]
        for w in layer.parameters():
            for i in range(0, w.numel(), max(1, w.numel() // 37)):
                w.data.view(-1)[i] += 0.25
                now = layer(x)[0]
                # Of h_{t-1} = 0 nothing is seen in a single step.
                assert not torch.equal(now, last) or (rows[0] == 1 and w is layer.weight_hh_l0)
                last = now


@pytest.mark.parametrize("sizes", [(64, 64), (16, 16), (64, 200), (33, 77)])
@pytest.mark.parametrize("rows", [(3, 2), (100, 8)])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.neg_(),
        lambda w: w.mul_(2),
        lambda w: w.mul_(0.5),
        lambda w: w.numpy().__imul__(-1),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.copy_(w.flip(-1)),
        lambda w: w.zero_(),
    ],
    ids=["neg", "double", "halve", "numpy", "rows in reverse", "columns in reverse", "zero"],
)
def test_whole_tensors_written_behind_the_version_counter(cache, sizes, rows, write):
    layer = fastcell.RNN(*sizes)
    x = torch.randn(*rows, sizes[0])
    with torch.no_grad():
        for w in layer.parameters():
            before = layer(x)[0]
            write(w.data)
            twin = torch.nn.RNN(*sizes)
            twin.load_state_dict(layer.state_dict())
            after = layer(x)[0]
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, twin(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_weights_that_are_views_with_the_negative_bit(cache, name):
    for kind in (torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN):
        theirs, ours = kind(5, 7), getattr(fastcell, kind.__name__)(5, 7)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 2, 5)
        w = torch.randn(getattr(ours, name).shape, requires_grad=True)
        found = []
        for layer in (ours, theirs):
            ours(x)  # what it leaves in the cache must not be used
            y = torch.func.functional_call(layer, {name: torch._neg_view(w)}, (x,))[0]
            found.append((y, torch.autograd.grad(y.square().sum(), w)[0]))
        torch.testing.assert_close(found[0], found[1])


def by_optimizer(layer):
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def by_optimizer_without_foreach(layer):
    torch.optim.Adam(layer.parameters(), lr=0.1, foreach=False).step()


def by_data(layer):
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)


def by_new_data(layer):
    for parameter in layer.parameters():
        parameter.data = torch.rand_like(parameter)


def by_copy(layer):
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.rand_like(layer.weight_hh_l0))


def by_one_element(layer):
    with torch.no_grad():
        layer.weight_ih_l1[2, 1] = 3.0


def by_numpy(layer):
    layer.weight_hh_l1.detach().numpy()[:] = 0.25


def by_state_dict(layer):
    layer.load_state_dict(stack_of(type(layer)).state_dict())


def by_assigned_state_dict(layer):
    layer.load_state_dict(stack_of(type(layer)).state_dict(), assign=True)


def by_new_parameter(layer):
    layer.bias_hh_l1 = torch.nn.Parameter(torch.ones(layer.bias_hh_l1.shape))


def by_initialisation(layer):
    torch.nn.init.orthogonal_(layer.weight_hh_l0)


def by_swapped_memory(layer):
    layer.weight_hh_l0.set_(torch.rand_like(layer.weight_hh_l0).detach())


def by_way_of_another_dtype(layer):
    layer.double()
    layer.float()
    layer.reset_parameters()


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", [fastcell.RNN, fastcell.LSTM, fastcell.GRU])
def test_a_change_of_the_weights_is_noticed(kind, change, cache):
    layer, x = stack_of(kind), torch.ones(5, 2, 3)
    layer(x)[0].sum().backward()
    with torch.no_grad():
        before = layer(x)[0]
    assert len(cache) == 1
    if change is by_swapped_memory:
        layer.requires_grad_(False)
    change(layer)
    with torch.no_grad():
        after = layer(x)[0]
    assert not torch.equal(after, before), "the change changes nothing: this test tells nothing"
    assert torch.equal(after, fresh(layer, x))


def test_weights_are_packed_once(cache, monkeypatch):
    packs = []
    pack = fastcell._core.Stack.pack
    monkeypatch.setattr(
        fastcell._core.Stack, "pack", lambda *args: (packs.append(1), pack(*args))[1]
    )
    layer, x = fastcell.LSTM(3, 4), torch.ones(5, 2, 3)
    for _ in range(5):
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    assert len(packs) == 1
    by_optimizer(layer)
    layer(x)
    assert len(packs) == 2


def test_the_cache_is_bounded(cache, monkeypatch):
    x = torch.ones(2, 1, 3)
    monkeypatch.setattr(packing, "_MAX_ENTRIES", 5)
    layers = [fastcell.GRU(3, 4) for _ in range(12)]
    for layer in layers:
        layer(x)
    assert len(cache) == 5
    size = sum(entry.packed.numel() for entry in cache.values()) // 5
    monkeypatch.setattr(packing, "_MAX_BYTES", 3 * size)
    layers[0](x)
    assert len(cache) == 3
    for layer in layers:  # thrown out or not, all are right
        assert torch.equal(layer(x)[0], layer(x)[0])


def test_packed_weights_die_with_their_module(cache):
    layer, x = fastcell.LSTM(3, 4), torch.ones(2, 1, 3)
    layer(x)
    (entry,) = cache.values()
    parameter, packed = weakref.ref(layer.weight_ih_l0), weakref.ref(entry.packed)
    del layer, entry
    gc.collect()
    assert parameter() is None, "the cache keeps the weights alive"
    assert not cache
    assert packed() is None


def test_weights_of_inference_mode(cache):
    """They have no version counter: a change could not be noticed, so they are not kept."""
    with torch.inference_mode():
        layer, x = fastcell.GRU(3, 4), torch.ones(2, 1, 3)
        before = layer(x)[0]
        assert not cache
        layer.weight_hh_l0[0, 0] += 1
        layer.weight_ih_l0[5, 1] += 1
        assert not torch.equal(layer(x)[0], before)


def test_shared_weights_of_two_layers(cache):
    """One parameter in two modules: each stack has its own packed form."""
    one, two = fastcell.GRU(4, 4), fastcell.GRU(4, 4)
    two.weight_ih_l0 = one.weight_ih_l0
    x = torch.ones(3, 1, 4)
    first, second = one(x)[0], two(x)[0]
    assert not torch.equal(first, second)
    assert torch.equal(one(x)[0], first)
    assert torch.equal(two(x)[0], second)


def test_no_file_is_left_open():
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("reads /proc")
    layer, x = fastcell.GRU(3, 4), torch.ones(2, 1, 3)
    layer(x)
    before = len(list(folder.iterdir()))
    for _ in range(20):
        layer(x)
    assert len(list(folder.iterdir())) <= before


# --- import ---------------------------------------------------------------------------------------


def test_the_import_brings_nothing_heavy():
    """To a process that has torch: fastcell itself, parts of NumPy and of the standard library."""
    found = python(
        "import sys, torch; before = set(sys.modules); import fastcell;"
        "print(*sorted(set(sys.modules) - before))"
    ).stdout.split()
    assert "fastcell" in found
    expected = {"fastcell", "numpy", *sys.stdlib_module_names}
    assert not [n for n in found if n.split(".")[0] not in {*expected, "torch"}]
    compiler = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx")
    assert not [n for n in found if n.startswith(compiler)]
