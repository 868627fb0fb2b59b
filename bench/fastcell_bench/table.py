"""The run as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from fastcell_bench.cases import INFERENCE, Case
from fastcell_bench.contenders import OURS
from fastcell_bench.limits import FMA, NOT_MEASURED
from fastcell_bench.record import summaries
from fastcell_bench.runner import (
    DIFFERS,
    FAILED,
    NOT_TIMED,
    OK,
    UNSUPPORTED,
    MachineRates,
    Outcome,
    Row,
)

_SHAPE = "{:<8} {:>5} {:>4} {:>5} {:>5}"
_OURS_WIDTH = 12
_LIMIT_WIDTH = 10
_PEER_WIDTH = 18
_CELLS = {DIFFERS: "differs", FAILED: "failed", UNSUPPORTED: "-", NOT_TIMED: "-"}


def microseconds(seconds: float) -> str:
    """Three digits or more, no exponent: 6.91, 74.2, 131205."""
    value = seconds * 1e6
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def count_threads(threads: int) -> str:
    """1 thread, 2 threads."""
    return f"{threads} thread{'s' if threads != 1 else ''}"


def heading(rates: MachineRates, machine: str, threads: int, dtype: str) -> list[str]:
    """What was measured of the machine."""
    lines = [f"{machine}, {count_threads(threads)}, {dtype}"]
    if rates.fma is None:
        return [*lines, f"limit: {rates.sentence or NOT_MEASURED}"]
    reads = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.bandwidth.items())
    reads = f"; reads, GB/s: {reads}" if reads else ""
    return [*lines, f"FMA peak {rates.fma / 1e9:.0f} GFLOP/s (float32){reads}"]


def mode_heading(case: Case, versions: dict[str, str], contenders: Sequence[str]) -> list[str]:
    """Two lines above the rows of one mode."""
    what = "inference" if case.mode == INFERENCE else "training (forward and all gradients)"
    names = [f"{OURS} µs".rjust(_OURS_WIDTH), "of limit".rjust(_LIMIT_WIDTH)]
    for name in contenders:
        if name != OURS:
            title = f"{name} {versions.get(name, '')}".strip()
            names.append(title[:_PEER_WIDTH].rjust(_PEER_WIDTH))
    line = " ".join([_SHAPE.format("cell", "T", "B", "I", "H"), *names])
    return ["", f"{what}: µs, and how many times fastcell's", line, "-" * len(line)]


def row_lines(row: Row, contenders: Sequence[str]) -> list[str]:
    """The row, and a sentence below it for each cell that has no time."""
    case = row.case
    start = _SHAPE.format(case.cell, case.T, case.B, case.I, case.H)
    if row.failure:
        return [f"{start}   {row.failure}", *_notes(row, skip=OURS)]
    ours = row.outcomes[OURS]
    assert ours.seconds is not None
    star = "*" if ours.shortened else ""
    cells = [f"{microseconds(ours.seconds)}{star}".rjust(_OURS_WIDTH)]
    cells.append(_limit(row).rjust(_LIMIT_WIDTH))
    for name in contenders:
        if name != OURS:
            cells.append(_cell(row.outcomes[name]).rjust(_PEER_WIDTH))
    return [" ".join([start, *cells]), *_notes(row, skip=OURS)]


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Geometric means, worst ratios, algorithms."""
    lines = [""]
    for summary in summaries(rows):
        lines.append(
            f"{summary.mode}, against {summary.peer}: geometric mean {summary.geometric_mean:.2f}x,"
            f" worst {summary.worst:.2f}x ({summary.worst_row}),"
            f" faster in {summary.faster_rows} of {summary.rows} rows"
        )
    for mode in dict.fromkeys(row.case.mode for row in rows):
        fractions = {
            row.case.label: fraction
            for row in rows
            if row.case.mode == mode and (fraction := row.fraction) is not None
        }
        if fractions:
            low = min(fractions, key=lambda label: fractions[label])
            high = max(fractions, key=lambda label: fractions[label])
            lines.append(
                f"{mode}, of the limit: {fractions[low]:.0%} ({low}) to"
                f" {fractions[high]:.0%} ({high})"
            )
    lines += _algorithms(rows)
    outcomes = [outcome for row in rows for outcome in row.outcomes.values()]
    if any(outcome.shortened for outcome in outcomes):
        lines.append("* fewer blocks than the others: its time budget for the row was spent")
    if any(outcome.status == DIFFERS for outcome in outcomes):
        lines.append("A comparison failed: see the rows above.")
    return lines


def _limit(row: Row) -> str:
    if row.limit is None or row.fraction is None:
        return "-"
    return f"{row.fraction:.0%} {'' if row.limit.kind == FMA else 'of '}{row.limit.kind}"


def _cell(outcome: Outcome) -> str:
    if outcome.status != OK or outcome.seconds is None or outcome.ratio is None:
        return _CELLS.get(outcome.status, "-")
    star = "*" if outcome.shortened else ""
    return f"{microseconds(outcome.seconds)}{star} {outcome.ratio:6.2f}x"


def _notes(row: Row, skip: str) -> list[str]:
    return [
        f"    {name}: {outcome.sentence}"
        for name, outcome in row.outcomes.items()
        if name != skip and outcome.status in (DIFFERS, FAILED)
    ]


def _algorithms(rows: Sequence[Row]) -> list[str]:
    """What each contender ran, and on which rows where that differs from row to row."""
    found: dict[tuple[str, int], dict[str, list[str]]] = {}
    for row in rows:
        for name, outcome in row.outcomes.items():
            if outcome.algorithm:
                kinds = found.setdefault((name, outcome.threads), {})
                kinds.setdefault(outcome.algorithm, []).append(row.case.cell)
    lines = []
    for (name, threads), kinds in found.items():
        described = [
            f"{algorithm} ({', '.join(dict.fromkeys(cells))})" if len(kinds) > 1 else algorithm
            for algorithm, cells in kinds.items()
        ]
        text = "; ".join(described)
        if name == OURS and len(text) > 160:
            text = "fused kernels; --json has the explanation of each row"
        lines.append(f"{name}, {count_threads(threads)}: {text}")
    return lines
