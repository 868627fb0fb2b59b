"""A stream of single samples: fastcell.Stream beside RTNeural, on the same weights.
`python bench/rtneural/compare.py --checkout RTNEURAL PROGRAM...` (README.md: how to build those)

Two groups of rows: RTNeural's published recurrent models, whole, and single layers of the sizes
that models of amplifiers have. RTNeural runs in a process of its own, which waits while fastcell is
timed; blocks alternate, and a ratio is the median over neighbouring blocks. Nothing is timed before
every output was compared. All on one thread.

RTNeural is given one sample per call, the only way it takes them, in a loop in C++. fastcell is
called from Python: once per sample, and once per 64 samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import fastcell
from fastcell_bench.ratios import median, paired_ratio

Array = NDArray[np.float32]

BLOCK = 64
SIZES = (8, 16, 20, 24, 32, 40, 64)
TOLERANCE = 2e-5  # RTNeural's tanh and exp are approximations


def random_layer(cell: str, size: int) -> torch.nn.RNNBase:
    """One layer over single samples."""
    torch.manual_seed(size)
    layer: torch.nn.RNNBase = getattr(fastcell, cell)(1, size)
    return layer


def keras_layer(entry: dict[str, object]) -> torch.nn.RNNBase:
    """A layer as Keras stores it: (I, G H) and (H, G H), LSTM gates i f c o, GRU z r h."""
    kernel, recurrent, bias = (np.asarray(w, np.float32) for w in entry["weights"])  # type: ignore[attr-defined]
    inputs, size = kernel.shape[0], recurrent.shape[0]
    if entry["type"] == "lstm":
        layer: torch.nn.RNNBase = fastcell.LSTM(inputs, size)
        order, biases = [0, 1, 2, 3], (bias, np.zeros_like(bias))
    else:
        layer = fastcell.GRU(inputs, size)
        order, biases = [1, 0, 2], (bias[0], bias[1])
    rows = np.concatenate([np.arange(g * size, (g + 1) * size) for g in order])
    values = (kernel.T[rows], recurrent.T[rows], biases[0][rows], biases[1][rows])
    with torch.no_grad():
        for name, value in zip(layer._flat_weights_names, values, strict=True):
            getattr(layer, name).copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return layer


ACTIVATIONS = {"tanh": torch.nn.Tanh, "sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}


def dense(weight: Array, bias: Array, activation: str) -> list[torch.nn.Module]:
    """weight: (in, out)."""
    layer = torch.nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T))
        layer.bias.copy_(torch.from_numpy(bias))
    return [layer, ACTIVATIONS[activation]()] if activation else [layer]


def keras_model(file: Path) -> fastcell.Stream:
    """One of RTNeural's models that were exported from Keras."""
    parts: list[torch.nn.Module] = []
    for entry in json.loads(file.read_text())["layers"]:
        if entry["type"] in ("lstm", "gru"):
            parts.append(keras_layer(entry))
        else:
            weight, bias = (np.asarray(w, np.float32) for w in entry["weights"])
            parts += dense(weight, bias, entry["activation"])
    return fastcell.Stream(parts, threads=1)


def torch_model(file: Path) -> fastcell.Stream:
    """One of those exported from PyTorch: a layer, three more in one module, and a dense one."""
    values = {name: torch.tensor(v) for name, v in json.loads(file.read_text()).items()}
    cell = next(iter(values)).split(".")[0]
    stack: torch.nn.RNNBase = getattr(fastcell, cell.upper())(1, 8, 4)
    state = {}
    for name, value in values.items():
        module, parameter = name.split(".")
        if module == f"{cell}2":
            head, number = parameter.rsplit("_l", 1)
            parameter = f"{head}_l{int(number) + 1}"
        if module != "dense":
            state[parameter] = value
    stack.load_state_dict(state)
    last = values["dense.weight"].numpy().T, values["dense.bias"].numpy()
    return fastcell.Stream([stack, *dense(*last, "")], threads=1)


