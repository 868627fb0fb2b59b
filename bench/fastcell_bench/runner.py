"""All rows, all contenders, alternating blocks.

Per row: the judge computes the truth, every contender is prepared and held against it, and those
that are right run in rounds, one block each: fastcell, peer, peer, ..., fastcell, peer, ... Whoever
is not being timed is stopped. The machine's rates are measured in fastcell's process after each of
its blocks.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders import OURS, Entry
from fastcell_bench.judge import judge
from fastcell_bench.limits import (
    NOT_MEASURED,
    CacheLevel,
    Limit,
    bytes_per_thread,
    level_holding,
    limit_of,
    probe_sizes,
)
from fastcell_bench.problem import Array
from fastcell_bench.processes import WorkerError, WorkerProcess
from fastcell_bench.ratios import median, paired_ratio

OK = "ok"
DIFFERS = "differs"
FAILED = "failed"
UNSUPPORTED = "unsupported"
NOT_TIMED = "not timed"

_WARM_SHARE = 0.2
_LIMIT_SECONDS = 0.03
_START_TIMEOUT = 120.0


@dataclass(frozen=True)
class Settings:
    """How to measure. min_time: seconds of a block; budget: seconds that one contender may take of
    one row, after which it runs fewer blocks; timeout: seconds until a silent worker is killed."""

    threads: int
    blocks: int
    min_time: float
    budget: float
    timeout: float


@dataclass
class Outcome:
    """One cell of the table: a contender in a row. blocks: each one's median seconds of a call."""

    status: str
    sentence: str = ""
    algorithm: str = ""
    threads: int = 0
    error: float | None = None
    tolerance: float | None = None
    blocks: list[float] = field(default_factory=list)
    calls: int = 0
    seconds: float | None = None
    ratio: float | None = None
    shortened: bool = False
    first_call: float = 0.0


@dataclass
class Row:
    """One line of the table. `failure`: why it shows no times at all."""

    case: Case
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    limit: Limit | None = None
    failure: str = ""

    @property
    def fraction(self) -> float | None:
        """Of the limit: 1 is as fast as the machine allows."""
        seconds = self.outcomes[OURS].seconds if OURS in self.outcomes else None
        return self.limit.seconds / seconds if self.limit and seconds else None


@dataclass
class MachineRates:
    """Measured once at the start in fastcell's process; `sentence` says why where it is empty."""

    fma: float | None = None
    bandwidth: dict[str, float] = field(default_factory=dict)
    sentence: str = ""


