"""fastcell against itself: what small weights gain, what recomputation saves and costs, and what a
wavefront over the layers of a deep stack gains.
`python -m fastcell_bench.variants`

Blocks of the variants alternate in one process: they share one pool of threads, which does not spin
after a call. Times are medians of blocks, ratios medians over pairs of neighbouring blocks. What a
training step keeps is counted at the graph: the bytes of all memory that it saved for the backward
pass, but for input, parameters and results, which exist anyway.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

import fastcell
from fastcell.cells import CELL_OF_MODE
from fastcell.plan import Config, bound_stack
from fastcell_bench.cases import TABLE, parse_shape
from fastcell_bench.cli import positive, whole

Run = Callable[[], object]


class Peer(Protocol):
    """What times its own calls, in another process."""

    def block(self, seconds: float, /) -> float:
        """Seconds per call, over a block of that length."""


_DESCRIPTION = """\
Inference: a layer in float32, in bfloat16, and quantized to bfloat16 and int8; how many times
faster than float32. Training in float32: with and without recompute=True, the time of a step and
what it keeps for the backward pass, beside what torch.nn's layer keeps. Stacks: inference of 4 and
8 layers as a wavefront over groups of layers, and without; and which of the two the schedule's
model chooses."""

_DEEP = [(cell, 100, 1, H, H) for cell in ("LSTM", "GRU") for H in (64, 128, 256, 512)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.variants",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--shape", action="append", default=[], metavar="CELL:T:B:I:H", help="(the table's)"
    )
    result.add_argument(
        "--mode",
        choices=["inference", "training", "stacks", "both", "all"],
        default="both",
    )
    result.add_argument("--threads", type=whole, metavar="N", help="default: torch's")
    result.add_argument("--blocks", type=whole, default=9, metavar="N", help="(9)")
    result.add_argument("--min-time", type=positive, default=0.05, metavar="S", help="(0.05)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


def alternate(runs: Sequence[Run | Peer], blocks: int, min_time: float) -> list[list[float]]:
    """Seconds per call of each run, block by block."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        if callable(run):
            run()
    for _ in range(blocks):
        for run, found in zip(runs, times, strict=True):
            found.append(block(run, min_time) if callable(run) else run.block(min_time))
    return times


def block(run: Run, min_time: float) -> float:
    """Seconds per call, over a block of at least ``min_time``."""
    begin, count = time.perf_counter(), 0
    while True:
        run()
        count += 1
        if (passed := time.perf_counter() - begin) >= min_time:
            return passed / count


def gain(first: list[float], other: list[float]) -> float:
    """How many times faster the other is."""
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def make(
    library: Any, cell: str, inputs: int, hidden: int, num_layers: int = 1
) -> torch.nn.RNNBase:
    """A layer with its random weights."""
    if cell == "RNN_RELU":
        layer = library.RNN(inputs, hidden, num_layers, nonlinearity="relu")
    else:
        layer = getattr(library, cell)(inputs, hidden, num_layers)
    assert isinstance(layer, torch.nn.RNNBase)
    return layer


def kept_bytes(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """What the graph of a call holds on to, beside input, parameters and results."""
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output, _ = layer(x)
    for t in (x, output, *layer.parameters()):
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def inference(
    shape: tuple[str, int, int, int, int], blocks: int, min_time: float
) -> dict[str, Any]:
    """Times of one shape, and the gains over float32."""
    cell, steps, batch, inputs, hidden = shape
    layer = make(fastcell, cell, inputs, hidden).requires_grad_(False)
    x = torch.randn(steps, batch, inputs)
    narrow, x_narrow = make(fastcell, cell, inputs, hidden).requires_grad_(False), x.bfloat16()
    narrow.load_state_dict(layer.state_dict())
    narrow.bfloat16()
    of16 = fastcell.quantize(layer, torch.bfloat16)
    of8 = fastcell.quantize(layer, torch.int8)
    runs: list[Run] = [
        lambda: layer(x), lambda: narrow(x_narrow), lambda: of16(x), lambda: of8(x),
    ]  # fmt: skip
    with torch.no_grad():
        exact, *others = alternate(runs, blocks, min_time)
    names = ("bfloat16 layer", "bfloat16 weights", "int8 weights")
    return {
        "float32": statistics.median(exact),
        **{name: gain(exact, other) for name, other in zip(names, others, strict=True)},
    }


def training(shape: tuple[str, int, int, int, int], blocks: int, min_time: float) -> dict[str, Any]:
    """Times of a step, and the bytes that it keeps."""
    cell, steps, batch, inputs, hidden = shape
    plain = make(fastcell, cell, inputs, hidden)
    again = make(fastcell, cell, inputs, hidden)
    again.recompute = True
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    gradient = torch.randn(steps, batch, hidden)

    def step(layer: torch.nn.Module) -> Run:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x)[0], wanted, gradient)

    first, second = alternate([step(plain), step(again)], blocks, min_time)
    return {
        "step": statistics.median(first),
        "recompute": 1 / gain(first, second),
        "kept by torch": kept_bytes(make(torch.nn, cell, inputs, hidden), x),
        "kept": kept_bytes(plain, x),
        "kept with recompute": kept_bytes(again, x),
    }


