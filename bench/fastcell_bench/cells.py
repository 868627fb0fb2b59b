"""What each cell and each control over the sequence costs, by the plain cell of its family, and how
many times faster it is than the Python loop that it replaces, and than onnxruntime where it has the
cell. `python -m fastcell_bench.cells`

The loop is the way to write a cell without kernels: torch's operations step by step, with the input
terms of all steps in one product. A second one has the step compiled by torch.compile. Blocks
alternate, those of torch and fastcell in one process, as in ``fastcell_bench.variants``; every
variant's output is compared with the others' before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import fastcell
from fastcell import composite, normed, normed_composite
from fastcell.cells import cell_of, spec_of
from fastcell.plan import NO_EXTRAS
from fastcell_bench.cases import parse_shape
from fastcell_bench.cli import positive, whole
from fastcell_bench.onnx_cells import OnnxRuntime, why_not
from fastcell_bench.variants import Peer, Run, alternate, gain

_SHAPES = ("100:8:128:128", "100:32:256:256", "100:64:512:512")


@dataclass(frozen=True)
class Variant:
    """A layer beside the plain one of its family."""

    name: str
    base: str
    layer: str
    options: dict[str, Any] = field(default_factory=dict)
    call: Callable[[int, int], dict[str, Any]] = lambda steps, batch: {}
    loop: bool = True  # whether the loop does the same


def _reset(steps: int, batch: int) -> dict[str, Any]:
    return {"reset": torch.rand(steps, batch) < 0.02}


def _lengths(steps: int, batch: int) -> dict[str, Any]:
    """Uniform in 1 .. steps: as many in each equal part of it, so that no draw is a long one."""
    middles = (torch.arange(batch) + 0.5) / batch * steps
    return {"lengths": middles.ceil().long()[torch.randperm(batch)]}


VARIANTS = (
    Variant("peephole", "LSTM", "LSTM", {"peephole": True}),
    Variant("coupled", "LSTM", "LSTM", {"coupled": True}),
    Variant("peephole, coupled", "LSTM", "LSTM", {"peephole": True, "coupled": True}),
    Variant("activations", "LSTM", "LSTM", {"activation": "relu", "output_activation": "softsign"}),
    Variant("clip", "LSTM", "LSTM", {"cell_clip": 1.0}),
    Variant("zoneout", "LSTM", "LSTM", {"zoneout": 0.1}, loop=False),
    Variant("recurrent dropout", "LSTM", "LSTM", {"recurrent_dropout": 0.2}, loop=False),
    Variant("weight dropout", "LSTM", "LSTM", {"weight_dropout": 0.2}, loop=False),
    Variant("layer norm", "LSTM", "LSTM", {"layer_norm": True}),
    Variant("reset=", "LSTM", "LSTM", call=_reset),
    Variant("lengths=", "LSTM", "LSTM", call=_lengths, loop=False),
    Variant("all states", "LSTM", "LSTM", call=lambda steps, batch: {"return_states": True}),
    Variant("skip 4", "LSTM", "LSTM", {"skip": 4}, loop=False),
    Variant("skip 4 beside", "LSTM", "LSTM", {"skip": 4, "skip_beside": True}, loop=False),
    Variant("reset before", "GRU", "GRU", {"reset_after": False}),
    Variant("layer norm", "GRU", "GRU", {"layer_norm": True}),
    Variant("zoneout", "GRU", "GRU", {"zoneout": 0.1}, loop=False),
    Variant("reset=", "GRU", "GRU", call=_reset),
    Variant("leaky", "RNN", "LeakyRNN"),
    Variant("independent", "RNN", "IndRNN", {"nonlinearity": "tanh"}),
    Variant("zoneout", "RNN", "RNN", {"zoneout": 0.1}, loop=False),
    Variant("reset=", "RNN", "RNN", call=_reset),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.cells",
        description="Time of each variant by that of the plain cell of its family, and how many "
        "times faster it is than a Python loop over torch's operations.",
    )
    result.add_argument("--shape", action="append", default=[], metavar="T:B:I:H")
    result.add_argument("--only", metavar="TEXT", help="variants whose name has it")
    result.add_argument(
        "--compile", action="store_true", help="also a loop over a step that torch.compile made"
    )
    result.add_argument("--onnx", action="store_true", help="also onnxruntime, in inference")
    result.add_argument("--threads", type=whole, metavar="N", help="default: torch's")
    result.add_argument("--blocks", type=whole, default=9, metavar="N", help="(9)")
    result.add_argument("--min-time", type=positive, default=0.05, metavar="S", help="(0.05)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


Step = Callable[..., tuple[torch.Tensor, ...]]
Terms = Callable[[torch.Tensor], torch.Tensor]


def python_loop(
    layer: torch.nn.RNNBase, reset: torch.Tensor | None, compiled: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's output, step by step in torch's operations, input terms in one product."""
    count = spec_of(cell_of(layer)).states
    terms, step = _normed(layer) if getattr(layer, "layer_norm", False) else _plain(layer)
    if compiled:
        # What was compiled for another cell counts against what torch compiles of one function.
        torch.compiler.reset()
        step = torch.compile(step)

    def run(x: torch.Tensor) -> torch.Tensor:
        states = tuple([x.new_zeros(x.shape[1], layer.hidden_size) for _ in range(count)])
        outputs = []
        for t, given in enumerate(terms(x).unbind(0)):
            if reset is not None:
                states = tuple([s.masked_fill(reset[t, :, None], 0) for s in states])
            states = step(given, *states)
            outputs.append(states[0])
        return torch.stack(outputs)

    return run


