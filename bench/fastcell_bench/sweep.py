"""Time per call as curves over T, B, H and threads, and the table's rows under the machine's roof.
`python -m fastcell_bench.sweep --json sweep.json --plot-dir docs`

Measured as `fastcell bench` measures: a process per contender, results compared first, alternating
blocks. The number of threads is a property of those processes, so each number has a run of its own,
and a shape that lies on several curves is timed once.

The JSON document holds the curves' points and one document of `fastcell bench --json` per run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from fastcell_bench import machine, plot, record, sweep_plot, table
from fastcell_bench.cases import MODES, QUICK, TABLE, TABLE_CELLS, Case
from fastcell_bench.cli import UsageError, entries_of, positive, whole
from fastcell_bench.contenders import JUDGE, OURS, REGISTRY, Entry
from fastcell_bench.limits import cache_levels
from fastcell_bench.runner import Bench, MachineRates, Row, Settings, run_rows, succeeded

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130
SCHEMA = 1

ROOFLINE = "roofline"
# What a curve does not vary.
_T, _H = 100, 256
_SMALL_BATCH, _LARGE_BATCH = 8, 32

_DESCRIPTION = """\
Time fastcell's layers and their peers along curves: over T (B 8, I = H = 256), over B (T 100,
I = H = 256), over I = H (T 100, B 1 and B 32) and over the number of threads (T 100, B 32,
I = H = 256). And fastcell alone on the table of `fastcell bench`, for its roofline: FLOP/s over
FLOPs per byte of weights read, below what the machine's FMA units and caches allow."""

_EPILOG = """\
exit status: 0; 1 if a result was wrong or fastcell could not run a row; 2 for bad options.

examples:
  python -m fastcell_bench.sweep --json sweep.json --plot-dir docs
  python -m fastcell_bench.sweep --quick --parts T,roofline --peers torch --plot-dir .
  python -m fastcell_bench.sweep --redraw sweep.json --rows table.json --plot-dir docs"""


@dataclass(frozen=True)
class Point:
    """One place on a curve: x, and what runs there."""

    x: int
    T: int
    B: int
    I: int  # noqa: E741 - the equations' own name
    H: int
    threads: int


@dataclass(frozen=True)
class Curve:
    """One column of the picture. `axis`: what x is; `fixed`: what all points share."""

    name: str
    axis: str
    fixed: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class _Sweep:
    """How to make a curve's points of its values of x."""

    axis: str
    fixed: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    shape: Callable[[int], tuple[int, int, int, int]]


_SWEEPS = {
    "T": _Sweep(
        axis="T",
        fixed=f"B {_SMALL_BATCH}, I = H = {_H}",
        values=(1, 3, 10, 30, 100, 300, 1000),
        quick=(1, 10),
        shape=lambda x: (x, _SMALL_BATCH, _H, _H),
    ),
    "B": _Sweep(
        axis="B",
        fixed=f"T {_T}, I = H = {_H}",
        values=(1, 2, 4, 8, 16, 32, 64, 128),
        quick=(1, 8),
        shape=lambda x: (_T, x, _H, _H),
    ),
    "H1": _Sweep(
        axis="I = H",
        fixed=f"T {_T}, B 1",
        values=(16, 32, 64, 128, 256, 512, 1024),
        quick=(32, 128),
        shape=lambda x: (_T, 1, x, x),
    ),
    "H32": _Sweep(
        axis="I = H",
        fixed=f"T {_T}, B {_LARGE_BATCH}",
        values=(16, 32, 64, 128, 256, 512, 1024),
        quick=(32, 128),
        shape=lambda x: (_T, _LARGE_BATCH, x, x),
    ),
}
THREADS = "threads"
PARTS = (*_SWEEPS, THREADS, ROOFLINE)


def curves(names: Sequence[str], threads: int, quick: bool) -> list[Curve]:
    """The curves of these names, in the picture's order; `threads` is the largest number."""
    found = [
        Curve(
            name,
            sweep.axis,
            sweep.fixed,
            tuple(
                Point(x, *sweep.shape(x), threads) for x in (sweep.quick if quick else sweep.values)
            ),
        )
        for name, sweep in _SWEEPS.items()
        if name in names
    ]
    if THREADS in names:
        numbers = sorted({1, threads}) if quick else range(1, threads + 1)
        shape = (_T, _LARGE_BATCH, _H, _H)
        points = tuple(Point(n, *shape, n) for n in numbers)
        fixed = f"T {_T}, B {_LARGE_BATCH}, I = H = {_H}"
        found.append(Curve(THREADS, "threads", fixed, points))
    return found


