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

from .autocast import without_autocast

States = tuple[Tensor, ...]
# Output, final states, and, if they are wanted, all states of each kind, (L*D, T, B, .).
Found = tuple[Tensor, States, Sequence[Tensor]]
# (input (T, B, I), states or None, lengths or None, reset or None) -> what was found
Run = Callable[[Tensor, States | None, Tensor | None, Tensor | None], Found]


def run_delayed(
    d: int,
    directions: int,
    input: Tensor,
    states: States | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    run: Run,
) -> Found:
    """A stack whose recurrent links have a delay of ``d`` steps and no other.

    ``input`` (T, B, I); ``states``, and those returned: (L*D, d*B, .), of the d steps before,
    oldest first (of a reverse direction those after, nearest first). ``reset`` with one direction.
    """
    steps, batch, _ = input.shape
    count = -(-steps // d)
    phase = torch.arange(d, device=input.device if lengths is None else lengths.device)
    ends = _ends(lengths, steps, batch, phase.device)
    own: Tensor | None = None
    if lengths is not None or steps % d:
        own = ((ends + d - 1 - phase[:, None]) // d).clamp(min=0).reshape(d * batch)
    input = _phases(input, d, count)
    if reset is not None:  # the first step of each phase from there on
        reset = _phases(_lately(reset, d), d, count)
    # State j of sample b is phase (end_b + j) % d where a pass meets the sample's end.
    order = ((ends + phase[:, None]) % d * batch + torch.arange(batch, device=phase.device)).view(
        -1
    )
    order = order.to(input.device)
    if states is not None:
        states = tuple([_at_the_end(s, order, directions, 1, True) for s in states])
    output, finals, every = run(input, states, own, reset)
    output = output.reshape(count * d, batch, output.shape[-1])[:steps]
    states = tuple([_at_the_end(s, order, directions, 0, False) for s in finals])
    in_time = [s.reshape(s.shape[0], count * d, batch, s.shape[-1])[:, :steps] for s in every]
    return output, states, in_time


def run_beside(
    d: int,
    input: Tensor,
    states: States | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    past: Tensor,
    run: Run,
) -> Found:
    """A layer of one direction, whose input is followed by h_{t-d}: block by block.

    ``input`` (T, B, I); ``past`` (d, B, P): h of the d steps before, oldest first; ``states``: what
    the first step sees. Of the final states the first is such a ``past``, as (1, d*B, P).
    """
    steps, batch, _ = input.shape
    ends = _ends(lengths, steps, batch, past.device)
    known = None if reset is None else ~_lately(reset, d)[:, :, None]
    h, every = [past], []
    for begin in range(0, steps, d):
        block = slice(begin, min(begin + d, steps))
        # What the block's steps see: h of the block before, whose first are as many steps ago.
        seen = h[-1][: block.stop - begin]
        if known is not None:
            seen = seen * known[block]
        both = joined((input[block], seen), -1)
        own = None if lengths is None else (lengths - begin).clamp(0, block.stop - begin)
        output, states, kinds = run(both, states, own, None if reset is None else reset[block])
        h.append(output)
        every.append(kinds)
    all_h = joined(h, 0)
    last = ends + torch.arange(d, device=ends.device)[:, None]  # among all_h
    past = all_h.gather(0, last[:, :, None].expand(-1, -1, all_h.shape[-1]))
    assert states is not None
    finals = (past.reshape(1, d * batch, past.shape[2]), *states[1:])
    return all_h[d:], finals, [torch.cat(kind, 1) for kind in zip(*every, strict=True)]


def clear_gone(
    states: Sequence[Tensor], reset: Tensor, d: int, lengths: Tensor | None, directions: int
) -> States:
    """Final states (L*D, d*B, .) without those from before a sample's last reset."""
    steps, batch = reset.shape
    ends = _ends(lengths, steps, batch, reset.device)
    times = torch.arange(steps, device=reset.device)[:, None]
    resets, state = reset & (times < ends), torch.arange(d, device=reset.device)[:, None]
    gone = [ends - d + state < torch.where(resets, times, -d - 1).amax(0)]
    if directions == 2:  # whose states are those of the first d steps
        gone.append(state > torch.where(resets, times, steps + d).amin(0))
    mask = torch.stack(gone).view(1, directions, d * batch, 1)
    split = [s.reshape(s.shape[0] // directions, directions, *s.shape[1:]) for s in states]
    return tuple([s.masked_fill(mask, 0).flatten(0, 1) for s in split])


def joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat in the tensors' own dtype, which autocast may have left alone."""
    with without_autocast(tensors[0]):
        return torch.cat(list(tensors), dim)


def turned(t: Tensor, lengths: Tensor | None) -> Tensor:
    """(T, B, ...) with each sample's steps in the opposite order, and its padding where it was."""
    if lengths is None:
        return t.flip(0)
    times = torch.arange(t.shape[0], device=t.device)[:, None]
    ends = lengths.to(t.device)
    index = torch.where(times < ends, ends - 1 - times, times)
    return t.gather(0, index.view(*index.shape, *[1] * (t.dim() - 2)).expand(t.shape))


def _ends(lengths: Tensor | None, steps: int, batch: int, device: torch.device) -> Tensor:
    """The steps of each sample."""
    return torch.full((batch,), steps, device=device) if lengths is None else lengths.to(device)


def _lately(reset: Tensor, d: int) -> Tensor:
    """(T, B): whether there was a reset at a step or at one of the d - 1 before it."""
    steps = reset.shape[0]
    shifted = [torch.nn.functional.pad(reset, (0, 0, i, 0))[:steps] for i in range(d)]
    return torch.stack(shifted).any(0)


def _phases(t: Tensor, d: int, count: int) -> Tensor:
    """(T, B, ...) -> (T / d, d * B, ...), padded behind."""
    missing = count * d - t.shape[0]
    if missing:
        t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, missing))
    return t.reshape(count, d * t.shape[1], *t.shape[2:])


def _at_the_end(
    states: Tensor, order: Tensor, directions: int, direction: int, into_phases: bool
) -> Tensor:
    """States of the direction that has them at the samples' ends, by phase or by time."""
    if directions == 1 and direction == 1:
        return states
    if into_phases:
        order = torch.argsort(order)
    layers = states.reshape(states.shape[0] // directions, directions, *states.shape[1:])
    parts = list(layers.unbind(1))
    parts[direction] = parts[direction].index_select(1, order)
    return torch.stack(parts, 1).reshape(states.shape)
