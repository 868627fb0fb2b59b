"""Which rows a call has, as the CPU kernels take it: padded, packed, or padded with lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _core
from .plan import Config, Extras


class Time(NamedTuple):
    """The steps and rows of a call. With lengths those of the samples that have any."""

    steps: int
    batch: int
    rows: int
    samples: int  # the caller's batch
    offsets: Tensor | None = None  # unless padded, (steps + 1,): rows of the steps before each
    # With lengths: the samples, the longest first; all steps of the padded batch.
    order: Tensor | None = None
    padded_steps: int = 0

    @property
    def offsets_pointer(self) -> int:
        return 0 if self.offsets is None else self.offsets.data_ptr()

    @property
    def padding(self) -> tuple[int, int, int]:
        """(address of the order, samples, steps) with lengths, else zeros."""
        if self.order is None:
            return (0, 0, 0)
        return self.order.data_ptr(), self.samples, self.padded_steps

    def padded_rows(self) -> Tensor:
        """With lengths: which rows of the padded batch, one behind the other in time, exist."""
        assert self.offsets is not None
        assert self.order is not None
        rows = torch.arange(self.rows, device="cpu")
        step = torch.searchsorted(self.offsets[1:], rows, right=True)
        return step * self.samples + self.order[rows - self.offsets[step]]

    def of_rows(self, extras: Extras) -> Extras:
        """With lengths: what there is one of for each row, for those that exist."""
        if self.order is None or (extras.dropout is None and extras.reset is None):
            return extras
        at = self.padded_rows()
        dropout, reset = extras.dropout, extras.reset
        return extras._replace(
            dropout=None if dropout is None else dropout.flatten(1, 2).index_select(1, at),
            reset=None if reset is None else reset.reshape(-1)[at],
        )


def time_of(config: Config, x: Tensor, batch_sizes: Tensor | None) -> Time:
    """The time of a call on ``x``; ``batch_sizes``: of packed input, or lengths of padded.

    Raises ValueError for lengths below 0 or above the steps: here they decide what is read.
    """
    if x.dim() == 2:
        assert batch_sizes is not None
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
        return Time(steps, batch, x.shape[0], batch, row_offsets(batch_sizes))
    steps, batch, _ = x.shape
    if config.batch_first:
        steps, batch = batch, steps
    if batch_sizes is None:
        return Time(steps, batch, steps * batch, batch)
    lengths: list[int] = batch_sizes.tolist()
    longest = max(lengths, default=0)
    if lengths and (min(lengths) < 0 or longest > steps):
        raise ValueError(
            f"lengths must be from 0 to {steps} steps, got {min(lengths)} to {longest}"
        )
    order, offsets = torch.empty_like(batch_sizes), batch_sizes.new_empty(longest + 1)
    _core.ragged_order(batch, batch_sizes.data_ptr(), order.data_ptr(), offsets.data_ptr())
    some = batch - lengths.count(0)
    return Time(longest, some, sum(lengths), batch, offsets, order, steps)


def row_offsets(batch_sizes: Tensor) -> Tensor:
    """(T,) batch sizes of a packed sequence -> (T + 1,) offsets of each step's first row."""
    offsets = batch_sizes.new_zeros(batch_sizes.shape[0] + 1)
    torch.cumsum(batch_sizes, 0, out=offsets[1:])
    return offsets


def strides(config: Config, t: Tensor | None) -> tuple[int, int]:
    """Elements between steps, and between samples of one step; of packed rows the latter."""
    if t is None:
        return 0, 0
    first, second, *features = t.stride()
    if not features:
        return 0, first
    return (second, first) if config.batch_first else (first, second)