def plan(
    chosen: Sequence[Curve], cells: Sequence[str], modes: Sequence[str]
) -> dict[int, list[Case]]:
    """Number of threads to the cases of that run, each once; the largest number first."""
    cases: dict[int, dict[Case, None]] = {}
    for mode in modes:
        for cell in cells:
            for point in (point for curve in chosen for point in curve.points):
                case = Case(cell, point.T, point.B, point.I, point.H, mode=mode)
                cases.setdefault(point.threads, {})[case] = None
    return {threads: list(cases[threads]) for threads in sorted(cases, reverse=True)}


@dataclass
class _Run:
    """One number of threads, or the table: what a document of `fastcell bench` is made of."""

    settings: Settings
    entries: dict[str, Entry]
    cases: list[Case]
    rates: MachineRates = field(default_factory=MachineRates)
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def document(self, command: Sequence[str], absent: dict[str, str]) -> dict[str, Any]:
        return record.document(
            command=command,
            settings=self.settings,
            machine=machine.describe(cache_levels(self.settings.threads)),
            rates=self.rates,
            versions=self.versions,
            absent=absent,
            rows=self.rows,
            complete=len(self.rows) == len(self.cases),
        )


class NotStartedError(Exception):
    """fastcell itself did not start: there is nothing to compare."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.sweep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what is timed")
    what.add_argument("--quick", action="store_true", help="two points per curve, short blocks")
    what.add_argument("--parts", metavar="LIST", help=f"of {','.join(PARTS)} (all)")
    what.add_argument(
        "--cell", type=str.upper, choices=TABLE_CELLS, metavar="CELL", help="lstm, gru or rnn (all)"
    )
    what.add_argument("--mode", choices=[*MODES, "both"], default="both")
    how = result.add_argument_group("how")
    how.add_argument(
        "--peers",
        metavar="LIST",
        help=f"of {','.join(n for n in REGISTRY if n != OURS)}; default: those installed",
    )
    how.add_argument("--threads", type=whole, metavar="N", help="default: the physical cores")
    how.add_argument("--blocks", type=whole, metavar="N", help="blocks per contender (5; quick 2)")
    how.add_argument(
        "--min-time", type=positive, metavar="S", help="seconds per block (0.1; quick 0.02)"
    )
    how.add_argument(
        "--budget",
        type=positive,
        metavar="S",
        help="seconds per contender and row before it runs fewer blocks (5; quick 1)",
    )
    how.add_argument(
        "--timeout",
        type=positive,
        default=120.0,
        metavar="S",
        help="give up on a contender that is silent for so long (120)",
    )
    output = result.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="as JSON, written again after every row")
    output.add_argument(
        "--plot-dir",
        metavar="FOLDER",
        help="pictures: sweep-inference.png, sweep-training.png, roofline.png",
    )
    output.add_argument(
        "--redraw", metavar="SWEEP.json", help="time nothing, draw what --json of a run has kept"
    )
    output.add_argument(
        "--rows",
        metavar="TABLE.json",
        help="the roofline's rows from `fastcell bench --json` instead of timing them",
    )
    return result


def main(
    argv: Sequence[str], registry: Mapping[str, Entry] = REGISTRY, judge_entry: Entry = JUDGE
) -> int:
    """Run; the exit status is in the command's --help."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what was wrong
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    try:
        _check_outputs(options)
        rows = _read(options.rows, "rows") if options.rows else None
        if options.redraw:
            document = _read(options.redraw, "runs")
            document["table"] = rows or document.get("table")
            return 0 if _draw(options.plot_dir, document) else FAILED
        names = _parts(options.parts)
        entries, absent = entries_of(options, registry)
    except UsageError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return BAD_USAGE
    return _measure(argv, options, names, entries, judge_entry, absent, rows)


