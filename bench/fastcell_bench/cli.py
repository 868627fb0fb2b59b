"""`fastcell bench`: options, progress, output, exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from fastcell_bench import machine, plot, record, table
from fastcell_bench.cases import (
    GATES,
    INFERENCE,
    ITEM_BYTES,
    QUICK,
    TABLE,
    TRAINING,
    Case,
    parse_rows,
    parse_shape,
)
from fastcell_bench.contenders import JUDGE, OURS, REGISTRY, Entry
from fastcell_bench.limits import cache_levels
from fastcell_bench.runner import Bench, MachineRates, Row, Settings, run_rows, succeeded

FAILED_COMPARISON = 1
BAD_USAGE = 2
INTERRUPTED = 130

_DESCRIPTION = """\
Time fastcell's layers against its peers: one process per contender, alternating blocks, medians.
A time is printed only after the results (in training all gradients too) were found equal to
torch.nn's in float64. A ratio is the peer's time over fastcell's: above 1, fastcell is faster.

"of limit": the machine's own least time over fastcell's, max(FLOPs / FMA rate, bytes of weights /
read bandwidth), where a step must read the recurrent weights once; both rates are measured in
fastcell's process."""

_EPILOG = """\
exit status: 0; 1 if a result was wrong or fastcell could not run a row; 2 for bad options.

examples:
  fastcell bench --quick
  fastcell bench --cell lstm --mode training --plot lstm.png
  fastcell bench --shape GRU:50:3:40:129 --layers 2 --bidirectional --ragged --peers torch
  fastcell bench --json - --rows 1,8,15
  fastcell bench --cuda --dtype bfloat16 --mode inference"""


class UsageError(Exception):
    """One sentence about an option."""


class _NotStartedError(Exception):
    """fastcell itself did not start: there is nothing to compare."""


@dataclass
class _Console:
    """Where the table goes, and a bar on stderr that it does not run into."""

    out: TextIO
    bar: Any = None

    def lines(self, lines: Sequence[str]) -> None:
        if self.bar is not None:
            self.bar.clear()
        for line in lines:
            if self.bar is not None and sys.stderr.isatty():
                self.bar.write(line, file=self.out)
            else:
                print(line, file=self.out)
        self.out.flush()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="fastcell bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = result.add_argument_group("what is timed")
    rows.add_argument("--quick", action="store_true", help="a few small rows and short blocks")
    rows.add_argument(
        "--cell",
        type=str.upper,
        choices=list(GATES),
        metavar="CELL",
        help="only the table's rows of this cell: lstm, gru or rnn",
    )
    rows.add_argument("--rows", metavar="LIST", help="only these rows of the table, like 1,4-6")
    rows.add_argument(
        "--cuda",
        action="store_true",
        help="on a GPU, beside torch.nn with cuDNN; other options: fastcell bench --cuda --help",
    )
    rows.add_argument("--list", action="store_true", help="list the table's rows and stop")
    rows.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="CELL:T:B:I:H",
        help="this shape instead of the table, like GRU:50:3:40:129; may be repeated",
    )
    rows.add_argument("--mode", choices=[INFERENCE, TRAINING, "both"], default="both")
    rows.add_argument("--dtype", choices=list(ITEM_BYTES), default="float32")
    rows.add_argument("--layers", type=whole, default=1, metavar="N", help="stacked layers")
    rows.add_argument("--bidirectional", action="store_true")
    rows.add_argument(
        "--ragged", action="store_true", help="packed samples of different lengths, T to T/4"
    )
    how = result.add_argument_group("how")
    how.add_argument(
        "--peers",
        metavar="LIST",
        help=f"of {','.join(n for n in REGISTRY if n != OURS)}; default: those installed",
    )
    how.add_argument("--threads", type=whole, metavar="N", help="default: the physical cores")
    how.add_argument("--blocks", type=whole, metavar="N", help="blocks per contender (7; quick 3)")
    how.add_argument(
        "--min-time", type=positive, metavar="S", help="seconds per block (0.2; quick 0.02)"
    )
    how.add_argument(
        "--budget",
        type=positive,
        metavar="S",
        help="seconds per contender and row before it runs fewer blocks (20; quick 2)",
    )
    how.add_argument(
        "--timeout",
        type=positive,
        default=120.0,
        metavar="S",
        help="give up on a contender that is silent for so long (120)",
    )
    output = result.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="also as JSON; - for stdout, the table then goes to stderr"
    )
    output.add_argument("--plot", metavar="FILE.png", help="also as a picture")
    return result