def stacks(
    shape: tuple[str, int, int, int, int], layers: int, blocks: int, min_time: float
) -> dict[str, Any]:
    """Inference of a stack as a wavefront and without one, and which of them the model chooses."""
    cell, steps, batch, inputs, hidden = shape
    layer = make(fastcell, cell, inputs, hidden, num_layers=layers).requires_grad_(False)
    x = torch.randn(steps, batch, inputs)
    config = Config(CELL_OF_MODE[layer.mode], layers, False, True, False)
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    stack = bound_stack(config, x, weights)  # the object that the calls below use
    threads = torch.get_num_threads()

    # Not while a way is forced: that would be the answer.
    def choice(wavefront: bool) -> tuple[int, ...]:
        chosen: tuple[int, ...] = stack.explain(steps, batch, steps * batch, 0, threads, wavefront)
        return chosen

    def run(way: tuple[int, ...]) -> None:
        stack.force_schedule(*way)
        layer(x)

    groups, ordinary = min(threads, layers), choice(False)
    try:
        with torch.no_grad():
            wave, other = alternate(
                [lambda: run((1, 1, 1, groups)), lambda: run(ordinary)], blocks, min_time
            )
    finally:
        stack.force_schedule(0, 0, 0, 1)
    return {
        "wavefront": statistics.median(wave),
        "without": statistics.median(other),
        "gain": gain(other, wave),
        "chosen": "wavefront" if choice(True)[3] > 1 else "without",
    }


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 for bad options."""
    command = parser()
    options = command.parse_args(argv)
    try:
        given = [parse_shape(text) for text in options.shape]
    except ValueError as error:
        command.error(str(error))
    shapes = given or list(TABLE)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    document: dict[str, Any] = {
        "fastcell": fastcell.info(), "threads": torch.get_num_threads(), "inference": [],
        "training": [], "stacks": [],
    }  # fmt: skip
    print(f"fastcell {fastcell.__version__}, {torch.get_num_threads()} threads")
    if options.mode in ("inference", "both", "all"):
        print("\ninference: float32's time, and how many times faster")
        print(f"{'':22}{'float32 µs':>12}{'bfloat16 layer':>16}{'bfloat16 weights':>18}{'int8':>8}")
        for shape in shapes:
            row = inference(shape, options.blocks, options.min_time)
            document["inference"].append({"shape": shape, **row})
            print(
                f"{':'.join(map(str, shape)):22}{row['float32'] * 1e6:12.4g}"
                f"{row['bfloat16 layer']:15.2f}x{row['bfloat16 weights']:17.2f}x"
                f"{row['int8 weights']:7.2f}x",
                flush=True,
            )
    if options.mode in ("training", "both", "all"):
        print("\ntraining in float32: a step, with recompute=True, and what is kept in between, MB")
        print(
            f"{'':22}{'step µs':>12}{'recompute':>16}{'torch':>10}{'fastcell':>10}{'recompute':>11}"
        )
        for shape in shapes:
            row = training(shape, options.blocks, options.min_time)
            document["training"].append({"shape": shape, **row})
            kept = [row[k] / 1e6 for k in ("kept by torch", "kept", "kept with recompute")]
            print(
                f"{':'.join(map(str, shape)):22}{row['step'] * 1e6:12.4g}"
                f"{row['recompute']:14.2f} x{kept[0]:11.3f}{kept[1]:10.3f}{kept[2]:11.3f}",
                flush=True,
            )
    if options.mode in ("stacks", "all"):
        print("\ninference of deep stacks: as a wavefront of groups of layers, and without")
        print(f"{'':22}{'layers':>8}{'wavefront µs':>14}{'without µs':>12}{'gain':>8}  chosen")
        for shape in given or _DEEP:
            for layers in (4, 8):
                row = stacks(shape, layers, options.blocks, options.min_time)
                document["stacks"].append({"shape": shape, "layers": layers, **row})
                print(
                    f"{':'.join(map(str, shape)):22}{layers:8}{row['wavefront'] * 1e6:14.4g}"
                    f"{row['without'] * 1e6:12.4g}{row['gain']:7.2f}x  {row['chosen']}",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
