"""The layer stack in plain, differentiable torch operations, one step at a time.

It serves where no kernel does: derivatives of derivatives, forward-mode differentiation, devices
without kernels. It is slow and exact; its step functions are the kernels' equations in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .autocast import without_autocast
from .cells import CELLS, weights_per_direction
from .plan import Config

States = tuple[Tensor, ...]


def _rnn_tanh(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    return (torch.tanh(x + h),)


def _rnn_relu(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    return (torch.relu(x + h),)


def _leaky_tanh(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    assert p is not None
    return (p[0] * state[0] + (1 - p[0]) * torch.tanh(x + h),)


def _leaky_relu(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    assert p is not None
    return (p[0] * state[0] + (1 - p[0]) * torch.relu(x + h),)


def _lstm(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_variant(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    """With peepholes, coupled gates or both: rows of p are i, f (unless coupled), o."""
    coupled = p is None or p.shape[0] == 2
    *inner, g, o = (x + h).chunk(3 if coupled else 4, -1)
    if p is not None:
        inner = [a + row * state[1] for a, row in zip(inner, p, strict=False)]
    i = torch.sigmoid(inner[0])
    f = 1 - i if coupled else torch.sigmoid(inner[1])
    c = f * state[1] + i * torch.tanh(g)
    o = torch.sigmoid(o if p is None else o + p[-1] * c)
    return o * torch.tanh(c), c


def _gru(x: Tensor, h: Tensor, state: States, p: Tensor | None) -> States:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = h.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - z) * n + z * state[0],)


# (input term, recurrent term, previous states, the cell's own vectors) -> new states; each term
# includes its bias.
_STEPS: dict[str, Callable[[Tensor, Tensor, States, Tensor | None], States]] = {
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
    "lstm": _lstm,
    "gru": _gru,
    "leaky_tanh": _leaky_tanh,
    "leaky_relu": _leaky_relu,
    "lstm_peephole": _lstm_variant,
    "lstm_coupled": _lstm_variant,
    "lstm_coupled_peephole": _lstm_variant,
}


def _direction(
    cell: str,
    projected: Sequence[Tensor],
    state: States,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    parameters: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer in one direction; ``projected[t]`` holds the rows alive at step t (a prefix).

    ``lengths``: instead, all rows are there, and each sample's steps are as many.
    """
    step = _STEPS[cell]
    steps = len(projected)
    alive = [p.shape[0] for p in projected]
    outputs: list[Tensor] = [projected[0]] * steps
    # A sample whose sequence has ended keeps its state behind those still running.
    for t in reversed(range(steps)) if reverse else range(steps):
        n = alive[t]
        current = tuple(s[:n] for s in state)
        new = step(projected[t], linear(current[0], w_hh, b_hh), current, parameters)
        if w_hr is not None:
            new = (linear(new[0], w_hr), *new[1:])
        outputs[t] = new[0]
        if lengths is not None:
            runs = (t < lengths)[:, None]
            outputs[t] = new[0].where(runs, 0)
            state = tuple(a.where(runs, b) for a, b in zip(new, state, strict=True))
        elif n == state[0].shape[0]:
            state = new
        else:
            state = tuple(torch.cat((a, s[n:])) for a, s in zip(new, state, strict=True))
    return torch.cat(outputs), state


def zero_states(
    config: Config, input: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> list[Tensor]:
    """Initial states for a call without: each (L*D, B, .), of the input's kind."""
    if input.dim() == 3:
        batch = input.shape[0 if config.batch_first else 1]
    else:
        assert batch_sizes is not None
        batch = int(batch_sizes[0])
    spec = CELLS[config.cell]
    count = config.num_layers * (2 if config.bidirectional else 1)
    sizes = (weights[1].shape[1], weights[0].shape[0] // spec.gates)[: spec.states]
    return [input.new_zeros((count, batch, size)) for size in sizes]


def sequence(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    masks: Tensor | None,
) -> tuple[Tensor, States]:
    """The stack on ``input`` (T, B, I) (``batch_first``: (B, T, I); packed: (rows, I)).

    ``batch_sizes``: of packed input, or of padded input the lengths of its samples.

    Returns the output in the input's layout and the final states, each (L*D, B, .).
    """
    if hx is None:
        hx = zero_states(config, input, weights, batch_sizes)
    with without_autocast(input):
        return _sequence(config, input, hx, weights, batch_sizes, masks)


def _sequence(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    masks: Tensor | None,
) -> tuple[Tensor, States]:
    num_layers, bias, batch_first = config.num_layers, config.bias, config.batch_first
    directions = 2 if config.bidirectional else 1
    width = len(weights) // (num_layers * directions)
    parameters = CELLS[config.cell].parameters
    has_projection = width > weights_per_direction(bias, False, parameters=parameters)
    lengths = None
    if batch_sizes is not None and input.dim() == 3:
        lengths, batch_sizes = batch_sizes, None
    if batch_sizes is None:
        padded = input.transpose(0, 1) if batch_first else input
        steps, batch = padded.shape[0], padded.shape[1]
        rows = padded.reshape(steps * batch, padded.shape[2])
        alive = [batch] * steps
    else:
        rows, alive = input, batch_sizes.tolist()
        steps, batch = len(alive), alive[0]

    finals: list[States] = []
    for layer in range(num_layers):
        if layer > 0 and masks is not None:
            rows = rows * masks[layer - 1].reshape(rows.shape)
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w = weights[k * width : (k + 1) * width]
            b_ih, b_hh = (w[2], w[3]) if bias else (None, None)
            out, final = _direction(
                config.cell,
                linear(rows, w[0], b_ih).split(alive),  # type: ignore[no-untyped-call]
                tuple(h[k] for h in hx),
                w[1],
                b_hh,
                w[2 + 2 * bias] if has_projection else None,
                w[-1] if parameters else None,
                reverse=direction == 1,
                lengths=lengths,
            )
            outputs.append(out)
            finals.append(final)
        rows = torch.cat(outputs, -1) if directions == 2 else outputs[0]

    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if batch_sizes is not None:
        return rows, states
    output = rows.reshape(steps, batch, rows.shape[-1])
    return (output.transpose(0, 1) if batch_first else output), states