def _plain(layer: torch.nn.RNNBase) -> tuple[Terms, Step]:
    w_ih, w_hh, b_ih, b_hh, *rest = layer.parameters()
    vectors = rest[0] if rest else None
    part = composite.Part(cell_of(layer), 0, w_hh, b_hh, None, vectors, NO_EXTRAS)

    def step(given: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return composite.cell_step(part, given, states)

    return lambda x: torch.nn.functional.linear(x, w_ih, b_ih), step


def _normed(layer: torch.nn.RNNBase) -> tuple[Terms, Step]:
    cell, hidden = cell_of(layer), layer.hidden_size
    weights: Any = normed.split(cell, list(layer.parameters()), True, False)[0]
    parts = normed_composite.parts_of(cell)

    def terms(x: torch.Tensor) -> torch.Tensor:
        product = torch.nn.functional.linear(x, weights.w_ih)
        normal: torch.Tensor = normed_composite.norm(product, weights.norm_ih, parts, hidden)
        return normal.add(weights.b_ih)

    def step(given: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call = normed_composite.Call(cell, (len(given),), None, False, None, given.dtype, False)
        return normed_composite.steps(
            call, given, states, weights.w_hh, weights.b_hh, None, None, weights.norm_hh,
            weights.norm_c,
        )[1]  # fmt: skip

    return terms, step


@dataclass(frozen=True)
class Settings:
    """How to measure, and beside whom."""

    blocks: int
    min_time: float
    compiled: bool
    onnx: bool


def row(variant: Variant, shape: tuple[int, int, int, int], settings: Settings) -> dict[str, Any]:
    """Of one variant and shape, in inference and in training."""
    steps, batch, inputs, hidden = shape
    plain = getattr(fastcell, variant.base)(inputs, hidden)
    layer = getattr(fastcell, variant.layer)(inputs, hidden, **variant.options)
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    gradient = torch.randn(steps, batch, hidden)
    call = variant.call(steps, batch)
    wanted = layer.eval()(x, **call)[0]
    loops: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if variant.loop:
        loops["over loop"] = python_loop(layer, call.get("reset"), False)
        if settings.compiled:
            loops["over compiled loop"] = python_loop(layer, call.get("reset"), True)
    for loop in loops.values():
        # (Single numbers of long sequences differ by more than most: rounding grows through norms.)
        there = loop(x)
        torch.testing.assert_close(wanted, there, rtol=1e-2, atol=1e-2)
        error = (wanted - there).square().mean().sqrt()
        assert error < 1e-4, f"{variant.name}: a loop differs by {error:.1e}"

    def timed(of: torch.nn.Module, output: Callable[[], torch.Tensor], training: bool) -> Run:
        leaves = [x, *[p for p in of.parameters() if p.requires_grad]]
        if training:
            return lambda: torch.autograd.grad(output(), leaves, gradient)

        def run() -> object:
            with torch.no_grad():
                return output()

        return run

    found: dict[str, Any] = {}
    for mode in ("inference", "training"):
        # (Zoneout and the dropouts draw in training alone.)
        training = mode == "training"
        layer.train(training)
        runs: dict[str, Run | Peer] = {
            "plain": timed(plain, lambda: plain(x)[0], training),
            "own": timed(layer, lambda: layer(x, **call)[0], training),
        }
        for name, loop in loops.items():
            runs[name] = timed(layer, partial(loop, x), training)
        with ExitStack() as peers:
            if not training and settings.onnx and not why_not(layer, call):
                peer = peers.enter_context(OnnxRuntime(layer, x, call))
                torch.testing.assert_close(wanted, peer.output(), rtol=1e-3, atol=1e-3)
                runs["over onnxruntime"] = peer
            every = alternate(list(runs.values()), settings.blocks, settings.min_time)
        times = dict(zip(runs, every, strict=True))
        base, own = times.pop("plain"), times.pop("own")
        found[mode] = {
            "µs": statistics.median(own) * 1e6,
            "of plain": 1 / gain(base, own),
            **{name: gain(other, own) for name, other in times.items()},
        }
    return found


def text_of(found: dict[str, float], columns: list[str]) -> str:
    """A mode's columns of the table's row."""
    cells = [f"{found['of plain']:.2f}"]
    cells += [f"{found[name]:.1f}x" if name in found else "" for name in columns]
    return "".join([f"{cell:>9}" for cell in cells])


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 for bad options."""
    command = parser()
    options = command.parse_args(argv)
    shapes = []
    for text in options.shape or _SHAPES:
        try:
            shapes.append(parse_shape(f"LSTM:{text}")[1:])
        except ValueError as error:
            command.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    document: dict[str, Any] = {
        "fastcell": fastcell.info(), "threads": torch.get_num_threads(), "rows": [],
    }  # fmt: skip
    print(f"fastcell {fastcell.__version__}, {torch.get_num_threads()} threads")
    print(
        "time by that of the plain cell; how many times faster than a loop over torch's operations"
    )
    columns = ["over loop"] + ["over compiled loop"] * options.compile
    columns_of = {"inference": columns + ["over onnxruntime"] * options.onnx, "training": columns}
    titles = {"over loop": "loop", "over compiled loop": "compiled", "over onnxruntime": "ort"}
    heads = [["plain", *[titles[c] for c in wanted]] for wanted in columns_of.values()]
    widths = [9 * len(head) for head in heads]
    print(f"\n{'':38}{'inference':>{widths[0]}}{'training':>{widths[1]}}")
    print(f"{'':38}" + "".join([f"{name:>9}" for head in heads for name in head]))
    settings = Settings(options.blocks, options.min_time, options.compile, options.onnx)
    for shape in shapes:
        for variant in VARIANTS:
            if options.only and options.only not in variant.name:
                continue
            found = row(variant, shape, settings)
            document["rows"].append(
                {"base": variant.base, "variant": variant.name, "shape": shape, **found}
            )
            texts = [text_of(found[mode], wanted) for mode, wanted in columns_of.items()]
            label = f"{variant.base} {variant.name} {':'.join(map(str, shape))}"
            print(f"{label:38}" + "".join(texts), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(document, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
