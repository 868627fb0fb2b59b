"""``fastcell.info()``: what this installation is made of and runs on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from . import _core

OPENMP_NAMES = ("libgomp", "libomp", "libiomp")


def info() -> dict[str, Any]:
    """Versions, instruction sets, OpenMP runtimes and threads; only what JSON can hold.

    Returns:
        a dictionary with the keys

        * ``fastcell``, ``torch``, ``numpy``, ``python``, ``platform``: versions;
        * ``cpu``: ``isa`` in use, ``isas`` that build and CPU have, ``isa_override`` (the variable
          ``FASTCELL_ISA``, or None), ``threads`` that a call will use, ``cores``, and ``caches``
          of the first core in bytes (None where the system does not tell);
        * ``openmp``: files of the OpenMP runtimes in this process (None where the system does not
          tell). More than one of them would fight over the cores;
        * ``cuda``: ``architectures`` (``sm_*``: machine code, ``compute_*``: PTX for later chips)
          and number of ``kernels`` compiled in, version of the ``runtime`` inside (None without).
    """
    from . import __version__

    return {
        "fastcell": __version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "isa": _core.isa(),
            "isas": list(_core.isas()),
            "isa_override": os.environ.get("FASTCELL_ISA"),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "caches": caches(),
        },
        "openmp": openmp_runtimes(),
        "cuda": _cuda(),
    }


def _cuda() -> dict[str, Any]:
    version = _core.cuda_runtime_version()
    compiled = json.loads(_core.cuda_report()).get("architectures", {})
    return {
        "architectures": _core.cuda_architectures(),
        "kernels": sum(len(one["kernels"]) for one in compiled.values()),
        "runtime": f"{version // 1000}.{version % 1000 // 10}" if version else None,
    }


def openmp_runtimes(maps: str = "/proc/self/maps") -> list[str] | None:
    """Files of the OpenMP runtimes that this process has mapped, or None if that is not known."""
    try:
        lines = Path(maps).read_text(errors="replace").splitlines()
    except OSError:
        return None
    # address perms offset dev inode path; the path may hold blanks
    fields = (line.split(maxsplit=5) for line in lines)
    paths = {parts[5] for parts in fields if len(parts) == 6}
    return sorted(path for path in paths if os.path.basename(path).startswith(OPENMP_NAMES))


def caches(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int] | None:
    """Bytes of the caches of the first core by name (``L1d``, ``L2``, ``L3``), or None."""
    found = {}
    try:
        for index in sorted(Path(folder).glob("index*")):
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                unit = {"K": 2**10, "M": 2**20}.get(size[-1:], 1)
                found["L1d" if level == "1" else f"L{level}"] = int(size.rstrip("KM")) * unit
    except (OSError, ValueError):
        return None
    return found or None


def format_info(facts: dict[str, Any]) -> str:
    """The dictionary of ``info()`` as lines for a person."""
    cpu, cuda, openmp = facts["cpu"], facts["cuda"], facts["openmp"]
    override = f" (FASTCELL_ISA={cpu['isa_override']})" if cpu["isa_override"] else ""
    sizes = (f"{name} {size // 1024:,} KiB" for name, size in (cpu["caches"] or {}).items())
    unknown = "not known on this system"
    rows = {
        "fastcell": facts["fastcell"],
        "torch": facts["torch"],
        "numpy": facts["numpy"],
        "python": f"{facts['python']} on {facts['platform']}",
        "ISA in use": cpu["isa"] + override,
        "ISAs to choose": ", ".join(cpu["isas"]),
        "threads": f"{cpu['threads']} (of {cpu['cores']} logical cores)",
        "caches": ", ".join(sizes) or unknown,
        "OpenMP": unknown if openmp is None else ", ".join(openmp) or "none",
        "CUDA": f"runtime {cuda['runtime']}, {', '.join(cuda['architectures'])}"
        if cuda["architectures"]
        else "no kernels compiled in",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in rows.items())
