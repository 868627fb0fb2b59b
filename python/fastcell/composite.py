"""The layer stack in plain, differentiable torch operations, one step at a time.

It serves where no kernel does: derivatives of derivatives, forward-mode differentiation, devices
without kernels. It is slow and exact; its step functions are the kernels' equations in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import noise
from .autocast import without_autocast
from .cells import Options, delay_of, options_of, remembered_of, spec_of, weights_per_direction
from .plan import Config, Extras

States = tuple[Tensor, ...]


Step = Callable[[Tensor, Tensor, States, Tensor | None, Options], States]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "softsign": torch.nn.functional.softsign,
    "elu": torch.nn.functional.elu,
}


def _rnn(x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options) -> States:
    return (_ACTIVATIONS[options.activation](x + h),)


def _rnn_relu(x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options) -> States:
    return (torch.relu(x + h),)


def _leaky(plain: Step) -> Step:
    def step(x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options) -> States:
        assert p is not None
        (v,) = plain(x, h, state, p, options)
        return (p[0] * state[0] + (1 - p[0]) * v,)

    return step


def _lstm(x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_variant(
    x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options
) -> States:
    """With peepholes (rows of p: i, f unless coupled, o), coupled gates, options."""
    activation, output_activation, clip, *_ = options

    def bounded(a: Tensor) -> Tensor:
        return a.clamp(-clip, clip) if clip < math.inf else a

    gates = x.shape[-1] // state[1].shape[-1]
    *inner, g, o = (x + h).chunk(gates, -1)
    if p is not None:
        inner = [a + row * state[1] for a, row in zip(inner, p, strict=False)]
    i = torch.sigmoid(bounded(inner[0]))
    f = 1 - i if gates == 3 else torch.sigmoid(bounded(inner[1]))
    c = f * state[1] + i * _ACTIVATIONS[activation](bounded(g))
    o = torch.sigmoid(bounded(o if p is None else o + p[-1] * c))
    return o * _ACTIVATIONS[output_activation](c), c


def _gru(x: Tensor, h: Tensor, state: States, p: Tensor | None, options: Options) -> States:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = h.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    n = _ACTIVATIONS[options.activation](xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - z) * n + z * state[0],)


def _gru_before(x: Tensor, h: Tensor, state: States, options: Options, part: Part) -> States:
    r, z = torch.sigmoid(x[..., : h.shape[-1]] + h).chunk(2, -1)
    rows = h.shape[-1]
    seen = _seen(part, state[0])
    b_hh = None if part.b_hh is None else part.b_hh[rows:]
    n = _ACTIVATIONS[options.activation](x[..., rows:] + linear(r * seen, part.w_hh[rows:], b_hh))
    return ((1 - z) * n + z * state[0],)


# (input term, recurrent term, previous states, the cell's own vectors, options) -> new states; each
# term includes its bias.
_STEPS: dict[str, Step] = {
    "rnn_tanh": _rnn,
    "rnn_relu": _rnn_relu,
    "rnn_general": _rnn,
    "independent": _rnn,
    "lstm": _lstm,
    "gru": _gru,
    "gru_general": _gru,
    "leaky_tanh": _leaky(_rnn),
    "leaky_relu": _leaky(_rnn_relu),
}


class Part(NamedTuple):
    """What belongs to one layer and direction of a call."""

    cell: str
    number: int
    w_hh: Tensor
    b_hh: Tensor | None
    w_hr: Tensor | None
    parameters: Tensor | None
    extras: Extras
    w_skip: Tensor | None = None  # of the link to h of ``delay_of(cell)`` steps before


def _seen(part: Part, h: Tensor) -> Tensor:
    """What the recurrent product takes of h."""
    factors = part.extras.recurrent
    return h if factors is None else (h * factors[part.number, : h.shape[0]]).to(h.dtype)


def _recurrent_term(part: Part, h: Tensor) -> Tensor:
    h, spec = _seen(part, h), spec_of(part.cell)
    if spec.second:  # not of the gates whose product comes later
        rows = part.w_hh.shape[0] // spec.gates * (spec.gates - spec.second)
        return linear(h, part.w_hh[:rows], None if part.b_hh is None else part.b_hh[:rows])
    if spec.recurrent:
        return linear(h, part.w_hh, part.b_hh)
    return h * part.w_hh if part.b_hh is None else h * part.w_hh + part.b_hh


def cell_step(part: Part, x: Tensor, states: States) -> States:
    """One step of a cell from its input term, without zoneout and projection."""
    name, options = spec_of(part.cell).name, options_of(part.cell)
    term = _recurrent_term(part, states[0])
    if name == "gru_before":
        return _gru_before(x, term, states, options, part)
    return _STEPS.get(name, _lstm_variant)(x, term, states, part.parameters, options)


def _zoned(part: Part, first: int, before: States, after: States) -> States:
    """Of each state the part that zoneout keeps from before; ``first``: the step's first row."""
    zoneout, seed = options_of(part.cell).zoneout, part.extras.seed
    if not any(zoneout):
        return after
    states = []
    for i, (p, old, new) in enumerate(zip(zoneout, before, after, strict=False)):
        hold: Tensor | float = p
        if seed is not None:
            rows = torch.arange(first, first + new.shape[0], device=new.device)
            hold = noise.held(seed, part.number, i, rows, new.shape[1], p).to(new.dtype)
        states.append(new if p == 0 else hold * old + (1 - hold) * new)
    return tuple(states)


