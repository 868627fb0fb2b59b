"""The picture of a run: both loss curves, their distance, and the speed of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .files import write_whole

PALE, DARK, GREY = "#f2a65a", "#1d3557", "#6b7280"


@dataclass(frozen=True)
class Curves:
    """One library's part of the picture."""

    name: str
    losses: list[float]
    held_out: list[float]
    characters_per_second: float


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last ``width`` values (over fewer at the beginning)."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - width)]) / (i + 1 - max(0, i + 1 - width))
        for i in range(len(values))
    ]


def draw(
    path: str, theirs: Curves, ours: Curves, measured_at: list[int], title: str, subtitle: str
) -> None:
    """Write a PNG.

    Args:
        measured_at: steps at which the held-out losses were taken.

    Raises:
        UserError: the file cannot be written.
    """
    # The objects themselves, and not pyplot: no window system is asked for, no global figure kept.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    # No mathematics: the name of a file may hold dollar signs.
    plain: dict[str, Any] = {"va": "center", "parse_math": False}
    figure.text(0.04, 0.955, title, fontsize=15, fontweight="bold", color=DARK, **plain)
    figure.text(0.04, 0.905, subtitle, fontsize=9.5, color=GREY, **plain)
    grid = figure.add_gridspec(
        2,
        2,
        left=0.06,
        right=0.97,
        top=0.82,
        bottom=0.09,
        width_ratios=[2, 1],
        wspace=0.28,
        height_ratios=[2, 3],
        hspace=0.4,
    )
    loss = figure.add_subplot(grid[:, 0])
    speed = figure.add_subplot(grid[0, 1])
    distance = figure.add_subplot(grid[1, 1])
    for axes in (loss, distance, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=9)

    width = max(1, len(theirs.losses) // 40)
    steps = range(1, len(theirs.losses) + 1)
    # A thin dark line on a broad pale one: both are seen where they lie on each other.
    loss.plot(steps, theirs.losses, color=PALE, linewidth=0.8, alpha=0.35)
    loss.plot(
        steps,
        smooth(theirs.losses, width),
        color=PALE,
        linewidth=6,
        alpha=0.9,
        solid_capstyle="round",
        label=f"{theirs.name}, training",
    )
    loss.plot(
        steps, smooth(ours.losses, width), color=DARK, linewidth=1.5, label=f"{ours.name}, training"
    )
    loss.plot(
        measured_at,
        theirs.held_out,
        "o",
        color=PALE,
        markersize=11,
        clip_on=False,
        label=f"{theirs.name}, held out",
    )
    loss.plot(
        measured_at,
        ours.held_out,
        "o",
        color=DARK,
        markersize=5,
        clip_on=False,
        label=f"{ours.name}, held out",
    )
    if ours.held_out:
        loss.annotate(
            f"{ours.held_out[-1]:.3f}",
            (measured_at[-1], ours.held_out[-1]),
            xytext=(-4, 12),
            textcoords="offset points",
            ha="right",
            color=DARK,
            fontsize=10,
        )
    loss.set_xlim(0, max(1, len(theirs.losses)))
    loss.set_title("Loss, nats per character", loc="left", color=DARK, fontsize=11)
    loss.set_xlabel("training step", color=GREY)
    loss.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    loss.legend(frameon=False, fontsize=9, loc="upper right")

    names = [ours.name, theirs.name]
    rates = [ours.characters_per_second, theirs.characters_per_second]
    bars = speed.barh(names, rates, color=[DARK, PALE], height=0.55)
    speed.bar_label(bars, [f" {rate:,.0f}" for rate in rates], fontsize=10, color=DARK)
    speed.set_xlim(0, max(rates) * 1.3)
    speed.set_title("Training, characters per second", loc="left", color=DARK, fontsize=11)
    speed.xaxis.set_visible(False)
    speed.spines["bottom"].set_visible(False)

    # Equal losses have no place on a logarithmic axis, and so no point.
    apart = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    if any(apart):
        points = [(step, value) for step, value in zip(steps, apart, strict=True) if value]
        distance.semilogy(*zip(*points, strict=True), ".", color=DARK, markersize=2.5)
        distance.set_ylim(1e-8, max(1e-1, 3 * max(apart)))
    distance.set_xlim(0, max(1, len(apart)))
    distance.set_title(
        "Distance of the two losses, single steps", loc="left", color=DARK, fontsize=11
    )
    distance.set_xlabel("training step", color=GREY)
    distance.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    distance.minorticks_off()
    write_whole(path, "picture", lambda name: figure.savefig(name, format="png"))