def main(
    argv: list[str], registry: Mapping[str, Entry] = REGISTRY, judge_entry: Entry = JUDGE
) -> int:
    """Run; the exit status is in the module's --help."""
    if argv[:1] == ["--cuda"]:  # has options of its own, --help among them
        from fastcell_bench import gpu

        return gpu.main(argv[1:])
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what was wrong
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    try:
        if options.cuda:
            raise UsageError("--cuda comes first: fastcell bench --cuda --help")
        if options.list:
            print("\n".join(f"{number:>3}  {_shape(row)}" for number, row in enumerate(TABLE, 1)))
            return 0
        cases = _cases(options)
        entries, absent = entries_of(options, registry)
        _check_outputs(options)
        settings = _settings(options)
    except (UsageError, ValueError) as error:
        print(f"fastcell bench: {error}", file=sys.stderr)
        return BAD_USAGE
    return _run(argv, options, cases, entries, judge_entry, absent, settings)


def _run(
    argv: list[str],
    options: argparse.Namespace,
    cases: list[Case],
    entries: dict[str, Entry],
    judge_entry: Entry,
    absent: dict[str, str],
    settings: Settings,
) -> int:
    console = _Console(sys.stderr if options.json == "-" else sys.stdout)
    levels = cache_levels(settings.threads)
    facts = machine.describe(levels)
    rows: list[Row] = []
    rates = MachineRates()
    versions: dict[str, str] = {}
    complete = False
    try:
        with (
            _progress(len(cases) * len(entries) * settings.blocks) as bar,
            Bench(entries, judge_entry, settings) as bench,
        ):
            console.bar = bar
            versions.update(bench.versions)
            bench.levels = levels
            if OURS in bench.failures:
                raise _NotStartedError(bench.failures[OURS])
            rates = bench.rates()
            console.lines(table.heading(rates, facts["cpu"], settings.threads, options.dtype))
            console.lines([f"{name}: {why}" for name, why in absent.items()])
            done = 0

            def advance(case: Case, name: str, blocks: int) -> None:
                if bar is not None:
                    bar.set_description(f"{case.shape} {case.mode} {name}", refresh=False)
                    bar.update(blocks)

            for row in run_rows(bench, cases, advance):
                if not rows or rows[-1].case.mode != row.case.mode:
                    console.lines(table.mode_heading(row.case, versions, bench.contenders))
                rows.append(row)
                console.lines(table.row_lines(row, bench.contenders))
                done += len(entries) * settings.blocks
                if bar is not None:  # a row that failed counts in full
                    bar.update(done - bar.n)
            complete = True
    except _NotStartedError as error:
        print(f"fastcell bench: fastcell {error}", file=sys.stderr)
        return FAILED_COMPARISON
    except KeyboardInterrupt:
        print("fastcell bench: interrupted; the rows above are complete", file=sys.stderr)
    console.bar = None
    console.lines(table.summary_lines(rows))
    values = record.document(
        command=["fastcell", "bench", *argv],
        settings=settings,
        machine=facts,
        rates=rates,
        versions=versions,
        absent=absent,
        rows=rows,
        complete=complete,
    )
    written = _write(options, values, rows, facts["cpu"], settings, versions)
    if not complete:
        return INTERRUPTED
    return 0 if succeeded(rows) and written else FAILED_COMPARISON