class Bench:
    """The workers of one run. Use as a context manager: leaving it ends every process."""

    def __init__(
        self, entries: Mapping[str, Entry], judge_entry: Entry, settings: Settings
    ) -> None:
        self.settings = settings
        self.levels: list[CacheLevel] = []
        self.versions: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self._entries = {**entries, judge_entry.name: judge_entry}
        self._judge = judge_entry.name
        self._workers: dict[str, WorkerProcess] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="fastcell-bench-")

    def __enter__(self) -> Bench:
        """Start all at once: importing takes each of them a while."""
        try:
            for name, entry in self._entries.items():
                self._workers[name] = WorkerProcess(entry, self.settings.threads)
            for name in list(self._workers):
                self._await(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._folder.cleanup()

    @property
    def contenders(self) -> list[str]:
        """fastcell first, then the peers, without the judge."""
        return [name for name in self._entries if name != self._judge]

    def rates(self) -> MachineRates:
        """The FMA rate and the bandwidth of each cache level."""
        found = MachineRates()
        sizes = probe_sizes(self.settings.threads, self.levels) or {"": 4096}
        for level, size in sizes.items():
            try:
                answer = self._ask(OURS, {"do": "limits", "bytes": size, "seconds": 0.1})
            except WorkerError as failure:
                return MachineRates(sentence=f"{NOT_MEASURED}: {failure}")
            if "unsupported" in answer:
                return MachineRates(sentence=str(answer["unsupported"]))
            found.fma = max(found.fma or 0.0, answer["fma"])
            if level:
                found.bandwidth[level] = answer["bandwidth"]
        return found

    def row(self, case: Case, advance: Callable[[str, int], None]) -> Row:
        """Compare, then time. `advance(contender, blocks)` is told of progress."""
        row = Row(case)
        try:
            truth = self._truth(case)
        except WorkerError as failure:
            row.failure = f"not compared, so not timed: the judge (torch.nn in float64) {failure}"
            return row
        for name in self.contenders:
            advance(name, 0)
            row.outcomes[name] = self._prepare(name, case, truth)
        del truth
        ours = row.outcomes[OURS]
        if ours.status == OK:
            self._rounds(row, advance)
        if ours.status != OK:
            row.failure = f"{OURS} {_verb(ours)}{ours.sentence}"
            for outcome in row.outcomes.values():
                if outcome.status == OK:
                    outcome.status = NOT_TIMED
                outcome.seconds = outcome.ratio = None
        return row

    def _truth(self, case: Case) -> dict[str, Array]:
        path = self._results_path(self._judge)
        exact = replace(case, dtype="float64")
        self._revive(self._judge)
        self._ask(self._judge, {"do": "prepare", "case": exact.to_json(), "results": str(path)})
        return _load(path)

    def _prepare(self, name: str, case: Case, truth: Mapping[str, Array]) -> Outcome:
        path = self._results_path(name)
        try:
            self._revive(name)
            answer = self._ask(
                name, {"do": "prepare", "case": case.to_json(), "results": str(path)}
            )
        except WorkerError as failure:
            return Outcome(FAILED, str(failure))
        if "unsupported" in answer:
            return Outcome(UNSUPPORTED, str(answer["unsupported"]))
        verdict = judge(case, _load(path), truth)
        return Outcome(
            OK if verdict.equal else DIFFERS,
            verdict.sentence,
            algorithm=answer["algorithm"],
            threads=answer["threads"],
            error=verdict.error,
            tolerance=verdict.tolerance,
            first_call=answer["seconds"],
        )

    def _rounds(self, row: Row, advance: Callable[[str, int], None]) -> None:
        rates: list[tuple[float, float]] = []
        racing = [name for name in self.contenders if row.outcomes[name].status == OK]
        for _ in range(self.settings.blocks):
            for name in racing:
                outcome = row.outcomes[name]
                if outcome.status == OK and self._affordable(outcome):
                    self._block(name, outcome)
                advance(name, 1)
                if name == OURS:
                    if outcome.status != OK:
                        return
                    rates += self._row_rates(row.case)
        ours = row.outcomes[OURS]
        for name in racing:
            outcome = row.outcomes[name]
            if outcome.status == OK:
                outcome.seconds = median(outcome.blocks)
                if name != OURS:
                    outcome.ratio = paired_ratio(outcome.blocks, ours.blocks)
        if rates:
            size = bytes_per_thread(row.case, self.settings.threads)
            fma, bandwidth = (median(values) for values in zip(*rates, strict=True))
            row.limit = limit_of(row.case, fma, bandwidth, level_holding(size, self.levels))

    def _affordable(self, outcome: Outcome) -> bool:
        """Another block within the budget? The first one always is."""
        call = min(outcome.blocks, default=outcome.first_call)
        cost = max(self.settings.min_time * (1 + _WARM_SHARE), call)
        if not outcome.blocks or (len(outcome.blocks) + 1) * cost <= self.settings.budget:
            return True
        outcome.shortened = True
        return False

    def _block(self, name: str, outcome: Outcome) -> None:
        seconds = self.settings.min_time
        request = {"do": "block", "seconds": seconds, "warm": seconds * _WARM_SHARE}
        try:
            answer = self._ask(name, request)
        except WorkerError as failure:
            outcome.status, outcome.sentence = FAILED, str(failure)
            return
        outcome.blocks.append(answer["seconds"])
        outcome.calls += answer["calls"]

    def _row_rates(self, case: Case) -> list[tuple[float, float]]:
        size = bytes_per_thread(case, self.settings.threads)
        request = {"do": "limits", "bytes": size, "seconds": _LIMIT_SECONDS}
        with contextlib.suppress(WorkerError):
            answer = self._ask(OURS, request)
            if "unsupported" not in answer:
                return [(answer["fma"], answer["bandwidth"])]
        return []

    def _ask(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        worker = self._workers.get(name)
        if worker is None:
            raise WorkerError(self.failures[name], dead=True)
        return worker.ask(request, self.settings.timeout)

    def _revive(self, name: str) -> None:
        """A fresh process for a contender that crashed in an earlier row."""
        worker = self._workers.get(name)
        if worker is not None and not worker.alive:
            worker.close()
            self._workers[name] = WorkerProcess(self._entries[name], self.settings.threads)
            self._await(name)

    def _await(self, name: str) -> None:
        """One that cannot even start is not tried again; every row repeats why."""
        try:
            self._workers[name].wait_until_ready(_START_TIMEOUT)
            self.versions[name] = self._workers[name].version
        except WorkerError as failure:
            self.failures[name] = str(failure)
            del self._workers[name]

    def _results_path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.npz"


def run_rows(
    bench: Bench, cases: Sequence[Case], advance: Callable[[Case, str, int], None]
) -> Iterator[Row]:
    """Each row as soon as it is done."""
    for case in cases:

        def report(name: str, blocks: int, case: Case = case) -> None:
            advance(case, name, blocks)

        yield bench.row(case, report)


def succeeded(rows: Sequence[Row]) -> bool:
    """No comparison failed, and every row of fastcell could be compared."""
    return all(
        not row.failure and all(o.status != DIFFERS for o in row.outcomes.values()) for row in rows
    )


def _verb(outcome: Outcome) -> str:
    return {DIFFERS: "is wrong: ", UNSUPPORTED: "cannot run this: "}.get(outcome.status, "")


def _load(path: Path) -> dict[str, Array]:
    with np.load(path) as stored:
        values = {name: stored[name] for name in stored.files}
    path.unlink()
    return values