class Peer:
    """RTNeural's process."""

    def __init__(self, program: str, model: str, file: Path) -> None:
        self._program = program
        self._process = subprocess.Popen(
            [program, model, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.name = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._program}: ended with {self._process.wait()}")
        return line.strip()

    def _ask(self, order: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._line()

    def outputs(self, samples: Array) -> Array:
        """(T, features)."""
        numbers = " ".join(f"{x:.9g}" for x in samples.tolist())
        line = self._ask(f"outputs {len(samples)} {numbers}")
        return np.array(line.split(), np.float32).reshape(len(samples), -1)

    def time(self, seconds: float) -> float:
        """Nanoseconds per sample."""
        return float(self._ask(f"time {seconds}"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def time_blocks(model: fastcell.Stream, blocks: list[Array], seconds: float) -> float:
    """Nanoseconds per sample."""
    model.reset()
    rounds, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        for block in blocks:
            model(block)
        rounds += 1
    return passed / rounds / sum(len(block) for block in blocks) * 1e9


def rows(checkout: Path, scratch: Path) -> list[tuple[str, str, Path, fastcell.Stream]]:
    """Title, name of the model in rtneural_run.cpp, its file, and fastcell's model."""
    found = []
    for name in ("lstm_1d", "lstm", "lstm_torch", "gru_1d", "gru", "gru_torch"):
        file = checkout / "models" / f"{name}.json"
        model = torch_model(file) if name.endswith("torch") else keras_model(file)
        found.append((f"models/{file.name}", name, file, model))
    for cell in ("LSTM", "GRU"):
        for size in SIZES:
            layer = random_layer(cell, size)
            name = f"{cell.lower()}{size}"
            file = scratch / f"{name}.json"
            state = {f"layer.{k}": v.tolist() for k, v in layer.state_dict().items()}
            file.write_text(json.dumps(state))
            found.append((f"{cell} 1 -> {size}", name, file, fastcell.Stream(layer, threads=1)))
    return found


def main() -> int:
    """Run; 0, or 1 if an output differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="+", metavar="PROGRAM", help="builds of rtneural_run.cpp")
    parser.add_argument("--checkout", type=Path, required=True, help="of RTNeural, for its models")
    parser.add_argument("--blocks", type=int, default=15, help="per contender and row (15)")
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds per block (0.05)")
    options = parser.parse_args()
    torch.set_num_threads(1)

    signal = (0.5 * np.sin(0.1 * np.arange(4096))).astype(np.float32)
    single = [signal[i : i + 1, None] for i in range(len(signal))]
    blocks = [signal[i : i + BLOCK, None] for i in range(0, len(signal), BLOCK)]
    noise = np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32)
    print(f"fastcell {fastcell.__version__} ({fastcell.info()['cpu']['isa']}), one thread")
    print("ns per sample; x: RTNeural's time over fastcell's in blocks of 64, with its best build")
    names = [os.path.basename(p).removeprefix("rtneural_") for p in options.programs]
    print(
        f"{'':24}{'one per call':>13}{'64 per call':>13}"
        + "".join(f"{name:>15}" for name in names)
        + f"{'x':>8}",
        flush=True,
    )
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        for title, name, file, model in rows(options.checkout, Path(scratch)):
            peers = [Peer(program, name, file) for program in options.programs]
            model.reset()
            ours = np.concatenate(
                [model(noise[i : i + 50, None]).copy() for i in range(0, 500, 50)]
            )
            worst = max(float(np.abs(peer.outputs(noise) - ours).max()) for peer in peers)
            if not worst <= TOLERANCE:
                print(f"{title:24}differs by {worst:.1e}")
                status = 1
                continue
            times: list[list[float]] = [[] for _ in range(2 + len(peers))]
            for _ in range(options.blocks):
                times[0].append(time_blocks(model, single, options.min_time))
                times[1].append(time_blocks(model, blocks, options.min_time))
                for peer, measured in zip(peers, times[2:], strict=True):
                    measured.append(peer.time(options.min_time))
            for peer in peers:
                peer.close()
            best = min(times[2:], key=median)
            print(
                f"{title:24}{median(times[0]):13.0f}{median(times[1]):13.0f}"
                + "".join(f"{median(t):15.0f}" for t in times[2:])
                + f"{paired_ratio(best, times[1]):7.2f}x",
                flush=True,
            )
    return status


if __name__ == "__main__":
    raise SystemExit(main())