def _direction(
    part: Part,
    projected: Sequence[Tensor],
    state: States,
    reverse: bool,
    lengths: Tensor | None,
    cells: list[Tensor] | None,
) -> tuple[Tensor, States]:
    """One layer in one direction; ``projected[t]`` holds the rows alive at step t (a prefix).

    ``lengths``: instead, all rows are there, and each sample's steps are as many. ``cells``: to be
    appended c of all rows.
    """
    if part.w_skip is not None:
        return _delayed_direction(part, projected, state, reverse, lengths, cells)
    steps = len(projected)
    alive = [p.shape[0] for p in projected]
    first = [0, *accumulate(alive)]
    reset = None if part.extras.reset is None else part.extras.reset.reshape(-1)
    outputs: list[Tensor] = [projected[0]] * steps
    seconds: list[Tensor] = [projected[0]] * steps
    # A sample whose sequence has ended keeps its state behind those still running.
    for t in reversed(range(steps)) if reverse else range(steps):
        n = alive[t]
        current = tuple(s[:n] for s in state)
        if reset is not None:
            anew = reset[first[t] : first[t] + n, None]
            current = tuple(s.masked_fill(anew, 0) for s in current)
        new = cell_step(part, projected[t], current)
        new = _zoned(part, first[t], current, new)
        if part.w_hr is not None:
            new = (linear(new[0], part.w_hr), *new[1:])
        outputs[t], seconds[t] = new[0], new[-1]
        if lengths is not None:
            runs = (t < lengths)[:, None]
            outputs[t], seconds[t] = new[0].where(runs, 0), new[-1].where(runs, 0)
            state = tuple(a.where(runs, b) for a, b in zip(new, state, strict=True))
        elif n == state[0].shape[0]:
            state = new
        else:
            state = tuple(torch.cat((a, s[n:])) for a, s in zip(new, state, strict=True))
    if cells is not None:
        cells.append(torch.cat(seconds))
    return torch.cat(outputs), state


