"""What the machine allows, and how much of it a row uses.

    limit time = max(FLOPs / FMA rate, bytes of weights / read bandwidth)

Both rates are measured in fastcell's own process, on its threads, between its timed blocks. The
bandwidth is that of a buffer as large as each thread's share of one recurrent weight matrix, so it
is the bandwidth of whichever cache level holds the weights. Not in the limit: activations, the
elementwise work, the barrier of each step, the call from Python. float64 runs on vectors of half as
many elements: half of the float32 FMA rate.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from typing import Any

from fastcell_bench.cases import Case

NOT_MEASURED = "not measured"
FMA = "FMA"
LARGEST_BUFFER = 512 << 20


@dataclass(frozen=True)
class CacheLevel:
    """A data cache as a core sees it: `share` is the bytes that fall to one thread."""

    name: str
    size: int
    share: int


@dataclass(frozen=True)
class Limit:
    """The least time of a row. `kind`: "FMA" or the cache level that is read."""

    seconds: float
    kind: str
    fma: float
    bandwidth: float

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "kind": self.kind,
            "fma_flops_per_second": self.fma,
            "read_bytes_per_second": self.bandwidth,
        }


def bytes_per_thread(case: Case, threads: int) -> int:
    """Each thread's share of one recurrent weight matrix, at least a few cache lines."""
    return max(4096, -(-case.recurrent_bytes // threads))


def limit_of(case: Case, fma: float, bandwidth: float, level: str) -> Limit:
    """fma: float32 FLOP/s; bandwidth: bytes/s, both over all threads."""
    rate = fma if case.dtype == "float32" else fma / 2
    compute, reading = case.flops / rate, case.weight_traffic / bandwidth
    kind = FMA if compute >= reading else level
    return Limit(max(compute, reading), kind, fma, bandwidth)


def cache_levels(
    threads: int, root: str = "/sys/devices/system/cpu/cpu0/cache"
) -> list[CacheLevel]:
    """Data caches from the inside out; empty where the system does not say."""
    levels: list[CacheLevel] = []
    for folder in sorted(glob.glob(os.path.join(root, "index*"))):
        try:
            level, kind, size, shared = (
                _read(os.path.join(folder, name))
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind == "Instruction":
            continue
        total = parse_size(size)
        sharers = min(threads, count_cpus(shared))
        levels.append(CacheLevel(f"L{level}", total, total // max(1, sharers)))
    return levels


def level_holding(size: int, levels: list[CacheLevel]) -> str:
    """The innermost level whose share holds `size` bytes."""
    for level in levels:
        if size <= level.share:
            return level.name
    return "memory" if levels else "cache"


def probe_sizes(threads: int, levels: list[CacheLevel]) -> dict[str, int]:
    """Bytes per thread that land in each level: half of it, but at least past the level before."""
    sizes: dict[str, int] = {}
    inner = 0
    for level in levels:
        size = max(min(level.share // 2, 16 * inner) if inner else level.share // 2, 2 * inner)
        if size * threads <= LARGEST_BUFFER:
            sizes[level.name] = size
        inner = level.share
    if levels and 2 * levels[-1].size <= LARGEST_BUFFER:
        sizes["memory"] = 2 * levels[-1].size // threads
    return sizes


def parse_size(text: str) -> int:
    """`2048K` to bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def count_cpus(text: str) -> int:
    """`0-3,8` to 5."""
    count = 0
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        count += int(last) - int(first) + 1 if dash else 1
    return count


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
