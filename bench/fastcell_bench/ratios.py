"""Medians, ratios and their summary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def median(values: Sequence[float]) -> float:
    """The median; raises ValueError for no values."""
    if not values:
        raise ValueError("no values to take a median of")
    return float(statistics.median(values))


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log)); raises ValueError for no values or one that is not positive."""
    if not values or min(values) <= 0:
        raise ValueError("a geometric mean needs positive values")
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def paired_ratio(peer: Sequence[float], ours: Sequence[float]) -> float:
    """Median of peer/ours over blocks that ran next to each other.

    Pairing cancels a machine that slows down during the run, which the ratio of two medians does
    not. The peer may have fewer blocks (its time budget was spent); each is paired with its round.
    """
    pairs = list(zip(peer, ours, strict=False))
    return median([theirs / own for theirs, own in pairs])


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how much the blocks disagree."""
    return (max(values) - min(values)) / median(values)


@dataclass(frozen=True)
class Summary:
    """Ratios of one peer over all rows of one mode: above 1, fastcell is faster."""

    peer: str
    mode: str
    rows: int
    geometric_mean: float
    worst: float
    worst_row: str
    best: float
    faster_rows: int


def summarize(peer: str, mode: str, ratios: dict[str, float]) -> Summary | None:
    """`ratios` by row label; None if there are none."""
    if not ratios:
        return None
    worst_row = min(ratios, key=lambda row: ratios[row])
    values = list(ratios.values())
    return Summary(
        peer=peer,
        mode=mode,
        rows=len(values),
        geometric_mean=geometric_mean(values),
        worst=ratios[worst_row],
        worst_row=worst_row,
        best=max(values),
        faster_rows=sum(value >= 1 for value in values),
    )
