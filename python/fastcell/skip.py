"""Skip connections through time: h_t sees h_{t-d}, in place of h_{t-1} or beside it.

In place of it, the steps t, t + d, t + 2d, ... are a sequence of their own, for each of d phases:
the layer runs on a batch d times as large and a sequence d times as short, which is the same memory
in the same order, and the kernels have more rows at once.

Beside it, on a CPU, is a third product in each step (``cells.with_delay``). Elsewhere: a block of d
steps sees nothing of itself through the delay: there h_{t-d} is known from the block before, and is
input. So a layer runs block by block on [x_t, h_{t-d}].

Sources: T. Lin et al., "Learning long-term dependencies in NARX recurrent neural networks", IEEE
Trans. Neural Networks 7 (1996); S. Chang et al., "Dilated recurrent neural networks", NIPS (2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

States = tuple[Tensor, ...]
# (input (T, B, I), states or None, lengths or None, reset or None) -> (output, final states)
Run = Callable[
    [Tensor, States | None, Tensor | None, Tensor | None], tuple[Tensor, Sequence[Tensor]]
]


def run_delayed(
    d: int,
    directions: int,
    input: Tensor,
    states: States | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    run: Run,
) -> tuple[Tensor, States]:
    """A stack whose recurrent links have a delay of ``d`` steps and no other.

    ``input`` (T, B, I); ``states``, and those returned: (L*D, d*B, .), of the d steps before,
    oldest first (of a reverse direction those after, nearest first).
    """
    steps, batch, _ = input.shape
    count = -(-steps // d)
    phase = torch.arange(d, device=input.device if lengths is None else lengths.device)
    ends = torch.full((batch,), steps, device=phase.device) if lengths is None else lengths
    own: Tensor | None = None
    if lengths is not None or steps % d:
        own = ((ends + d - 1 - phase[:, None]) // d).clamp(min=0).reshape(d * batch)
    input = _phases(input, d, count)
    cleared = None if reset is None else gone(reset, d, ends.to(reset.device))
    if reset is not None:  # the first step of each phase from there on
        reset = _phases(_lately(reset, d), d, count)
    # State j of sample b is phase (end_b + j) % d where a pass meets the sample's end.
    order = ((ends + phase[:, None]) % d * batch + torch.arange(batch, device=phase.device)).view(
        -1
    )
    order = order.to(input.device)
    if states is not None:
        states = tuple([_at_the_end(s, order, directions, 1, True) for s in states])
    output, finals = run(input, states, own, reset)
    output = output.reshape(count * d, batch, output.shape[-1])[:steps]
    states = tuple([_at_the_end(s, order, directions, 0, False) for s in finals])
    return output, states if cleared is None else tuple([s.masked_fill(cleared, 0) for s in states])


def _lately(reset: Tensor, d: int) -> Tensor:
    """(T, B): whether there was a reset at a step or at one of the d - 1 before it."""
    steps = reset.shape[0]
    shifted = [torch.nn.functional.pad(reset, (0, 0, i, 0))[:steps] for i in range(d)]
    return torch.stack(shifted).any(0)


def gone(reset: Tensor, d: int, ends: Tensor) -> Tensor:
    """(d*B, 1): which of the states of the last d steps are from before the last reset."""
    times = torch.arange(reset.shape[0], device=reset.device)[:, None]
    last = torch.where(reset & (times < ends), times, -d - 1).amax(0)
    at = ends - d + torch.arange(d, device=reset.device)[:, None]
    return (at < last).view(-1, 1)


def _phases(t: Tensor, d: int, count: int) -> Tensor:
    """(T, B, ...) -> (T / d, d * B, ...), padded behind."""
    missing = count * d - t.shape[0]
    if missing:
        t = torch.cat((t, t.new_zeros((missing, *t.shape[1:]))))
    return t.reshape(count, d * t.shape[1], *t.shape[2:])


def _at_the_end(
    states: Tensor, order: Tensor, directions: int, direction: int, into_phases: bool
) -> Tensor:
    """States of the direction that has them at the samples' ends, by phase or by time."""
    if directions == 1 and direction == 1:
        return states
    if into_phases:
        order = torch.argsort(order)
    layers = states.view(-1, directions, *states.shape[1:])
    parts = list(layers.unbind(1))
    parts[direction] = parts[direction].index_select(1, order)
    return torch.stack(parts, 1).view(states.shape)


def run_beside(
    d: int,
    input: Tensor,
    past: Tensor,
    states: States | None,
    reset: Tensor | None,
    run: Run,
) -> tuple[Tensor, Tensor, States]:
    """A layer of one direction, whose input is followed by h_{t-d}.

    ``input`` (T, B, I); ``past`` (d, B, P): h of the d steps before, oldest first. Returns the
    output, the next ``past`` and the final states.
    """
    steps, batch, _ = input.shape
    known = None if reset is None else ~_lately(reset, d)[:, :, None]
    begin, outputs, before = 0, [], past
    while begin < steps:
        end = min(begin + d, steps)
        block, seen = slice(begin, end), before[: end - begin]
        if known is not None:
            seen = seen * known[block]
        joined = torch.cat((input[block], seen), -1)
        output, finals = run(joined, states, None, None if reset is None else reset[block])
        states, begin = tuple(finals), end
        outputs.append(output)
        before = torch.cat((before[output.shape[0] :], output))
    if reset is not None:
        ends = torch.full((batch,), steps, device=reset.device)
        before = before.masked_fill(gone(reset, d, ends).view(d, batch, 1), 0)
    assert states is not None
    return torch.cat(outputs), before, states
