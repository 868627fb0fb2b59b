"""What the tests of cells' options share: options to try, and all that a call may bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcell import noise, reference
from fastcell.cells import CELLS, Options, delay_of, options_of, spec_of
from fastcell.plan import Config, Extras
from tolerances import accumulation_length, assert_close

CHOICES = {
    "rnn_general": Options("sigmoid", "tanh", math.inf, 0.3, 0.0),
    "independent": Options("elu", "tanh", math.inf, 0.2, 0.0),
    "lstm_general": Options("relu", "softsign", 0.8, 0.2, 0.4),
    "lstm_peephole_general": Options("elu", "identity", 1.1, 0.0, 0.3),
    "lstm_coupled_general": Options("identity", "sigmoid", math.inf, 0.3, 0.0),
    "lstm_coupled_peephole_general": Options("softsign", "elu", 0.5, 0.1, 0.2),
    "gru_general": Options("softsign", "tanh", math.inf, 0.4, 0.0),
    "gru_before": Options("elu", "tanh", math.inf, 0.3, 0.0),
}
PLAIN = [name for name in CELLS if name not in CHOICES]
EXTRAS = [(), ("dropout", "recurrent", "reset", "seed"), ("recurrent",), ("reset",), ("seed",)]
STEPS = 6


def lengths_of(batch: int, form: str) -> Tensor:
    """Of all steps and less; falling, but where a call takes lengths in any order."""
    falling = STEPS - torch.arange(batch) * STEPS // batch
    return falling.roll(batch // 2) if form == "lengths" else falling


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
    delay: int = 0,
    beside: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and states of a stack, of numbers that reach all branches.

    ``delay``: of links beside those of length one, or in place of them.
    """
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
            if delay and beside:
                weights.append(draw(spec.gates * hidden, output))
    rows = ((delay or 1) * batch, batch if beside else delay * batch)
    states = [
        draw(layers * directions, n, size)
        for n, size in zip(rows, (output, hidden)[: spec.states], strict=False)
    ]
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
    lengths = lengths_of(batch, form)
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
    rows = (int(lengths_of(batch, form).sum()),) if form == "packed" else (STEPS, batch)
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
    total = sum(t.square().sum() * (1 + i) for i, t in enumerate((output, *states)))
    return [output, *states, *torch.autograd.grad(total, leaves)]


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """To rounding, of sums of numbers as large as the largest."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * max(1.0, b.abs().max().item()))


def assert_within_policy(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    config: Config,
    sizes: tuple[int, int, int],
    batch: int,
) -> None:
    """What ``results`` gave, under the policy of tolerances.py; ``sizes``: of input, H, P."""
    features, hidden, output = sizes
    spec = spec_of(config.cell)
    width = max(features, (1 + config.bidirectional) * output)
    whole = accumulation_length(width, hidden, gates=spec.gates, batch=batch)
    first_gradient, first_parameter = 1 + spec.states, 2 + 2 * spec.states
    # A parameter's gradient is a sum over all rows: its unit is the size of them all.
    sums = torch.cat([t.double().flatten() for t in wanted[first_parameter:]])
    size = max(1.0, sums.square().mean().sqrt().item())
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_close(
            a, b, dtype=found[0].dtype, steps=config.num_layers * STEPS,
            length=accumulation_length(width, hidden) if i < first_gradient else whole,
            unit=1.0 if i < first_parameter else size, name=f"value {i}",
        )  # fmt: skip


class ByReference:
    """A call's equal for the NumPy reference, in float64 (or another dtype of NumPy)."""

    def __init__(
        self,
        config: Config,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        form: str,
        extras: Extras,
        dtype: Any = np.float64,
        skip: int = 0,
    ) -> None:
        """``skip``: of links in place of those of length one."""
        batch = states[0].shape[1] // (skip or delay_of(config.cell) or 1)
        lengths = lengths_of(batch, form).numpy()
        self.alive = np.arange(STEPS)[:, None] < lengths
        self.packed = form == "packed"
        options = options_of(config.cell)
        spec = spec_of(config.cell)
        self.x = self._padded(_array(x, dtype))
        self.states = [_array(t, dtype) for t in states]
        self.weights = [_array(t, dtype) for t in weights]
        self.cell = spec.name
        self.arguments: dict[str, Any] = {
            "num_layers": config.num_layers,
            "bidirectional": config.bidirectional,
            "lengths": None if form == "padded" else lengths,
            "skip": skip or delay_of(config.cell) or 1,
            "skip_beside": delay_of(config.cell) > 0,
        }
        if self.cell in CHOICES:
            self.arguments["options"] = reference.Options(*options)
        if extras.dropout is not None:
            masks = [self._padded(_array(t, dtype)) for t in extras.dropout]
            self.arguments["dropout_masks"] = np.array(masks, dtype).reshape(
                config.num_layers - 1, STEPS, batch, -1
            )
        if extras.recurrent is not None:
            self.arguments["recurrent_masks"] = _array(extras.recurrent, dtype)
        if extras.reset is not None:
            self.arguments["reset"] = self._padded(extras.reset.numpy())
        if extras.seed is not None:
            hidden = self.weights[0].shape[0] // spec.gates
            self.arguments["holds"] = [
                self._drawn(extras.seed, i, hidden, p, dtype) if p else None
                for i, p in enumerate(options.zoneout[: spec.states])
            ]

    def forward(self, values: Sequence[np.ndarray] | None = None, **arguments: Any) -> Any:
        """With other values of [x, *states, *weights], if given."""
        x, *rest = self.values if values is None else values
        count = len(self.states)
        given = self.arguments | arguments
        return reference.forward(self.cell, x, rest[:count], rest[count:], **given)

    @property
    def values(self) -> list[np.ndarray]:
        return [self.x, *self.states, *self.weights]

    def results(self) -> list[np.ndarray]:
        """Output, final states and gradients, of the same function as in ``results``, padded."""
        result = self.forward()
        forward = [result.output, *result.states]
        upstream = [2 * (1 + i) * t for i, t in enumerate(forward)]
        grads = reference.backward(result.tape, upstream[0], upstream[1:])
        return [*forward, grads.input, *grads.states, *grads.weights]

    def as_tensors(self) -> list[Tensor]:
        """``results`` in the form of the call."""
        found = self.results()
        if self.packed:
            for i in (0, 1 + len(self.states)):
                found[i] = found[i][self.alive]
        return [torch.from_numpy(t) for t in found]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        if not self.packed:
            return rows
        padded = np.zeros((*self.alive.shape, *rows.shape[1:]), rows.dtype)
        padded[self.alive] = rows
        return padded

    def _drawn(self, seed: Tensor, state: int, hidden: int, p: float, dtype: Any) -> np.ndarray:
        rows = torch.arange(int(self.alive.sum()) if self.packed else self.alive.size)
        drawn = []
        for k in range(len(self.states[0])):
            held = noise.held(seed, k, state, rows, hidden, p).numpy().astype(dtype)
            drawn.append(self._padded(held).reshape(*self.alive.shape, hidden))
        return np.stack(drawn)


def _array(t: Tensor, dtype: Any) -> np.ndarray:
    return t.detach().double().numpy().astype(dtype)
