"""Layers of a deep stack at the same time on a CUDA device, as a wavefront.

Time is cut in chunks: while one layer runs its chunk k, the layer that takes its output runs chunk
k - 1, each on a stream of its own. The streams are forked from the caller's and joined to it by
events: nothing waits for the host, and a call can be captured in a graph.

What crosses streams is allocated on the caller's before the fork, and lives until the join.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

__all__ = ["PLACES", "Wavefront", "choose", "choose_wavefront", "run"]

# Where kernels may run beside others of the same stack: blocks there wait for none but those of
# their own cluster, which the hardware keeps together. (Those of a `grid` wait for each other, and
# whether a driver runs two cooperative launches at a time is not said.)
PLACES = ("cluster", "step")

# Estimates, in ns. What a chunk of a layer takes besides its steps, on the device: a product's and
# a kernel's start, the way of the weights into the multiprocessors. And what it takes the host,
# which issues all chunks of all layers one after another; besides, where a step is a launch, that.
_CHUNK_TIME = 15_000.0
_HOST_TIME = 60_000.0
_LAUNCH_TIME = 4_000.0
# As much shorter than one layer after another it must be, where times are estimates.
_WORTH = 0.8

_choice: bool | None = None


@contextmanager
def choose_wavefront(wanted: bool | None) -> Iterator[None]:
    """Within this context, whether layers of a stack on CUDA devices run at the same time.

    It holds for the whole process (a backward pass runs in a thread of torch's), and chooses
    nothing for what cannot: both directions, a PackedSequence, a single layer, layers of which no
    two fit a device together, the engine ``"grid"``.

    Args:
        wanted: True: wherever they can; False: nowhere; None: where a model of the machine finds it
            faster.
    """
    global _choice
    before, _choice = _choice, wanted
    try:
        yield
    finally:
        _choice = before


class Wavefront(NamedTuple):
    """How layers overlap. ``plan``: of each (``_core.CudaPlan``); ``chunk``: in steps."""

    plan: Any
    at_once: int  # layers
    chunk: int
    time: float  # ns that the model expects

    def parts(self, steps: int) -> list[tuple[int, int]]:
        """The steps (begin, end) of each chunk."""
        return [(t, min(t + self.chunk, steps)) for t in range(0, steps, self.chunk)]


def choose(alone: Any, beside: Iterable[Any], layers: int, steps: int) -> Wavefront | None:
    """The wavefront that suits a stack of equal layers, or None for one layer after another.

    ``alone``: the plan of a layer that has the device to itself; ``beside``: plans of PLACES.
    """
    if _choice is False or layers == 1 or steps == 1:
        return None
    best = None
    for plan in beside:
        at_once = min(plan.at_once, layers)
        if at_once < 2:
            continue
        chunk = 1
        while chunk < steps:
            time = _time(plan, layers, steps, chunk, at_once)
            if best is None or time < best.time:
                best = Wavefront(plan, at_once, chunk, time)
            chunk *= 2
    one_by_one = layers * (alone.time + _CHUNK_TIME)
    if best is None or _choice or best.time < _WORTH * one_by_one:
        return best
    return None


def _time(plan: Any, layers: int, steps: int, chunk: int, at_once: int) -> float:
    chunks = -(-steps // chunk)
    # Rounds of at most `at_once` chunks: of each diagonal of layers and chunks.
    diagonals = range(1, layers + chunks)
    rounds = sum(-(-min(d, layers, chunks, layers + chunks - d) // at_once) for d in diagonals)
    device: float = rounds * (chunk * plan.time / steps + _CHUNK_TIME)
    host = layers * chunks * _HOST_TIME
    if plan.place == "step":
        host += layers * steps * _LAUNCH_TIME
    return max(device, host)


class _Streams(threading.local):
    """Beside the caller's: of each thread its own, so that one's capture holds nobody else's work.

    Always the same ones: torch keeps memory and workspaces for each.
    """

    def __init__(self) -> None:
        self.of: dict[torch.device, list[torch.cuda.Stream]] = {}

    def beside(self, device: torch.device, count: int) -> list[torch.cuda.Stream]:
        found = self.of.setdefault(device, [])
        while len(found) < count:
            found.append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        return found[:count]


_streams = _Streams()


class Lanes:
    """``count`` streams, the first of which is the caller's; on a device without, nothing."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            self.streams = [current, *_streams.beside(device, count - 1)]

    def fork(self) -> None:
        """What comes in any of them is after what came before."""
        for stream in self.streams[1:]:
            stream.wait_stream(self.streams[0])

    def join(self) -> None:
        """What comes after is after what came in all of them."""
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)

    def on(self, lane: int) -> Any:
        """A context, for what is to come in that lane."""
        return torch.cuda.stream(self.streams[lane]) if self.streams else nullcontext()

    def mark(self, lane: int) -> Any:
        """What came in that lane until now, to be waited for."""
        return self.streams[lane].record_event() if self.streams else None

    def wait(self, lane: int, mark: Any) -> None:
        """What is to come in that lane waits for what was marked."""
        if mark is not None:
            self.streams[lane].wait_event(mark)


def run(
    device: torch.device, wave: Wavefront, layers: int, steps: int,
    work: Callable[[int, int, int], None],
) -> None:  # fmt: skip
    """``work(layer, begin, end)`` for all layers and chunks, each after the same of the one before.

    Layers are counted from the one whose input is there.
    """
    parts = wave.parts(steps)
    lanes = Lanes(device, wave.at_once)
    done: list[Any] = [None] * layers
    lanes.fork()
    try:
        for diagonal in range(layers + len(parts) - 1):
            # The last layer first: `done` of the one before is then that of the same chunk.
            for layer in reversed(range(layers)):
                if not 0 <= diagonal - layer < len(parts):
                    continue
                lane = layer % wave.at_once
                if layer > 0:
                    lanes.wait(lane, done[layer - 1])
                with lanes.on(lane):
                    work(layer, *parts[diagonal - layer])
                done[layer] = lanes.mark(lane)
    finally:
        lanes.join()
