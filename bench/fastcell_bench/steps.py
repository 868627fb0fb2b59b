"""One step at a time: cells and layers of one step, against torch.nn's, in a loop of Python.
`python -m fastcell_bench.steps`

A step of a control loop, of reinforcement learning or of a decoder is one call for few samples: the
way from Python to the kernels and back is most of it. Blocks of the two libraries alternate in one
process (they share a pool of threads, which does not spin after a call). Times are medians of
blocks, ratios medians over pairs of neighbouring blocks. Before a row is timed, its results and
gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastcell
from fastcell_bench.cli import positive, whole
from fastcell_bench.ratios import median, paired_ratio
from fastcell_bench.variants import alternate

MODULES = ("RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM")
MODES = ("no_grad", "forward", "training", "learning")
_DESCRIPTION = """\
One step (B samples, H inputs and units) through a module, and through torch.nn's: under no_grad;
with gradients on; training: that, and the gradients of input, states and parameters; learning:
that, and a step of SGD, after which the weights are others."""


class Case(NamedTuple):
    """A row of the table."""

    module: str
    B: int
    H: int

    @property
    def label(self) -> str:
        return f"{self.module}:{self.B}:{self.H}"


def parse_case(text: str) -> Case:
    """MODULE:B:H; raises argparse.ArgumentTypeError."""
    module, *numbers = text.split(":")
    if (
        module not in MODULES
        or len(numbers) != 2
        or not all(n.isdigit() and int(n) for n in numbers)
    ):
        raise argparse.ArgumentTypeError(f"expected MODULE:B:H, MODULE of {MODULES}, got {text!r}")
    return Case(module, *(int(n) for n in numbers))


CASES = [Case(m, B, H) for m in MODULES for B, H in ((1, 128), (16, 64))]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.steps",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--case", action="append", type=parse_case, metavar="MODULE:B:H")
    result.add_argument("--threads", type=whole, metavar="N", help="default: torch's")
    result.add_argument("--blocks", type=whole, default=15, metavar="N", help="(15)")
    result.add_argument("--min-time", type=positive, default=0.03, metavar="S", help="(0.03)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


class Step:
    """One step through a module, and what may follow it."""

    def __init__(self, library: Any, case: Case) -> None:
        torch.manual_seed(0)
        self.module = getattr(library, case.module)(case.H, case.H)
        leading = (case.B,) if case.module.endswith("Cell") else (1, case.B)
        self.x = torch.randn(*leading, case.H, requires_grad=True)
        states = [torch.randn(*leading, case.H, requires_grad=True) for _ in range(2)]
        self.hx: Any = tuple(states) if "LSTM" in case.module else states[0]
        self.grad = torch.randn(*leading, case.H)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-6)

    def results(self) -> list[Tensor]:
        """Output and states, or a cell's states."""
        found = self.module(self.x, self.hx)
        parts = found if isinstance(found, tuple) else (found,)
        return [t for part in parts for t in (part if isinstance(part, tuple) else (part,))]

    def output(self) -> Tensor:
        return self.results()[0]

    def no_grad(self) -> None:
        with torch.no_grad():
            self.output()

    def forward(self) -> None:
        self.output()

    def training(self) -> Sequence[Tensor]:
        states = self.hx if isinstance(self.hx, tuple) else (self.hx,)
        return torch.autograd.grad(self.output(), [self.x, *states, *self.parameters], self.grad)

    def learning(self) -> None:
        grads = self.training()[-len(self.parameters) :]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.optimizer.step()


def differ(a: Step, b: Step) -> bool:
    """Whether a result or a gradient is not the same within the tolerance of its sums' lengths.

    Both ways of fastcell's are looked at: that of a first call, and that of one that comes again.
    """
    weight = next(p for p in a.parameters if p.dim() == 2)
    allowed = 4 * math.ceil(math.log2(sum(weight.shape))) * torch.finfo(torch.float32).eps
    for _ in range(4):
        pairs = [*zip(a.results(), b.results(), strict=True)]
        pairs += zip(a.training(), b.training(), strict=True)
        for found, wanted in pairs:
            error = (found - wanted).detach().abs().max()
            if not bool(error <= allowed * wanted.detach().abs().max()):
                return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0, or 1 if a row differs."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"fastcell {fastcell.__version__}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads\nµs per step, and how many times as long torch.nn's")
    print(f"{'':18}" + "".join(f"{mode:>20}" for mode in MODES))
    status, rows = 0, []
    for case in options.case or CASES:
        ours, theirs = Step(fastcell, case), Step(torch.nn, case)
        if differ(ours, theirs):
            print(f"{case.label:18} differs")
            status = 1
            continue
        line = f"{case.label:18}"
        for mode in MODES:
            runs: list[Callable[[], object]] = [getattr(s, mode) for s in (ours, theirs)]
            own, peer = alternate(runs, options.blocks, options.min_time)
            ratio = paired_ratio(peer, own)
            rows.append({"row": case.label, "mode": mode, "us": median(own) * 1e6, "ratio": ratio})
            line += f"{median(own) * 1e6:12.1f} {ratio:6.2f}x"
        print(line, flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