def _delayed_direction(
    part: Part,
    projected: Sequence[Tensor],
    state: States,
    reverse: bool,
    lengths: Tensor | None,
    cells: list[Tensor] | None,
) -> tuple[Tensor, States]:
    """``_direction`` with h of d steps before as input too."""
    assert part.w_skip is not None
    d, steps = delay_of(part.cell), len(projected)
    alive = [p.shape[0] for p in projected]
    first = [0, *accumulate(alive)]
    reset = None if part.extras.reset is None else part.extras.reset.reshape(-1)
    # Of each sample what its own last steps left, the oldest first.
    past = list(state[0].view(d, -1, state[0].shape[-1]).unbind(0))
    if reverse:  # the nearest first
        past.reverse()
    rest = state[1:]
    since = torch.full((past[0].shape[0], 1), d, device=past[0].device)  # steps since a reset
    outputs: list[Tensor] = [projected[0]] * steps
    seconds: list[Tensor] = [projected[0]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        n = alive[t]
        current, delayed = (past[-1][:n], *[s[:n] for s in rest]), past[-d][:n]
        runs = None if lengths is None else (t < lengths)[:, None]
        if reset is not None:
            anew = reset[first[t] : first[t] + n, None]
            anew = anew if runs is None else anew & runs
            since = torch.cat(((since[:n] + 1).masked_fill(anew, 0), since[n:]))
            current = tuple(s.masked_fill(anew, 0) for s in current)
            delayed = delayed.masked_fill(since[:n] < d, 0)
        new = cell_step(part, projected[t] + linear(delayed, part.w_skip), current)
        new = _zoned(part, first[t], current, new)
        if part.w_hr is not None:
            new = (linear(new[0], part.w_hr), *new[1:])
        outputs[t], seconds[t] = new[0], new[-1]
        if runs is not None:
            outputs[t], seconds[t] = new[0].where(runs, 0), new[-1].where(runs, 0)

        def then(old: Tensor, after: Tensor, n: int = n, runs: Tensor | None = runs) -> Tensor:
            """What a sample has after the step: what it had, if it has no such step."""
            if runs is not None:
                return after.where(runs, old)
            return after if n == old.shape[0] else torch.cat((after[:n], old[n:]))

        past = [then(old, after) for old, after in zip(past, [*past[1:], new[0]], strict=True)]
        rest = tuple(then(old, after) for old, after in zip(rest, new[1:], strict=True))
    if cells is not None:
        cells.append(torch.cat(seconds))
    if reverse:
        past.reverse()
    return torch.cat(outputs), (torch.cat(past), *rest)


def zero_states(
    config: Config, input: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> list[Tensor]:
    """Initial states for a call without: each (L*D, B, .), of the input's kind."""
    if input.dim() == 3:
        batch = input.shape[0 if config.batch_first else 1]
    else:
        assert batch_sizes is not None
        batch = int(batch_sizes[0])
    spec = spec_of(config.cell)
    count = config.num_layers * (2 if config.bidirectional else 1)
    sizes = (weights[1].shape[1], weights[0].shape[0] // spec.gates)[: spec.states]
    rows = (remembered_of(config.cell) * batch, batch)
    return [input.new_zeros((count, n, size)) for n, size in zip(rows, sizes, strict=False)]


def sequence(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, States]:
    """The stack on ``input`` (T, B, I) (``batch_first``: (B, T, I); packed: (rows, I)).

    ``batch_sizes``: of packed input, or of padded input the lengths of its samples. ``cells``: to
    be filled with c of all rows (t, b), for each layer and direction.

    Returns the output in the input's layout and the final states, each (L*D, B, .).
    """
    if hx is None:
        hx = zero_states(config, input, weights, batch_sizes)
    with without_autocast(input):
        return _sequence(config, input, hx, weights, batch_sizes, extras, cells)


def _sequence(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, States]:
    num_layers, bias, batch_first = config.num_layers, config.bias, config.batch_first
    directions = 2 if config.bidirectional else 1
    width = len(weights) // (num_layers * directions)
    parameters = spec_of(config.cell).rows
    plain = weights_per_direction(bias, False, parameters=parameters)
    delay = delay_of(config.cell)
    has_projection = width > plain + (delay > 0)
    lengths = None
    if batch_sizes is not None and input.dim() == 3:
        lengths, batch_sizes = batch_sizes, None
    if batch_sizes is None:
        padded = input.transpose(0, 1) if batch_first else input
        steps, batch = padded.shape[0], padded.shape[1]
        if lengths is not None:  # whatever stands behind a sample's end
            runs = torch.arange(steps, device=padded.device)[:, None] < lengths
            padded = padded.where(runs[:, :, None], 0)
        rows = padded.reshape(steps * batch, padded.shape[2])
        alive = [batch] * steps
    else:
        rows, alive = input, batch_sizes.tolist()
        steps, batch = len(alive), alive[0]

    finals: list[States] = []
    for layer in range(num_layers):
        if layer > 0 and extras.dropout is not None:
            rows = (rows * extras.dropout[layer - 1].reshape(rows.shape)).to(rows.dtype)
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w = weights[k * width : (k + 1) * width]
            w_skip = None
            if delay:
                *w, w_skip = w
            b_ih, b_hh = (w[2], w[3]) if bias else (None, None)
            out, final = _direction(
                Part(
                    config.cell,
                    k,
                    w[1],
                    b_hh,
                    w[2 + 2 * bias] if has_projection else None,
                    w[-1] if parameters else None,
                    extras,
                    w_skip,
                ),
                linear(rows, w[0], b_ih).split(alive),  # type: ignore[no-untyped-call]
                tuple(h[k] for h in hx),
                reverse=direction == 1,
                lengths=lengths,
                cells=cells,
            )
            outputs.append(out)
            finals.append(final)
        rows = torch.cat(outputs, -1) if directions == 2 else outputs[0]

    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if batch_sizes is not None:
        return rows, states
    output = rows.reshape(steps, batch, rows.shape[-1])
    return (output.transpose(0, 1) if batch_first else output), states
