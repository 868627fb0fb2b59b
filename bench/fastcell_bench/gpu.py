"""fastcell against torch.nn (cuDNN) on a GPU. `fastcell bench --cuda`

Both run in one process, on one stream, in alternating blocks; a block is several calls between two
events of the device, so that what is measured is the device's time, or the host's where the device
waits for it. A row is timed after outputs and gradients compared equal within the dtype's rounding.

The limit of a row is what the device could do: the layer's FLOPs at the rate of a large product of
the same dtype, or the steps at the time of a step that has next to nothing to compute (the exchange
of h alone), whichever takes longer. Both are measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fastcell
from fastcell_bench.cases import GATES, parse_shape
from fastcell_bench.cli import positive, whole
from fastcell_bench.machine import nvidia_driver
from fastcell_bench.variants import gain, make

Run = Callable[[], object]
Shape = tuple[str, int, int, int, int]

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Errors of two computations may differ by their rounding: of T steps, in units of the dtype's eps.
EPS = {"float32": 2.0**-23, "tf32": 2.0**-10, "bfloat16": 2.0**-7, "float16": 2.0**-10}
SHAPES: tuple[Shape, ...] = tuple(
    (cell, T, B, H, H)
    for cell in ("LSTM", "GRU", "RNN")
    for T, B, H in (
        (1, 1, 128), (100, 1, 128), (100, 1, 512), (100, 8, 256), (100, 32, 512), (100, 64, 1024),
        (1000, 16, 512), (100, 256, 512),
    )
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="fastcell bench --cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--shape", action="append", default=[], metavar="CELL:T:B:I:H", help="(a table of them)"
    )
    result.add_argument(
        "--dtype", action="append", default=[], choices=list(DTYPES), help="(float32, bfloat16)"
    )
    result.add_argument("--mode", choices=["inference", "training", "both"], default="both")
    result.add_argument("--engine", choices=fastcell.cuda.ENGINES, help="(chosen by shape)")
    result.add_argument("--blocks", type=whole, default=7, metavar="N", help="(7)")
    result.add_argument("--min-time", type=positive, default=0.05, metavar="S", help="(0.05)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


class Clock:
    """Seconds of calls on a device: between events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, run: Run, count: int) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - begin) / count
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        first, last = events
        torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(count):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / count

    def alternate(self, runs: Sequence[Run], blocks: int, min_time: float) -> list[list[float]]:
        """Seconds per call of each run, block by block."""
        counts = []
        for run in runs:
            run()
            counts.append(max(1, int(min_time / max(self.seconds(run, 2), 1e-7))))
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(blocks):
            for run, count, found in zip(runs, counts, times, strict=True):
                found.append(self.seconds(run, count))
        return times


