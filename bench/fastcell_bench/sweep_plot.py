"""The pictures of sweep.py, from its JSON document: curves of time per call, and a roofline.

The roof of a row is min(FMA peak, FLOPs per byte of weights x read bandwidth): the same limit as in
limits.py, drawn for every cache level, since which one holds the weights depends on H.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcell_bench.cases import INFERENCE, TABLE_CELLS, TRAINING
from fastcell_bench.contenders import OURS
from fastcell_bench.table import count_threads

_OURS_COLOUR = "#2a7f62"
_PEER_COLOURS = (
    "#c8553d", "#8a8a8a", "#4a6fa5", "#d09a2c", "#7b4b94", "#3aa6b9", "#8c5a3c", "#d16ba5",
    "#6b8e23", "#222222",
)  # fmt: skip
_PEER_MARKERS = "s^Dv<>pPX*"
_CELL_COLOURS = dict(zip(TABLE_CELLS, ("#c8553d", "#2a7f62", "#4a6fa5"), strict=True))
_MODE_MARKERS = {INFERENCE: "o", TRAINING: "^"}
_LABEL_POINTS = 6.5
# An axis over less than this may hold no power of ten.
_NARROW = 30
_LEGEND_INCHES = 1.7
_ROOF_INCHES = (11.5, 8.0)

Times = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class RoofPoint:
    """A row of the table: FLOPs per byte of weights read, and what fastcell made of them."""

    cell: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741 - the equations' own name
    H: int
    intensity: float
    flops_per_second: float


def times(document: Mapping[str, Any], curve: Mapping[str, Any], mode: str, cell: str) -> Times:
    """Contender to its (x, seconds of a call), without the points that it has no time for."""
    found: Times = {}
    keys = ("mode", "cell", "T", "B", "I", "H")
    rows = {
        (run["settings"]["threads"], *(row[key] for key in keys)): row
        for run in document["runs"]
        for row in run["rows"]
    }
    for point in curve["points"]:
        sizes = (point[key] for key in ("T", "B", "I", "H"))
        row = rows.get((point["threads"], mode, cell, *sizes), {"contenders": {}})
        for name, outcome in row["contenders"].items():
            if outcome["seconds"]:
                found.setdefault(name, []).append((point["x"], outcome["seconds"]))
    return found


def roof_points(table: Mapping[str, Any]) -> list[RoofPoint]:
    """The rows that fastcell has a time for."""
    return [
        RoofPoint(
            **{key: row[key] for key in ("cell", "mode", "T", "B", "I", "H")},
            intensity=row["flops"] / row["weight_bytes"],
            flops_per_second=row["flops"] / seconds,
        )
        for row in table["rows"]
        if (seconds := row["contenders"].get(OURS, {}).get("seconds"))
    ]


def spread_out(values: Sequence[float], distance: float) -> list[float]:
    """Ascending values moved as little as possible (least squares) to lie `distance` apart."""
    # Isotonic regression of value - place * distance, by pooling neighbours that are out of order.
    pools: list[tuple[float, int]] = []
    for place, value in enumerate(values):
        pools.append((value - place * distance, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (second, n), (first, m) = pools.pop(), pools.pop()
            pools.append(((first * m + second * n) / (m + n), m + n))
    level = [mean for mean, count in pools for _ in range(count)]
    return [value + place * distance for place, value in enumerate(level)]


def draw_curves(path: str, document: Mapping[str, Any], mode: str) -> bool:
    """A grid, cells by curves; False, and no file, if the mode has no time. Raises OSError."""
    curves = document["curves"]
    cells = [
        cell
        for cell in TABLE_CELLS
        if any(times(document, curve, mode, cell) for curve in curves)
    ]  # fmt: skip
    if not cells:
        return False
    names = list(dict.fromkeys(name for run in document["runs"] for name in run["versions"]))
    styles = _styles(names)
    figure = _figure(0.6 + 3.1 * len(curves), 0.9 + 2.7 * len(cells))
    panels = figure.subplots(len(cells), len(curves), squeeze=False)
    lines: dict[str, Any] = {}
    for cell, row in zip(cells, panels, strict=True):
        row[0].set_ylabel(f"{cell}: time per call", fontsize=10)
        for curve, panel in zip(curves, row, strict=True):
            found = times(document, curve, mode, cell)
            for name in sorted(found, key=lambda name: name == OURS):  # ours on top
                xs, ys = zip(*found[name], strict=True)
                (lines[name],) = panel.plot(xs, ys, **styles[name])
            _curve_axes(panel, [point["x"] for point in curve["points"]])
            panel.set_xlabel(curve["axis"], fontsize=8)
            if cell == cells[0]:
                panel.set_title(curve["fixed"], fontsize=9)
            if not found:
                panel.text(0.5, 0.5, "no times", transform=panel.transAxes, ha="center", fontsize=8)
    first = document["runs"][0]
    shown = [name for name in names if name in lines]
    figure.legend(
        [lines[name] for name in shown],
        [f"{name} {first['versions'].get(name, '')}".rstrip() for name in shown],
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / _LEGEND_INCHES)),
        fontsize=9,
        frameon=False,
    )
    what = "inference" if mode == INFERENCE else "training step (forward and all gradients)"
    figure.suptitle(f"{_title(first)}: {what}", fontsize=11)
    figure.savefig(path, dpi=140, format="png")
    return True


def draw_roofline(path: str, table: Mapping[str, Any]) -> bool:
    """Raises OSError. False, and no file, if no row has a time or the machine was not measured."""
    points = roof_points(table)
    rates = table["machine"]["rates"]
    if not points or not rates["fma"]:
        return False
    figure = _figure(*_ROOF_INCHES)
    panel = figure.subplots()
    panel.set_xscale("log")
    panel.set_yscale("log")
    left = 0.5 * min(point.intensity for point in points)
    right = 2.5 * max(point.intensity for point in points)
    low = 0.4 * min(point.flops_per_second for point in points) / 1e9
    high = 1.5 * max(rates["fma"], *(point.flops_per_second for point in points)) / 1e9
    panel.set_xlim(left, right)
    panel.set_ylim(low, high)
    _roof(panel, rates, left, right, low)
    for cell, colour in _CELL_COLOURS.items():
        for mode, marker in _MODE_MARKERS.items():
            chosen = [point for point in points if (point.cell, point.mode) == (cell, mode)]
            if chosen:
                panel.plot(
                    [point.intensity for point in chosen],
                    [point.flops_per_second / 1e9 for point in chosen],
                    linestyle="none",
                    marker=marker,
                    markersize=5,
                    color=colour,
                    label=f"{cell[0]}: {cell}, {mode}",
                    zorder=3,
                )
    _label_points(panel, points, math.log10(high / low))
    plain: Any = importlib.import_module("matplotlib.ticker").FuncFormatter(lambda x, _: f"{x:g}")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(plain)
    panel.set_xlabel("FLOPs per byte of weights read", fontsize=9)
    panel.set_ylabel("GFLOP/s", fontsize=9)
    panel.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.07))
    _tidy(panel)
    figure.suptitle(f"{_title(table)}: roofline", fontsize=11)
    figure.savefig(path, dpi=140, format="png")
    return True


def _roof(panel: Any, rates: Mapping[str, Any], left: float, right: float, low: float) -> None:
    """A slope for each cache level up to the FMA peak, and the peak."""
    peak = rates["fma"] / 1e9
    style: dict[str, Any] = {"color": "0.55", "linewidth": 1.0, "zorder": 1}
    ridge = right
    for level, bytes_per_second in rates["bandwidth"].items():
        slope = bytes_per_second / 1e9
        start = max(left, low / slope)
        end = min(peak / slope, right)
        if start >= end:  # the level feeds the FMA units at every intensity in sight
            ridge = left
            continue
        ridge = min(ridge, end)
        panel.plot([start, end], [slope * start, slope * end], **style)
        x = start * 1.04
        panel.text(
            x,
            slope * x * 1.06,
            f"{level} {slope:.0f} GB/s",
            fontsize=7,
            color="0.35",
            rotation=math.degrees(math.atan(slope)),  # in data coordinates, as the line
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    panel.plot([ridge if rates["bandwidth"] else left, right], [peak, peak], **style)
    text = f"FMA peak {peak:.0f} GFLOP/s (float32)"
    panel.text(right * 0.97, peak * 1.04, text, fontsize=7, color="0.35", ha="right")


def _label_points(panel: Any, points: Sequence[RoofPoint], decades: float) -> None:
    """The cell's initial and H beside each point, T and B below each column of points."""
    apart = decades * 1.2 * _LABEL_POINTS / 72 / (_ROOF_INCHES[1] - 1.0)
    columns: dict[int, list[RoofPoint]] = {}
    for point in points:
        columns.setdefault(round(50 * math.log10(point.intensity)), []).append(point)
    for column in columns.values():
        column.sort(key=lambda point: point.flops_per_second)
        shared = len({(point.T, point.B) for point in column}) == 1
        heights = [math.log10(point.flops_per_second / 1e9) for point in column]
        for point, height in zip(column, spread_out(heights, apart), strict=True):
            x, y = point.intensity, point.flops_per_second / 1e9
            panel.plot([x, 1.1 * x], [y, 10**height], color="0.75", linewidth=0.5, zorder=2)
            panel.text(
                1.11 * x, 10**height, _label(point, shared), fontsize=_LABEL_POINTS,
                color=_CELL_COLOURS.get(point.cell, "black"), va="center",
            )  # fmt: skip
        if shared:
            place = panel.get_xaxis_transform()
            text = f"T {column[0].T}\nB {column[0].B}"
            x = math.exp(sum(math.log(point.intensity) for point in column) / len(column))
            panel.text(x, 0.012, text, transform=place, fontsize=7, color="0.35", ha="center")


