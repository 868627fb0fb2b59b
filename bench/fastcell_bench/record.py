"""The run as one JSON document: machine, versions, command, settings, rows, blocks, summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from fastcell_bench.contenders import OURS
from fastcell_bench.ratios import Summary, spread, summarize
from fastcell_bench.runner import MachineRates, Outcome, Row, Settings

SCHEMA = 1


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """One per mode and peer that has ratios, in the order of the rows."""
    modes = list(dict.fromkeys(row.case.mode for row in rows))
    peers = list(dict.fromkeys(name for row in rows for name in row.outcomes if name != OURS))
    found = []
    for mode in modes:
        for peer in peers:
            ratios = {
                row.case.label: ratio
                for row in rows
                if row.case.mode == mode
                and peer in row.outcomes
                and (ratio := row.outcomes[peer].ratio) is not None
            }
            summary = summarize(peer, mode, ratios)
            if summary is not None:
                found.append(summary)
    return found


def document(
    *,
    command: Sequence[str],
    settings: Settings,
    machine: dict[str, Any],
    rates: MachineRates,
    versions: dict[str, str],
    absent: dict[str, str],
    rows: Sequence[Row],
    complete: bool,
) -> dict[str, Any]:
    """Plain values. Times are seconds, ratios peer/fastcell, rates FLOP/s and bytes/s.

    absent: peers that were left out, and why. complete: False if the run was interrupted.
    """
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "complete": complete,
        "settings": asdict(settings),
        "machine": {**machine, "rates": asdict(rates)},
        "versions": versions,
        "absent": absent,
        "rows": [_row(row) for row in rows],
        "summary": [asdict(summary) for summary in summaries(rows)],
    }


def write(path: str, values: dict[str, Any]) -> None:
    """Raises OSError."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def _row(row: Row) -> dict[str, Any]:
    return {
        **row.case.to_json(),
        "flops": row.case.flops,
        "weight_bytes": row.case.weight_traffic,
        "limit": row.limit.to_json() if row.limit else None,
        "fraction_of_limit": row.fraction,
        "failure": row.failure or None,
        "contenders": {name: _outcome(outcome) for name, outcome in row.outcomes.items()},
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    values = asdict(outcome)
    values["spread"] = spread(outcome.blocks) if outcome.blocks else None
    return values
