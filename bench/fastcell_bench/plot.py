"""The run as a picture: one bar per row against each peer, and the fraction of the limit."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from fastcell_bench.cases import INFERENCE
from fastcell_bench.contenders import OURS
from fastcell_bench.runner import Row

_FASTER = "#2a7f62"
_SLOWER = "#c8553d"
_LIMIT = "#4a6fa5"
_ROW_INCHES = 0.27


def unavailable() -> str | None:
    """Why no plot can be made, or None."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        return f"--plot needs matplotlib: {error}"
    return None


def draw(path: str, rows: Sequence[Row], title: str, versions: dict[str, str]) -> bool:
    """Write a PNG; False, and no file, if no row has a time. Raises OSError."""
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")
    matplotlib.use("Agg")

    timed = [row for row in rows if OURS in row.outcomes and row.outcomes[OURS].seconds]
    if not timed:
        return False
    modes = list(dict.fromkeys(row.case.mode for row in timed))
    peers = [
        name
        for name in dict.fromkeys(name for row in timed for name in row.outcomes)
        if name != OURS and any(_ratio(row, name) for row in timed)
    ]
    counts = [sum(row.case.mode == mode for row in timed) for mode in modes]
    height = _ROW_INCHES * sum(counts) + 1.3 * len(modes) + 0.6
    figure = figures.Figure(figsize=(3.6 + 2.7 * (len(peers) + 1), height), layout="constrained")
    panels = figure.subplots(
        len(modes),
        1 + len(peers),
        squeeze=False,
        sharey="row",
        gridspec_kw={"height_ratios": [max(count, 3) for count in counts]},
    )
    for mode, line in zip(modes, panels, strict=True):
        chosen = [row for row in timed if row.case.mode == mode]
        line[0].set_yticks(range(len(chosen)), [_label(row) for row in chosen], fontsize=8)
        line[0].set_ylim(len(chosen) - 0.4, -0.6)
        what = "inference" if mode == INFERENCE else "training step"
        line[0].set_ylabel(f"{what}  (T, B, I, H)", fontsize=10)
        for peer, panel in zip(peers, line, strict=False):
            _ratios(panel, [_ratio(row, peer) for row in chosen])
            panel.set_title(f"speed-up over {peer} {versions.get(peer, '')}".rstrip(), fontsize=9)
        _fractions(line[-1], [row.fraction for row in chosen])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140, format="png")
    return True


def _fractions(panel: Any, values: Sequence[float | None]) -> None:
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    panel.barh([p for p, _ in known], [v for _, v in known], color=_LIMIT, height=0.7)
    for place, value in known:
        panel.text(value + 0.02, place, f"{value:.0%}", va="center", fontsize=7)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_xlim(0, 1.25 * max([1.0, *(value for _, value in known)]))
    panel.set_title("fraction of the machine's limit", fontsize=9)
    if not known:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", fontsize=8)
    _tidy(panel)


def _ratios(panel: Any, values: Sequence[float | None]) -> None:
    """Bars from 1 on a logarithmic axis, so that twice as fast and half as fast look alike."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if not known:
        panel.text(0.5, 0.5, "does not do this", transform=panel.transAxes, ha="center", fontsize=8)
        panel.set_axis_off()
        return
    logs = [math.log2(value) for _, value in known]
    colours = [_FASTER if value >= 1 else _SLOWER for _, value in known]
    panel.barh([p for p, _ in known], logs, color=colours, height=0.7)
    low, high = min([0.0, *logs]), max([0.0, *logs])
    width = max(high - low, 1.0)
    for (place, value), log in zip(known, logs, strict=True):
        outside = max(log, 0.0) + 0.02 * width
        panel.text(outside, place, f"{value:.2f}x", va="center", fontsize=7)
    panel.axvline(0.0, color="black", linewidth=0.8)
    panel.set_xlim(low - 0.06 * width, high + 0.3 * width)
    step = max(1, math.ceil(width / 4))
    ticks = list(range(math.floor(low / step) * step, math.ceil(high) + 1, step))
    panel.set_xticks(ticks, [f"{2.0**tick:g}x" for tick in ticks], fontsize=7)
    _tidy(panel)


def _tidy(panel: Any) -> None:
    panel.tick_params(axis="x", labelsize=7)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _ratio(row: Row, peer: str) -> float | None:
    return row.outcomes[peer].ratio if peer in row.outcomes else None


def _label(row: Row) -> str:
    """Cell, sizes, and fastcell's own time: the only absolute figure in the picture."""
    case = row.case
    return f"{case.cell}  {case.T}, {case.B}, {case.I}, {case.H}   {_duration(row)}"


def _duration(row: Row) -> str:
    seconds = row.outcomes[OURS].seconds or 0.0
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