def _label(point: RoofPoint, shared: bool) -> str:
    """L512: there is room for no more than that."""
    sizes = f"{point.H}" if point.I == point.H else f"{point.I}:{point.H}"
    return f"{point.cell[0]}{sizes}" if shared else f"{point.cell[0]}{point.T}:{point.B}:{sizes}"


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same colour and marker for a contender in every panel."""
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(name for name in names if name != OURS):
        colour = _PEER_COLOURS[place % len(_PEER_COLOURS)]
        marker = _PEER_MARKERS[place % len(_PEER_MARKERS)]
        styles[name] = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.1}
    styles[OURS] = {"color": _OURS_COLOUR, "marker": "o", "markersize": 4.5, "linewidth": 2.2}
    return styles


def _curve_axes(panel: Any, values: Sequence[int]) -> None:
    ticker: Any = importlib.import_module("matplotlib.ticker")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(values, [str(value) for value in values])
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    low, high = panel.get_ylim()
    if high < _NARROW * low:
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: duration(seconds)))
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())
    _tidy(panel)


def duration(seconds: float) -> str:
    """A tick: 10 µs, 1 ms, 2 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _title(document: Mapping[str, Any]) -> str:
    version = document["versions"].get(OURS, "")
    threads = count_threads(document["settings"]["threads"])
    return f"fastcell {version} on {document['machine']['cpu']}, {threads}, float32"


def _figure(width: float, height: float) -> Any:
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")
    matplotlib.use("Agg")
    return figures.Figure(figsize=(width, height), layout="constrained")


def _tidy(panel: Any) -> None:
    panel.tick_params(labelsize=7)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
