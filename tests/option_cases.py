"""What the tests of cells' options share: options to try, and all that a call may bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcell.cells import CELLS, Options, spec_of
from fastcell.plan import Extras

CHOICES = {
    "rnn_general": Options("sigmoid", "tanh", math.inf, 0.3, 0.0),
    "independent": Options("elu", "tanh", math.inf, 0.2, 0.0),
    "lstm_general": Options("relu", "softsign", 0.8, 0.2, 0.4),
    "lstm_peephole_general": Options("elu", "identity", 1.1, 0.0, 0.3),
    "lstm_coupled_general": Options("identity", "sigmoid", math.inf, 0.3, 0.0),
    "lstm_coupled_peephole_general": Options("softsign", "elu", 0.5, 0.1, 0.2),
    "gru_general": Options("softsign", "tanh", math.inf, 0.4, 0.0),
}
PLAIN = [name for name in CELLS if name not in CHOICES]
EXTRAS = [(), ("dropout", "recurrent", "reset", "seed"), ("recurrent",), ("reset",), ("seed",)]
STEPS = 6


def lengths_of(batch: int) -> Tensor:
    """Falling, the first of all steps."""
    return STEPS - torch.arange(batch) * STEPS // batch


def tensors(
    cell: str,
    *,
    layers: int = 2,
    directions: int = 2,
    proj: int = 0,
    sizes: tuple[int, int] = (5, 7),
    batch: int = 3,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.4,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and states of a stack, of numbers that reach all branches."""
    spec = spec_of(cell)
    features, hidden = sizes
    generator = torch.Generator().manual_seed(len(cell))

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return numbers.to(dtype).requires_grad_()

    weights = []
    output = proj or hidden
    for layer in range(layers):
        wide = features if layer == 0 else directions * output
        for _ in range(directions):
            weights.append(draw(spec.gates * hidden, wide))
            weights.append(draw(spec.gates * hidden if spec.recurrent else spec.parameters, output))
            weights += [draw(spec.gates * hidden), draw(spec.gates * hidden)]
            if proj:
                weights.append(draw(proj, hidden))
            if spec.rows:
                weights.append(draw(spec.rows, hidden))
    states = [draw(layers * directions, batch, n) for n in (output, hidden)[: spec.states]]
    return weights, states


def extras_for(
    form: str,
    *,
    layers: int,
    directions: int,
    batch: int,
    output: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor | None, Extras]:
    """``batch_sizes`` of a "padded" or "packed" call or one with "lengths", and all extras."""
    generator = torch.Generator().manual_seed(7)
    lengths = lengths_of(batch)
    sizes = {"packed": (torch.arange(STEPS)[:, None] < lengths).sum(1), "lengths": lengths}.get(
        form
    )
    times = (int(lengths.sum()),) if form == "packed" else (STEPS, batch)

    def chance(p: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < p

    return sizes, Extras(
        2.0 * chance(0.5, layers - 1, *times, directions * output).to(dtype),
        2.0 * chance(0.5, layers * directions, batch, output).to(dtype),
        chance(0.25, *times),
        torch.tensor([1 << 40 | 12345]),
    )


def input_for(form: str, batch: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = (int(lengths_of(batch).sum()),) if form == "packed" else (STEPS, batch)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(*rows, features, dtype=torch.float64, generator=generator)
    return x.to(dtype).requires_grad_()


def given(which: Sequence[str], extras: Extras) -> Extras:
    return Extras(*[t if name in which else None for name, t in extras._asdict().items()])


def allowed(cell: str, which: Sequence[str]) -> tuple[str, ...]:
    """Those that a cell can have."""
    return tuple(w for w in which if w != "recurrent" or spec_of(cell).recurrent)


def results(run: Callable[[], Any], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Output, final states, and gradients of a function of them."""
    output, states = run()
    total = sum((t.sin() * (1 + i)).sum() for i, t in enumerate((output, *states)))
    return [output, *states, *torch.autograd.grad(total, leaves)]