def training_step(layer: torch.nn.RNNBase, x: torch.Tensor, grad: torch.Tensor) -> list[Any]:
    """Output and the gradients of input and weights."""
    leaves = [x, *layer.parameters()]
    output, _ = layer(x)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def assert_alike(ours: Sequence[Any], theirs: Sequence[Any], tolerance: float, what: str) -> None:
    """Raises RuntimeError where two results differ by more than rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = mine.detach().double(), other.detach().double()
        error = float((mine - other).square().mean().sqrt())
        size = float(other.square().mean().sqrt())
        if not error <= tolerance * max(size, 1e-30):
            raise RuntimeError(
                f"{what}: results differ by {error:.2e} (root mean square) of {size:.2e}, "
                f"allowed {tolerance:.1e} of it: not timed"
            )


def measure(
    shape: Shape, dtype: str, mode: str, device: torch.device, blocks: int, min_time: float
) -> dict[str, Any]:
    """One row: times of fastcell and torch.nn, their ratio, and the limit's parts."""
    cell, steps, batch, inputs, hidden = shape
    kind: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device}
    ours = make(fastcell, cell, inputs, hidden).to(**kind)
    theirs = make(torch.nn, cell, inputs, hidden).to(**kind)
    theirs.load_state_dict(ours.state_dict())
    training = mode == "training"
    x = torch.randn(steps, batch, inputs, **kind, requires_grad=training)
    grad = torch.randn(steps, batch, hidden, **kind)
    tiny = make(fastcell, cell, 8, 8).to(**kind)
    tiny_x = torch.randn(steps, 1, 8, **kind, requires_grad=training)
    tiny_grad = torch.randn(steps, 1, 8, **kind)

    def call(layer: torch.nn.RNNBase, x: torch.Tensor, grad: torch.Tensor) -> list[Any]:
        if training:
            return training_step(layer, x, grad)
        with torch.no_grad():
            return [layer(x)[0]]

    tolerance = 32 * EPS[dtype] * steps**0.5
    assert_alike(call(ours, x, grad), call(theirs, x, grad), tolerance, f"{shape} {dtype} {mode}")
    clock = Clock(device)
    mine, other, least = clock.alternate(
        [
            lambda: call(ours, x, grad),
            lambda: call(theirs, x, grad),
            lambda: call(tiny, tiny_x, tiny_grad),
        ],
        blocks,
        min_time,
    )
    flops = 2.0 * steps * batch * GATES[cell] * hidden * (inputs + hidden) * (3 if training else 1)
    limit = max(flops / product_rate(dtype, clock), statistics.median(least))
    seconds = statistics.median(mine)
    return {
        "shape": list(shape),
        "dtype": dtype,
        "mode": mode,
        "engine": fastcell.explain(ours, x).schedule,
        "seconds": seconds,
        "us_per_step": seconds / steps * 1e6,
        "torch_seconds": statistics.median(other),
        "ratio": gain(other, mine),
        "limit_seconds": limit,
        "of_limit": limit / seconds,
    }


_rates: dict[tuple[str, str], float] = {}


def product_rate(dtype: str, clock: Clock) -> float:
    """FLOP/s of a large matrix product."""
    key = (dtype, str(clock.device))
    if key not in _rates:
        size = 8192 if clock.device.type == "cuda" else 256
        a, b = (torch.randn(size, size, dtype=DTYPES[dtype], device=clock.device) for _ in range(2))
        (times,) = clock.alternate([lambda: a @ b], 5, 0.05)
        _rates[key] = 2.0 * size**3 / statistics.median(times)
    return _rates[key]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 in products and in cuDNN where it is asked for, and nowhere else."""
    before = fastcell.cuda.tf32_allowed()
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype == "tf32"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def table(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    modes: Sequence[str],
    device: torch.device,
    blocks: int,
    min_time: float,
) -> list[dict[str, Any]]:
    """All rows, printed as they come."""
    rows = []
    head = "  ".join(
        ["cell", "   T", "  B", "   H", "dtype   ", "mode     ", "us/step", "of limit", "torch"]
    )
    print(head)
    for dtype in dtypes:
        with precision(dtype):
            for mode in modes:
                for shape in shapes:
                    row = measure(shape, dtype, mode, device, blocks, min_time)
                    rows.append(row)
                    cell, steps, batch, _, hidden = shape
                    print(
                        f"{cell:<4}  {steps:>4}  {batch:>3}  {hidden:>4}  {dtype:<8}  {mode:<9}  "
                        f"{row['us_per_step']:7.2f}  {row['of_limit']:7.0%}  "
                        f"{row['ratio']:5.2f}x  {row['engine']}",
                        flush=True,
                    )
    return rows


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {"torch": torch.__version__, "fastcell": fastcell.__version__}
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": nvidia_driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """The facts in a line."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def missing() -> str | None:
    """Why there is nothing to measure here; None if there is."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch finds none (driver: {nvidia_driver() or 'none'})"
    if not fastcell.cuda.architectures():
        return "this build of fastcell has no CUDA kernels"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 where there is no GPU or no kernels for one."""
    options = parser().parse_args(arguments)
    if why := missing():
        print(f"fastcell bench: needs a CUDA device and kernels for it: {why}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = [parse_shape(text) for text in options.shape] or list(SHAPES)
    modes = ["inference", "training"] if options.mode == "both" else [options.mode]
    print(in_words(facts(device)))
    with fastcell.cuda.choose_engine(options.engine):
        rows = table(
            shapes, options.dtype or ["float32", "bfloat16"], modes, device,
            options.blocks, options.min_time,
        )  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps({"facts": facts(device), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
