"""Which rows (t, b) a call has on a CUDA device, and which row is a step before another."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_layer import Layer


class Time:
    """Which rows there are: of a PackedSequence, where its steps begin and how long samples are.

    ``batch_sizes``: of packed input, or of padded input the lengths of its samples.
    """

    def __init__(
        self, layer: Layer, batch_sizes: Tensor | None, device: torch.device, packed: bool
    ) -> None:
        self.offsets = self.lengths = self.batch_sizes = None
        if batch_sizes is not None and not packed:
            self.lengths = batch_sizes
        elif batch_sizes is not None:
            self.batch_sizes = batch_sizes
            offsets = batch_sizes.new_zeros(layer.steps + 1)
            torch.cumsum(batch_sizes, 0, out=offsets[1:])
            lengths = layer.steps - torch.searchsorted(
                batch_sizes.flip(0), torch.arange(layer.batch, device="cpu"), right=True
            )
            self.offsets = offsets.to(device, non_blocking=True)
            self.lengths = lengths.to(device, non_blocking=True)

    def existing(self, layer: Layer, rows: Tensor) -> Tensor:
        """``rows`` with zeros where a sample has ended, whatever stood there."""
        if self.lengths is None or self.batch_sizes is not None:
            return rows
        alive = torch.arange(layer.steps, device=rows.device)[:, None] < self.lengths
        return rows.where(alive.view(layer.rows, 1), 0)

    def first_reset(self, layer: Layer, reset: Tensor, back: bool) -> Tensor:
        """(B, 1): whether the first step to run, of the samples that have it, begins with zeros."""
        if self.batch_sizes is None:
            return reset[-1 if back else 0][:, None]
        count = int(self.batch_sizes[-1 if back else 0])
        rows = reset[-count:] if back else reset[:count]
        return torch.nn.functional.pad(rows, (0, layer.batch - count))[:, None]

    def per_row(self, layer: Layer, of_samples: Tensor) -> Tensor:
        """(B, n) -> (rows, n)."""
        if self.batch_sizes is None:
            return of_samples.repeat(layer.steps, 1)
        assert self.offsets is not None
        rows = torch.arange(layer.rows, device=of_samples.device)
        return of_samples[
            rows - self.offsets[torch.searchsorted(self.offsets, rows, right=True) - 1]
        ]

    def previous(self, layer: Layer, states: Tensor, first: Tensor, back: bool) -> Tensor:
        """For each row of ``states`` (rows, P) the one a step before; ``first`` (B, P) to begin."""
        if self.batch_sizes is None:
            batch = layer.batch
            if not back:
                return torch.cat((first, states[: layer.rows - batch]))
            if self.lengths is None:
                return torch.cat((states[batch:], first))
            begins = torch.arange(1, layer.steps + 1, device=states.device)[:, None] >= self.lengths
            after = torch.cat((states[batch:], first)).view(layer.steps, batch, -1)
            return after.where(~begins[:, :, None], first).view(layer.rows, -1)
        assert self.offsets is not None
        assert self.lengths is not None
        rows = torch.arange(layer.rows, device=states.device)
        step = torch.searchsorted(self.offsets, rows, right=True) - 1
        sample = rows - self.offsets[step]
        if back:
            begins = step + 1 == self.lengths[sample]
            row = self.offsets[(step + 1).clamp(max=layer.steps)] + sample
        else:
            begins = step == 0
            row = self.offsets[(step - 1).clamp(min=0)] + sample
        return torch.cat((states, first))[torch.where(begins, layer.rows + sample, row)]
