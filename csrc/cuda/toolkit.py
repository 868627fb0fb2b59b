"""Finds the parts of CUDA that the build needs: NVRTC, the runtime's headers and static library.

    python toolkit.py

prints them as NAME=VALUE lines, or says on standard error what is missing and exits with 1. In
this order: pip's packages of CUDA 12, those of CUDA 13, an installed toolkit (CUDA_HOME, else
/usr/local/cuda). Pip's come first, since they are the same on every machine, and 12 before 13,
since what it builds runs on older drivers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The first that compiles for 10.0 and 12.0, and whose runtime has cudaLibraryLoadData.
OLDEST = (12, 8)


class MissingError(Exception):
    pass


class Layout(NamedTuple):
    """Where the parts are below a folder, as glob patterns."""

    name: str
    nvrtc: str
    runtime: str  # the folder with cuda_runtime_api.h
    crt: str  # the folder with crt/, which the runtime's headers include
    library: str  # the folder with libcudart_static.a


CUDA_12 = Layout(
    "nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-nvcc-cu12",
    "cuda_nvrtc/lib/libnvrtc.so.12",
    "cuda_runtime/include",
    "cuda_nvcc/include",
    "cuda_runtime/lib",
)
CUDA_13 = Layout(
    "nvidia-cuda-nvrtc, nvidia-cuda-runtime, nvidia-cuda-crt",
    "cu13/lib/libnvrtc.so.13",
    "cu13/include",
    "cu13/include",
    "cu13/lib",
)


def installed(home: str) -> Layout:
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    folder = f"targets/{machine}-linux"
    return Layout(home, "lib64/libnvrtc.so.1[0-9]", "include", "include", f"{folder}/lib")


class Toolkit(NamedTuple):
    nvrtc: Path
    compiler: tuple[int, int]
    runtime: tuple[int, int]
    library: Path
    includes: tuple[Path, ...]


def nvrtc_version(library: Path) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    status = ctypes.CDLL(str(library)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if status:
        raise MissingError(f"{library} does not work (nvrtcVersion: {status})")
    return major.value, minor.value


def runtime_version(header: Path) -> tuple[int, int]:
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    if not found:
        raise MissingError(f"{header} does not say its version")
    return int(found[1]) // 1000, int(found[1]) % 1000 // 10


def first(folders: list[Path], pattern: str) -> Path:
    for folder in folders:
        for file in sorted(folder.glob(pattern)):
            return file
    raise MissingError(f"no {pattern}")


def assemble(folders: list[Path], layout: Layout) -> Toolkit:
    """The parts may be in different ones of these folders, as pip's packages are."""
    nvrtc = first(folders, layout.nvrtc)
    header = first(folders, f"{layout.runtime}/cuda_runtime_api.h")
    crt = first(folders, f"{layout.crt}/crt/host_defines.h")
    library = first(folders, f"{layout.library}/libcudart_static.a")
    includes = tuple(dict.fromkeys((header.parent, crt.parent.parent)))
    found = Toolkit(nvrtc, nvrtc_version(nvrtc), runtime_version(header), library, includes)
    if min(found.compiler, found.runtime) < OLDEST:
        versions = [".".join(map(str, v)) for v in (found.compiler, found.runtime, OLDEST)]
        raise MissingError("NVRTC {} and runtime {}, but {} is needed".format(*versions))
    return found


def candidates() -> Iterator[tuple[list[Path], Layout]]:
    # A build in isolation has its requirements in a folder of their own, added to the path.
    packages = [folder for entry in sys.path if (folder := Path(entry) / "nvidia").is_dir()]
    yield packages, CUDA_12
    yield packages, CUDA_13
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    yield [Path(home)], installed(home)


def find() -> Toolkit:
    reasons = []
    for folders, layout in candidates():
        try:
            return assemble(folders, layout)
        except (MissingError, OSError) as error:
            reasons.append(f"{layout.name}: {error}")
    raise MissingError("\n".join(reasons))


def main() -> int:
    try:
        found = find()
    except MissingError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"NVRTC={found.nvrtc}")
    print("COMPILER={}.{}".format(*found.compiler))
    print("RUNTIME={}.{}".format(*found.runtime))
    print(f"LIBRARY={found.library}")
    print(f"INCLUDES={';'.join(map(str, found.includes))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
