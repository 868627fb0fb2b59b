"""Rounding errors of fastcell and of torch.nn. `python -m fastcell_bench.accuracy`

The truth is torch.nn in float64 on the same inputs and weights, rounded to the dtype under test
first: what is measured is the layer's own arithmetic. Quantized layers are held against the weights
that they were made of, since rounding those is part of them.

    relative error = ||found - truth|| / ||truth||   over all steps, samples, units and seeds

A single seed's error is luck at T = 1, so the squares of several are pooled.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fastcell_bench import machine, record
from fastcell_bench.cli import whole
from fastcell_bench.limits import cache_levels

LESS_ACCURATE = 1
BAD_USAGE = 2
ALLOWED_RATIO = 1.05
SCHEMA = 1

CELLS = ("LSTM", "GRU", "RNN")
STEPS = (1, 10, 100, 1000, 10000)
OUTPUT = "output"
GRADIENTS = ("gradient of the input", "gradient of weight_hh")

_DESCRIPTION = """\
The errors of fastcell's layers and of torch.nn's against torch.nn in float64, on the same inputs
and weights: float32, bfloat16, float16 and quantized weights, the gradients in float32. A ratio is
fastcell's error over torch's: below 1, fastcell is the more accurate."""

_EPILOG = """\
exit status: 0; 1 if the relative error of fastcell's output is more than 5 % larger than torch's
in float32 or a 16-bit dtype at any number of steps; 2 for bad options."""


class NoPeerError(Exception):
    """torch has no counterpart to a variant; one sentence why."""


@dataclass(frozen=True)
class Sizes:
    """T, B, I, H of a layer under test."""

    T: int
    B: int
    I: int  # noqa: E741 - the equations' own name
    H: int


@dataclass(frozen=True)
class Variant:
    """One way to run a layer. `theirs` raises NoPeerError where torch has no such thing.

    dtype: of the input, and what the weights are rounded to before the truth is computed.
    quantized: what fastcell.quantize stores the weights in. Not judged: int8 is defined differently
        by each library.
    """

    name: str
    dtype: torch.dtype
    quantized: torch.dtype | None = None

    @property
    def judged(self) -> bool:
        return self.quantized is None

    @property
    def gradients(self) -> bool:
        return self.judged and self.dtype is torch.float32

    def ours(self, library: Any, layer: Module) -> Module:
        """fastcell's form of torch.nn's `layer`."""
        if self.quantized is not None:
            small: Module = library.quantize(layer, self.quantized)
            return small
        return _rebuilt(library, layer, self.dtype)

    def theirs(self, layer: Module) -> Module:
        """torch's form of it."""
        if self.quantized is None:
            return _rebuilt(torch.nn, layer, self.dtype)
        if self.quantized is torch.int8:
            return _dynamically_quantized(layer)
        raise NoPeerError(f"torch has no layers with {_name(self.quantized)} weights")


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("float32", torch.float32),
        Variant("bfloat16", torch.bfloat16),
        Variant("float16", torch.float16),
        Variant("int8-weights", torch.float32, torch.int8),
        Variant("bfloat16-weights", torch.float32, torch.bfloat16),
    )
}


@dataclass
class Pool:
    """Errors of several arrays as if they were one."""

    squared_error: float = 0.0
    squared_truth: float = 0.0
    largest: float = 0.0

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Raises ValueError for another shape, which broadcasting would hide."""
        if found.shape != truth.shape:
            raise ValueError(f"found {tuple(found.shape)}, expected {tuple(truth.shape)}")
        difference = found.double() - truth
        self.squared_error += float(difference.square().sum())
        self.squared_truth += float(truth.square().sum())
        largest = float(difference.abs().max())
        if math.isnan(largest) or largest > self.largest:  # max() of Python may drop a NaN
            self.largest = largest

    @property
    def relative(self) -> float:
        if not self.squared_truth:
            return 0.0 if not self.squared_error else math.inf
        return math.sqrt(self.squared_error / self.squared_truth)


@dataclass(frozen=True)
class Measurement:
    """Both libraries' errors of one quantity; None where torch has no counterpart."""

    variant: str
    cell: str
    T: int
    quantity: str
    ours: Pool
    theirs: Pool | None

    @property
    def ratio(self) -> float | None:
        """fastcell's relative error over torch's; None where that is 0 or there is none."""
        if self.theirs is None or not self.theirs.relative:
            return None
        return self.ours.relative / self.theirs.relative

    @property
    def less_accurate(self) -> bool:
        """More than rounding's own scatter worse than torch. NaN is worse than anything."""
        if self.theirs is None or math.isnan(self.theirs.relative):
            return False
        return not self.ours.relative <= ALLOWED_RATIO * self.theirs.relative

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: getattr(self, name) for name in _KEYS}
        for name, pool in (("fastcell", self.ours), ("torch", self.theirs)):
            values[name] = pool and {"relative_error": pool.relative, "largest_error": pool.largest}
        return {**values, "ratio": self.ratio}