def _measure(
    argv: Sequence[str],
    options: argparse.Namespace,
    names: Sequence[str],
    entries: dict[str, Entry],
    judge_entry: Entry,
    absent: dict[str, str],
    given_rows: dict[str, Any] | None,
) -> int:
    settings = _settings(options)
    cells = [options.cell] if options.cell else list(TABLE_CELLS)
    modes = list(MODES) if options.mode == "both" else [options.mode]
    chosen = curves(names, settings.threads, options.quick)
    runs = [
        _Run(replace(settings, threads=threads), entries, cases)
        for threads, cases in plan(chosen, cells, modes).items()
    ]
    table_run = None
    if ROOFLINE in names and given_rows is None:
        cases = [
            Case(*row, mode=mode)
            for mode in modes
            for row in (QUICK if options.quick else TABLE)
            if row[0] in cells
        ]
        table_run = _Run(settings, {OURS: entries[OURS]}, cases)

    def document(complete: bool) -> dict[str, Any]:
        command = ["python", "-m", "fastcell_bench.sweep", *argv]
        return {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "complete": complete,
            "curves": [asdict(curve) for curve in chosen],
            "runs": [run.document(command, absent) for run in runs],
            "table": table_run.document(command, {}) if table_run else given_rows,
        }

    status = 0
    for name, why in absent.items():
        print(f"{name}: {why}")
    try:
        for run in [*runs, *([table_run] if table_run else [])]:
            for lines in _rows(run, judge_entry):
                print("\n".join(lines), flush=True)
                if options.json:  # long measurements outlive whatever happens next
                    _write(options.json, document(complete=False))
            if not succeeded(run.rows):
                status = FAILED
    except NotStartedError as error:
        print(f"sweep: fastcell {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("sweep: interrupted; the rows above are complete", file=sys.stderr)
        status = INTERRUPTED
    values = document(complete=status != INTERRUPTED)
    if options.json and not _write(options.json, values):
        status = status or FAILED
    if options.plot_dir and not _draw(options.plot_dir, values):
        return status or FAILED
    return status


def _rows(run: _Run, judge_entry: Entry) -> Iterator[list[str]]:
    """Run it; lines for the terminal. Raises NotStartedError."""
    levels = cache_levels(run.settings.threads)
    cpu = machine.describe(levels)["cpu"]
    with Bench(run.entries, judge_entry, run.settings) as bench:
        run.versions.update(bench.versions)
        bench.levels = levels
        if OURS in bench.failures:
            raise NotStartedError(bench.failures[OURS])
        run.rates = bench.rates()
        yield ["", *table.heading(run.rates, cpu, run.settings.threads, "float32")]
        for row in run_rows(bench, run.cases, lambda case, name, blocks: None):
            first = not run.rows or run.rows[-1].case.mode != row.case.mode
            run.rows.append(row)
            heading = table.mode_heading(row.case, run.versions, bench.contenders)
            yield [*(heading if first else []), *table.row_lines(row, bench.contenders)]


def _draw(folder: str, document: dict[str, Any]) -> bool:
    """All pictures that the document has times for; False if one could not be written."""
    pictures = {
        f"sweep-{mode}.png": partial(sweep_plot.draw_curves, document=document, mode=mode)
        for mode in MODES
    }
    if document["table"]:
        pictures["roofline.png"] = partial(sweep_plot.draw_roofline, table=document["table"])
    for name, draw in pictures.items():
        path = os.path.join(folder, name)
        try:
            if draw(path):
                print(f"drew {path}")
        except OSError as error:
            print(f"sweep: {path} not written: {error}", file=sys.stderr)
            return False
    return True


def _write(path: str, document: dict[str, Any]) -> bool:
    """False, having said why, if it could not be written. Killed half-way, the old file stays."""
    try:
        record.write(f"{path}.part", document)
        os.replace(f"{path}.part", path)
    except OSError as error:
        print(f"sweep: no JSON written: {error}", file=sys.stderr)
        return False
    return True


def _parts(text: str | None) -> list[str]:
    if text is None:
        return list(PARTS)
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        what = f"no part is called {unknown[0]!r}" if unknown else "--parts names none"
        raise UsageError(f"{what}; known: {', '.join(PARTS)}")
    return names


def _settings(options: argparse.Namespace) -> Settings:
    quick = options.quick
    return Settings(
        threads=options.threads or machine.physical_cores(),
        blocks=options.blocks or (2 if quick else 5),
        min_time=options.min_time or (0.02 if quick else 0.1),
        budget=options.budget or (1.0 if quick else 5.0),
        timeout=options.timeout,
    )


def _check_outputs(options: argparse.Namespace) -> None:
    """A run takes long: say at once that its result has nowhere to go."""
    if not options.json and not options.plot_dir:
        raise UsageError("nothing would be kept: give --json, --plot-dir or both")
    if options.redraw and (options.json or not options.plot_dir):
        raise UsageError("--redraw draws: it needs --plot-dir and no --json")
    if options.plot_dir:
        if not os.path.isdir(options.plot_dir) or not os.access(options.plot_dir, os.W_OK):
            raise UsageError(f"--plot-dir {options.plot_dir}: no such folder, or not writable")
        if plot.unavailable():
            raise UsageError("--plot-dir needs matplotlib, which is not installed")
    if options.json:
        folder = os.path.dirname(os.path.abspath(options.json))
        place = options.json if os.path.exists(options.json) else folder
        if os.path.isdir(options.json) or not os.access(place, os.W_OK):
            raise UsageError(f"--json {options.json}: cannot be written")


def _read(path: str, key: str) -> dict[str, Any]:
    """A document of ours, known by its key and schema. Raises UsageError."""
    try:
        with open(path, encoding="utf-8") as file:
            values: dict[str, Any] = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from None
    schema = SCHEMA if key == "runs" else record.SCHEMA
    if not isinstance(values, dict) or key not in values or values.get("schema") != schema:
        wanted = "a sweep" if key == "runs" else "a run of `fastcell bench --json`"
        raise UsageError(f"{path}: not {wanted} of schema {schema}")
    return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
