"""Reservoirs: the sparse kernel beside a loop over scipy.sparse, reservoirpy and the dense kernel.
`python -m fastcell_bench.reservoir`

Blocks of the contenders alternate. All but reservoirpy run in one process: none of them leaves
threads that spin. reservoirpy runs in a process of its own, by an interpreter of an environment
that has it (--reservoirpy), and waits for its turn. A ratio is the median over pairs of
neighbouring blocks, above 1 where the sparse kernel is faster; it prints only after the states were
found equal to those of the loop in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import fastcell
from fastcell_bench.cli import positive, whole
from fastcell_bench.variants import block

Array = NDArray[np.floating[Any]]
Run = Callable[[], list[Array]]
Timed = Callable[[float], float]  # a block of at least so many seconds -> seconds per call

_DESCRIPTION = """\
A run of T steps of B sequences of one input each by H units with K connections each, all states
kept. Times are those of the sparse kernel, per step of all sequences, and per entry: one
connection of one unit, in one step of one sequence. GB/s: reading the weights and their columns
once per step of a block of sequences. Densities: how many times faster the sparse kernel is than
the dense one, by the part of the weights that is not 0; where below 1, the dense one would be the
better choice."""


class Shape(NamedTuple):
    """T steps, B sequences, H units, K connections of each."""

    steps: int
    sequences: int
    units: int
    connections: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


TABLE = [
    Shape(1000, 1, 100, 10),
    Shape(1000, 1, 300, 10),
    Shape(1000, 1, 1000, 10),
    Shape(300, 1, 1000, 100),
    Shape(300, 1, 10000, 10),
    Shape(30, 1, 10000, 100),
    Shape(300, 16, 1000, 10),
    Shape(100, 32, 1000, 100),
]
_DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5)


def parse_shape(text: str) -> Shape:
    """T:B:H:K; raises ValueError."""
    numbers = [int(word) for word in text.split(":")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[3] > numbers[2]:
        raise ValueError(f"a shape is T:B:H:K, positive integers with K <= H, got {text}")
    return Shape(*numbers)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.reservoir",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--mode", choices=["run", "densities", "all"], default="run")
    result.add_argument("--shape", action="append", default=[], metavar="T:B:H:K")
    result.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    result.add_argument("--reservoirpy", metavar="PYTHON", help="an interpreter that has it")
    result.add_argument("--threads", type=whole, metavar="N", help="default: torch's")
    result.add_argument("--blocks", type=whole, default=9, metavar="N", help="(9)")
    result.add_argument("--min-time", type=positive, default=0.05, metavar="S", help="(0.05)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


def problem(shape: Shape, dtype: Any) -> tuple[Any, list[Array]]:
    """Weights and input; the spectral radius is about 0.9."""
    from fastcell.reservoir.weights import Weights, random_topology

    rng = np.random.default_rng(0)
    units, connections = shape.units, shape.connections
    # Of random weights from (-1, 1) it is √(K / 3), about: finding it is not what is timed.
    matrix = random_topology(units, connections, rng) * (0.9 / math.sqrt(connections / 3))
    weights = Weights(
        rng.uniform(-1, 1, (units, 1)).astype(dtype),
        rng.uniform(-0.2, 0.2, units).astype(dtype),
        matrix.astype(dtype),
        np.full(units, 0.5, dtype),
    )
    x = rng.uniform(-1, 1, (shape.sequences, shape.steps, 1)).astype(dtype)
    return weights, list(x)


def loop(weights: Any, sequences: list[Array]) -> list[Array]:
    """All sequences at once, step by step: the product by scipy.sparse, the rest by NumPy."""
    x = np.stack(sequences, axis=2)  # (T, 1, B)
    w_in, bias, matrix, leak = weights
    bias, leak = bias[:, None], leak[:, None]
    keep = 1 - leak
    h = np.zeros((len(bias), len(sequences)), bias.dtype)
    states = np.empty((len(x), *h.shape), h.dtype)
    for t in range(len(x)):
        h = states[t] = keep * h + leak * np.tanh(matrix @ h + w_in @ x[t] + bias)
    return list(states.transpose(2, 0, 1))


def kernel(kind: Any, weights: Any, sequences: list[Array]) -> Run:
    """A run by one of fastcell's kernels."""
    units = kind(weights)
    state = np.zeros((len(sequences), len(weights.bias)), weights.bias.dtype)
    return lambda: list(units.run(sequences, state, True)[0])


def timed(run: Run) -> Timed:
    """Blocks of calls of it."""

    return lambda min_time: block(run, min_time)


def alternate(blocks: list[Timed], count: int, min_time: float) -> list[list[float]]:
    """Seconds per call of each, block by block."""
    times: list[list[float]] = [[] for _ in blocks]
    for _ in range(count):
        for one, found in zip(blocks, times, strict=True):
            found.append(one(min_time))
    return times