_KEYS = ("variant", "cell", "T", "quantity")


@dataclass
class Report:
    """All measurements, and why a peer is missing, by variant and cell."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """A sentence for each output that is less accurate than torch's."""
        return [
            f"{found.variant} {found.cell} at T = {found.T}: relative error of the output"
            f" {found.ours.relative:.2e}, torch's is {found.theirs.relative:.2e}"
            for found in self.measurements
            if VARIANTS[found.variant].judged
            and found.quantity == OUTPUT
            and found.theirs is not None
            and found.less_accurate
        ]


def measure(
    library: Any, variant: Variant, cell: str, sizes: Sizes, seeds: int, report: Report
) -> None:
    """Add the errors of one variant, cell and T to the report: its outputs and, in float32, its
    gradients."""
    quantities = (OUTPUT, *(GRADIENTS if variant.gradients else ()))
    ours = {quantity: Pool() for quantity in quantities}
    theirs: dict[str, Pool] | None = {quantity: Pool() for quantity in quantities}
    for seed in range(seeds):
        layer, x, gradient = _draw(cell, sizes, seed, variant.dtype)
        exact = _values(_rebuilt(torch.nn, layer, torch.float64), x.double(), gradient, quantities)
        found = _values(variant.ours(library, layer), x, gradient, quantities)
        _add(ours, found, exact)
        if theirs is None:
            continue
        try:
            _add(theirs, _values(variant.theirs(layer), x, gradient, quantities), exact)
        except NoPeerError as reason:
            theirs = None
            report.skipped[f"{variant.name} {cell}"] = str(reason)
        except (RuntimeError, NotImplementedError) as error:  # torch, of a dtype on this CPU
            theirs = None
            report.skipped[f"{variant.name} {cell}"] = " ".join(str(error).split())[:200]
    report.measurements += [
        Measurement(
            variant.name,
            cell,
            sizes.T,
            quantity,
            ours[quantity],
            None if theirs is None else theirs[quantity],
        )
        for quantity in quantities
    ]


def _draw(cell: str, sizes: Sizes, seed: int, dtype: torch.dtype) -> tuple[Module, Tensor, Tensor]:
    """torch.nn's layer with its default weights, standard normal input (T, B, I) and gradient of
    the output (T, B, H), all rounded to `dtype`; the gradient stays float64, of float32 values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer: Module = getattr(torch.nn, cell)(sizes.I, sizes.H)
        x = torch.randn(sizes.T, sizes.B, sizes.I)
        gradient = torch.randn(sizes.T, sizes.B, sizes.H)
    return layer.to(dtype), x.to(dtype), gradient.double()


def _values(
    module: Module, x: Tensor, gradient: Tensor, quantities: Sequence[str]
) -> dict[str, Tensor]:
    """The output without gradients, as a user of the layer in inference gets it; then these."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its quantization will be replaced
        found = {OUTPUT: module(x)[0]}
    if len(quantities) > 1:
        x = x.clone().requires_grad_()
        wanted = [x, module.get_parameter("weight_hh_l0")]
        gradients = torch.autograd.grad(module(x)[0], wanted, gradient.to(x.dtype))
        found.update(zip(GRADIENTS, gradients, strict=True))
    return found


