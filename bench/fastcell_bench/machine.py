"""The machine and its software, for the record."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fastcell_bench.limits import CacheLevel

_TELLING_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd")


def physical_cores() -> int:
    """Cores this process may run on, two hyperthreads counted as one."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(
                (
                    (topology / "physical_package_id").read_text().strip(),
                    (topology / "core_id").read_text().strip(),
                )
            )
        except OSError:
            return len(usable)
    return len(cores)


def describe(levels: list[CacheLevel]) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    cpu = _cpu_information()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "vendor": cpu.get("vendor_id", ""),
        "family_model_stepping": [cpu.get(k, "") for k in ("cpu family", "model", "stepping")],
        "architecture": platform.machine(),
        "instruction_sets": [flag for flag in _TELLING_FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "logical_cpus": os.cpu_count(),
        "usable_cores": physical_cores(),
        "caches": {level.name: level.size for level in levels},
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
    }


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, or of the CUDA that it supports; None without a driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        if said.strip():
            return said.splitlines()[0].strip()
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return None


def _cpu_information() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