def gain(ours: list[float], other: list[float]) -> float:
    """How many times faster ours is."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def differs(found: list[Array], truth: list[Array], shape: Shape, dtype: Any) -> str:
    """What is wrong with states, or nothing: 4 ceil(log2(K T)) eps of the largest are allowed."""
    eps = float(np.finfo(dtype).eps)
    allowed = 4 * math.ceil(math.log2((shape.connections + 2) * shape.steps)) * eps
    error = max(float(np.abs(a - b).max()) for a, b in zip(found, truth, strict=True))
    largest = max(float(np.abs(b).max()) for b in truth)
    return "" if error <= allowed * largest else f"off by {error:.1e}"


@contextlib.contextmanager
def reservoirpy(
    python: str, weights: Any, sequences: list[Array]
) -> Iterator[tuple[str, list[Array], Timed]]:
    """Version, states and blocks of reservoirpy, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.npy")
        matrix = weights.recurrent
        np.savez(
            given, input=weights.input, bias=weights.bias, leak=weights.leak, x=np.stack(sequences),
            data=matrix.data, indices=matrix.indices, indptr=matrix.indptr,
        )  # fmt: skip
        worker = Path(__file__).with_name("reservoirpy_worker.py")
        process = subprocess.Popen(
            [python, str(worker), str(given), str(found)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def block(min_time: float) -> float:
            ask.write(f"{min_time}\n")
            ask.flush()
            return float(answers.readline())

        try:
            version = answers.readline().strip()
            if not version:
                raise RuntimeError(f"{python} did not run reservoirpy")
            yield version, list(np.load(found)), block
        finally:
            ask.close()
            process.wait(timeout=60)
            answers.close()


def compare(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Time of the sparse kernel, and the gains over the others; raises RuntimeError if unequal."""
    from fastcell.reservoir.units import DenseUnits, SparseUnits
    from fastcell.reservoir.weights import Weights

    weights, sequences = problem(shape, options.dtype)
    wide = Weights(*[part.astype(np.float64) for part in weights])
    truth = loop(wide, [x.astype(np.float64) for x in sequences])
    runs: dict[str, Run] = {"sparse": kernel(SparseUnits, weights, sequences)}
    runs["scipy.sparse loop"] = lambda: loop(weights, sequences)
    if shape.units <= 3000:
        runs["dense kernel"] = kernel(DenseUnits, weights, sequences)
    found = {name: run() for name, run in runs.items()}
    blocks = {name: timed(run) for name, run in runs.items()}
    with contextlib.ExitStack() as stack:
        version = ""
        if options.reservoirpy:
            version, found["reservoirpy"], blocks["reservoirpy"] = stack.enter_context(
                reservoirpy(options.reservoirpy, weights, sequences)
            )
        for name, states in found.items():
            if wrong := differs(states, truth, shape, options.dtype):
                raise RuntimeError(f"{shape}: the states of {name} are {wrong}")
        times = alternate(list(blocks.values()), options.blocks, options.min_time)
    step = statistics.median(times[0]) / shape.steps
    entries = shape.units * shape.connections
    item = np.dtype(options.dtype).itemsize
    per_block = fastcell._core.reservoir_lanes(item == 8)
    passes = math.ceil(shape.sequences / per_block)
    return {
        "shape": shape,
        "step": step,
        "entry": step / shape.sequences / entries,
        "read": entries * (item + 4) * passes / step,
        "gains": {
            name: gain(times[0], other)
            for name, other in zip(list(blocks)[1:], times[1:], strict=True)
        },
        "reservoirpy": version,
    }


def densities(units: int, sequences: int, options: argparse.Namespace) -> dict[str, Any]:
    """Gains over the dense kernel by density."""
    from fastcell.reservoir.units import DenseUnits, SparseUnits

    gains = {}
    for density in _DENSITIES:
        connections = max(1, round(density * units))
        steps = max(50, 3_000_000 // (units * connections * max(1, sequences // 8)))
        weights, x = problem(Shape(steps, sequences, units, connections), options.dtype)
        blocks = [timed(kernel(kind, weights, x)) for kind in (SparseUnits, DenseUnits)]
        gains[density] = gain(*alternate(blocks, options.blocks, options.min_time))
    return {"units": units, "sequences": sequences, "gains": gains}


def main(argv: list[str] | None = None) -> int:
    """Run; 0, 1 if states were not equal, or 2 for bad options."""
    command = parser()
    options = command.parse_args(argv)
    try:
        shapes = [parse_shape(text) for text in options.shape] or TABLE
    except ValueError as error:
        command.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    count = torch.get_num_threads()
    document: dict[str, Any] = {
        "fastcell": fastcell.info(), "dtype": options.dtype, "run": [], "densities": [],
    }  # fmt: skip
    print(f"fastcell {fastcell.__version__}, {count} thread(s), {options.dtype}")
    if options.mode in ("run", "all"):
        names = ["scipy.sparse loop", "dense kernel", *["reservoirpy"] * bool(options.reservoirpy)]
        print(f"{'T:B:H:K':18}{'step µs':>10}{'entry ns':>10}{'GB/s':>7}", end="")
        print("".join([f"{name:>19}" for name in names]))
        for shape in shapes:
            try:
                row = compare(shape, options)
            except (RuntimeError, OSError) as error:
                print(error, file=sys.stderr)
                return 1
            document["run"].append(row)
            gains = [row["gains"].get(name) for name in names]
            print(f"{shape!s:18}{row['step'] * 1e6:10.3g}{row['entry'] * 1e9:10.3f}", end="")
            print(f"{row['read'] / 1e9:7.3g}", end="")
            print("".join([f"{g:18.2f}x" if g else f"{'-':>19}" for g in gains]), flush=True)
        for version in sorted({row["reservoirpy"] for row in document["run"]} - {""}):
            print(version)
    if options.mode in ("densities", "all"):
        print("\nthe dense kernel's time by the sparse one's")
        print(f"{'H':>6}{'B':>4}" + "".join([f"{density:8g}" for density in _DENSITIES]))
        for units in (100, 300, 1000):
            for sequences in (1, 4, 16):
                row = densities(units, sequences, options)
                document["densities"].append(row)
                print(f"{units:6}{sequences:4}", end="")
                print("".join([f"{g:8.2f}" for g in row["gains"].values()]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
