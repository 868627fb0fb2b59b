"""Builds the emulated CUDA engine, once per run of the tests, and loads it."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "emulation"
FOLDER = ROOT / "build" / f"emulation-{sys.version_info[0]}{sys.version_info[1]}"


def build(folder: Path, *options: str, target: str) -> None:
    """Configure and build a target of tests/emulation/CMakeLists.txt; incremental."""
    import pybind11

    generator = [
        *("cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]
    for command in (generator, ["cmake", "--build", str(folder), "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")


@functools.cache
def emulated() -> Any:
    """The extension ``_emulated``."""
    build(FOLDER, target="_emulated")
    (library,) = FOLDER.glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