def _write(
    options: argparse.Namespace,
    values: dict[str, Any],
    rows: list[Row],
    cpu: str,
    settings: Settings,
    versions: dict[str, str],
) -> bool:
    """The files asked for; False if one could not be written."""
    written = True
    try:
        if options.json == "-":
            print(json.dumps(values, indent=2))
        elif options.json:
            record.write(options.json, values)
    except OSError as error:
        print(f"fastcell bench: no JSON written: {error}", file=sys.stderr)
        written = False
    if options.plot:
        title = (
            f"fastcell {versions.get(OURS, '')} on {cpu},"
            f" {table.count_threads(settings.threads)}, {options.dtype}"
        )
        try:
            if not plot.draw(options.plot, rows, title, versions):
                print("fastcell bench: no plot written: no row has a time", file=sys.stderr)
        except OSError as error:
            print(f"fastcell bench: no plot written: {error}", file=sys.stderr)
            written = False
    return written


def _cases(options: argparse.Namespace) -> list[Case]:
    """Raises UsageError or ValueError with a sentence."""
    if options.shape:
        if options.cell or options.rows:
            raise UsageError("--shape replaces the table, so --cell and --rows do not go with it")
        shapes = [parse_shape(text) for text in options.shape]
    else:
        shapes = list(QUICK if options.quick else TABLE)
        if options.rows:
            shapes = [TABLE[row] for row in parse_rows(options.rows, len(TABLE))]
        if options.cell:
            shapes = [shape for shape in shapes if shape[0] == options.cell]
            if not shapes:
                raise UsageError(f"no row of the table is left for --cell {options.cell}")
    modes = [INFERENCE, TRAINING] if options.mode == "both" else [options.mode]
    return [
        replace(
            Case(*shape),
            mode=mode,
            dtype=options.dtype,
            layers=options.layers,
            bidirectional=options.bidirectional,
            ragged=options.ragged,
        )
        for mode in modes
        for shape in shapes
    ]


def entries_of(
    options: argparse.Namespace, registry: Mapping[str, Entry]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The contenders of this run, fastcell first; and the peers left out, with the reason."""
    known = [name for name in registry if name != OURS]
    asked = known
    if options.peers is not None:
        asked = list(dict.fromkeys(part.strip() for part in options.peers.split(",") if part))
        unknown = [name for name in asked if name not in known]
        if unknown or not asked:
            what = f"no peer is called {unknown[0]!r}" if unknown else "--peers names no peer"
            raise UsageError(f"{what}; known: {', '.join(known)}")
    absent = {name: why for name in asked if (why := _not_installed(registry[name]))}
    if options.peers is not None and absent:
        raise UsageError("; ".join(f"{name} is {why}" for name, why in absent.items()))
    present = [name for name in asked if name not in absent]
    return {name: registry[name] for name in (OURS, *present)}, absent


def _not_installed(entry: Entry) -> str:
    """A lookup, not an import: this process must stay free of their thread pools."""
    missing = [name for name in entry.requires if importlib.util.find_spec(name) is None]
    return f"not installed (needs {', '.join(missing)})" if missing else ""


def _check_outputs(options: argparse.Namespace) -> None:
    """A run takes minutes: say at once that its result has nowhere to go."""
    if options.plot:
        if not options.plot.lower().endswith(".png"):
            raise UsageError(f"--plot {options.plot}: the name must end in .png")
        reason = plot.unavailable()
        if reason:
            raise UsageError(reason)
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path is None or path == "-":
            continue
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise UsageError(f"{name} {path}: there is no folder {folder}")
        if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise UsageError(f"{name} {path}: cannot be written")


def _settings(options: argparse.Namespace) -> Settings:
    quick = options.quick
    return Settings(
        threads=options.threads or machine.physical_cores(),
        blocks=options.blocks or (3 if quick else 7),
        min_time=options.min_time or (0.02 if quick else 0.2),
        budget=options.budget or (2.0 if quick else 20.0),
        timeout=options.timeout,
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A tqdm bar on stderr, or None without tqdm; a dumb stderr gets a line now and then."""
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield None
        return
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=total, unit="block", file=sys.stderr, mininterval=interval, leave=False) as bar:
        yield bar


def _shape(row: tuple[str, int, int, int, int]) -> str:
    return ":".join(str(part) for part in row)


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {1 << 20}")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