def _add(pools: dict[str, Pool], found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for quantity, pool in pools.items():
        pool.add(found[quantity], exact[quantity])


def _rebuilt(library: Any, layer: Module, dtype: torch.dtype) -> Module:
    """The library's layer of the same kind with the same weights."""
    rebuilt: Module = getattr(library, type(layer).__name__)(
        layer.input_size, layer.hidden_size, dtype=dtype
    )
    rebuilt.load_state_dict(layer.state_dict())
    return rebuilt


def _dynamically_quantized(layer: Module) -> Module:
    """By torch.ao.quantization, where this torch has it and it knows the layer."""
    try:
        quantization: Any = importlib.import_module("torch.ao.quantization")
        quantize_dynamic: Callable[..., Any] = quantization.quantize_dynamic
    except (ImportError, AttributeError) as error:
        raise NoPeerError(f"this torch has no quantize_dynamic: {error}") from None
    if torch.backends.quantized.engine == "none":
        raise NoPeerError("torch has no engine for quantized layers on this CPU")
    # It replaces children only, and on the way moves the weights of what it is given.
    model = torch.nn.Sequential(copy.deepcopy(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small: Module = quantize_dynamic(model, {type(layer)}, dtype=torch.qint8)[0]
    if isinstance(small, type(layer)):
        raise NoPeerError(f"quantize_dynamic leaves torch.nn.{type(layer).__name__} as it is")
    return small


def section_lines(report: Report, variant: str, cells: Sequence[str]) -> Iterator[str]:
    """The variant's part of the table: one block per quantity and kind of error."""
    chosen = [found for found in report.measurements if found.variant == variant]
    for quantity in dict.fromkeys(found.quantity for found in chosen):
        rows = [found for found in chosen if found.quantity == quantity]
        blocks: tuple[tuple[str, Callable[[Pool], float]], ...] = (
            ("relative error", lambda pool: pool.relative),
            ("largest error", lambda pool: pool.largest),
        )
        for title, value in blocks:
            yield ""
            yield f"{variant}, {quantity}: {title}"
            names = "".join(_GROUP.format(f"{cell} fastcell", "torch", "ratio") for cell in cells)
            yield f"{'T':>6}{names}"
            for T in dict.fromkeys(found.T for found in rows):
                line = {found.cell: found for found in rows if found.T == T}
                yield f"{T:>6}" + "".join(_columns(line[cell], value) for cell in cells)


_GROUP = "{:>16}{:>9}{:>7}"


def _columns(found: Measurement, value: Callable[[Pool], float]) -> str:
    ours, theirs = value(found.ours), None if found.theirs is None else value(found.theirs)
    if theirs is None:
        return _GROUP.format(f"{ours:.2e}", "-", "-")
    return _GROUP.format(f"{ours:.2e}", f"{theirs:.2e}", f"{ours / theirs:.2f}" if theirs else "-")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.accuracy",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": whole}
    one: dict[str, Any] = {"metavar": "N", "type": whole}
    result.add_argument("--steps", **many, default=list(STEPS), help="values of T (%(default)s)")
    result.add_argument("--batch", **one, default=2, help="samples, B (%(default)s)")
    result.add_argument("--input-size", **one, default=32, help="inputs, I (%(default)s)")
    result.add_argument("--hidden-size", **one, default=64, help="hidden units, H (%(default)s)")
    result.add_argument("--seeds", **one, default=5, help="problems pooled (%(default)s)")
    # Nothing is timed, and torch's small products only wait for each other on more of them.
    result.add_argument("--threads", **one, default=1, help="(%(default)s)")
    result.add_argument(
        "--cells", nargs="+", type=str.upper, choices=CELLS, default=list(CELLS), metavar="CELL",
        help="of lstm, gru, rnn (all)",
    )  # fmt: skip
    result.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"of {', '.join(VARIANTS)} (all)",
    )  # fmt: skip
    result.add_argument(
        "--json", metavar="FILE", help="also as JSON; - for stdout, the table then goes to stderr"
    )
    return result


def main(argv: Sequence[str], library: Any = None) -> int:
    """Run; the exit status is in the command's --help. library: what is called fastcell."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what was wrong
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    out = sys.stderr if options.json == "-" else sys.stdout
    if library is None:
        library = importlib.import_module("fastcell")
    steps, cells = (list(dict.fromkeys(given)) for given in (options.steps, options.cells))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    report = Report()
    try:
        print(_heading(options, library), file=out)
        for name in dict.fromkeys(options.variants):
            for T in steps:
                sizes = Sizes(T, options.batch, options.input_size, options.hidden_size)
                for cell in cells:
                    measure(library, VARIANTS[name], cell, sizes, options.seeds, report)
            print("\n".join(section_lines(report, name, cells)), file=out, flush=True)
        document = _document(argv, options, library, report)
    finally:
        torch.set_num_threads(threads_before)
    notes = [f"no peer for {what}: {why}" for what, why in report.skipped.items()]
    notes += [f"less accurate than torch: {sentence}" for sentence in report.failures]
    print("\n".join(["", *notes]) if notes else "", file=out, flush=True)
    if options.json == "-":
        print(json.dumps(document, indent=2))
    elif options.json:
        try:
            record.write(options.json, document)
        except OSError as error:
            print(f"accuracy: no JSON written: {error}", file=sys.stderr)
            return BAD_USAGE
    return LESS_ACCURATE if report.failures else 0


def _document(
    argv: Sequence[str], options: argparse.Namespace, library: Any, report: Report
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": ["python", "-m", "fastcell_bench.accuracy", *argv],
        "settings": {
            **{name: getattr(options, name) for name in _SETTINGS},
            "threads": torch.get_num_threads(),
        },
        "machine": machine.describe(cache_levels(torch.get_num_threads())),
        "versions": {"fastcell": _version(library), "torch": torch.__version__},
        "rows": [found.to_json() for found in report.measurements],
        "skipped": report.skipped,
        "failures": report.failures,
    }


_SETTINGS = ("steps", "batch", "input_size", "hidden_size", "seeds", "cells", "variants")


def _heading(options: argparse.Namespace, library: Any) -> str:
    return (
        f"fastcell {_version(library)} and torch {torch.__version__} against torch.nn in float64:"
        f" B {options.batch}, I {options.input_size}, H {options.hidden_size},"
        f" {options.seeds} seed{'s' if options.seeds != 1 else ''}"
    )


def _version(library: Any) -> str:
    return str(getattr(library, "__version__", ""))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
