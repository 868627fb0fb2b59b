"""The CUDA kernels as they were compiled: all of them, for every architecture, within limits.

No GPU is needed: the compiler's own report is in the extension (csrc/cuda/compile.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from emulation_build import emulated
from fastcell import _core

ROOT = Path(__file__).resolve().parent.parent
RESOURCES = {"registers", "spill_stores", "spill_loads", "stack", "shared"}


def script(name: str) -> ModuleType:
    """A module of the build."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / "cuda" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_kernels() -> NoReturn:
    """Fails where a build with CUDA kernels is meant to be tested (.ci/run), skips elsewhere."""
    if os.environ.get("FASTCELL_EXPECT_CUDA"):
        pytest.fail("FASTCELL_EXPECT_CUDA is set, but the extension was built without CUDA kernels")
    pytest.skip("the extension was built without CUDA kernels")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if not _core.cuda_architectures():
        without_kernels()
    found: dict[str, Any] = json.loads(_core.cuda_report())["architectures"]
    return found


def names(architecture: str) -> list[str]:
    found = re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", architecture)
    assert found is not None
    listed: list[str] = script("kernel_names").names(int(found[1]))
    return listed


@pytest.mark.parametrize(
    ("expected", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_a_build_without_kernels_fails_where_they_are_expected(monkeypatch, expected, outcome):
    monkeypatch.setenv("FASTCELL_EXPECT_CUDA", expected)
    with pytest.raises(outcome, match="built without CUDA kernels"):
        without_kernels()


def test_every_architecture_has_every_kernel(report):
    assert list(report) == _core.cuda_architectures()
    for architecture, compiled in report.items():
        assert list(compiled["kernels"]) == names(architecture), architecture
        assert len(compiled["kernels"]) > 0


def test_machine_code_and_what_later_chips_run(report):
    assert any(name.startswith("sm_") for name in report)
    if "compute_100" not in report:
        pytest.skip(f"built for {', '.join(report)} alone")
    assert list(report) == [
        *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_100")
    ]


def test_nothing_spills(report):
    """Hot kernels hold what they work on in registers: none of it in local memory."""
    hot: Callable[[str], bool] = getattr(script("kernel_names"), "hot", lambda name: True)
    bad = []
    for architecture, compiled in report.items():
        for name, used in compiled["kernels"].items():
            if architecture.startswith("compute_"):
                assert used is None  # the driver of a later chip will know
                continue
            assert used.keys() == RESOURCES, f"{architecture} {name}"
            assert 0 < used["registers"] <= 255
            if hot(name) and used["spill_stores"] + used["spill_loads"] + used["stack"]:
                bad.append(f"{architecture} {name}: {used}")
    assert bad == []


def test_the_report_is_understood():
    """A spill, the frame of a function that was not inlined, and a warning are seen."""
    log = """\
kernels.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
ptxas info    : Function properties for _Z1fv
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 40 bytes cumulative stack size, 128 bytes smem
ptxas info    : Function properties for _Z6helperv
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compile time = 27.203 ms
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
ptxas info    : Function properties for _Z1gv
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1hv' for 'sm_90a'
"""
    kernels, rest = script("nvrtc").parse_log(log)
    f = {"registers": 30, "spill_stores": 12, "spill_loads": 12, "stack": 40, "shared": 128}
    assert kernels == {"_Z1fv": f, "_Z1gv": dict.fromkeys(RESOURCES, 0) | {"registers": 8}}
    assert len(rest) == 1
    assert "never referenced" in rest[0]


def test_the_images_are_what_the_compiler_wrote(report):
    sizes = dict.fromkeys(report, 0)
    for architecture, image in _core.cuda_images():
        sizes[architecture] += len(image)
        if architecture.startswith("sm_"):
            assert image.startswith(b"\x7fELF"), architecture
        else:
            assert b".target sm_100" in image[:2000], architecture
    assert sizes == {architecture: found["bytes"] for architecture, found in report.items()}


# --- what a GPU runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        (70, None),
        (75, "sm_75"),
        (80, "sm_80"),
        (86, "sm_86"),
        (87, "sm_86"),  # machine code of a lower one with the same major number
        (89, "sm_89"),
        (90, "sm_90a"),
        (100, "sm_100"),
        (103, "sm_100"),
        (110, "compute_100"),  # PTX for what has no machine code
        (120, "sm_120"),
        (121, "sm_120"),
        (130, "compute_100"),
    ],
)
def test_the_image_for_a_gpu(capability, runs):
    listed = re.search(
        r"FASTCELL_CUDA_ARCHITECTURES ([^\n]*)", (ROOT / "cmake/cuda.cmake").read_text()
    )
    assert listed is not None
    modules = [
        script("embed").Module(name, int(re.sub(r"\D", "", name)), Path(), {})
        for name in listed[1].split()
    ]
    given = [(m.architecture, m.capability, m.exact, m.ptx) for m in modules]
    assert emulated().choose_module(given, capability) == runs
    assert emulated().choose_module(given[::-1], capability) == runs


def test_code_for_one_chip_runs_on_no_other():
    given = [("sm_90a", 90, True, False), ("compute_90a", 90, True, True)]
    assert emulated().choose_module(given, 90) == "sm_90a"
    assert emulated().choose_module(given[1:], 90) == "compute_90a"
    assert emulated().choose_module(given, 100) is None


def test_what_is_missing_is_said_at_the_first_call():
    """Without kernels, and with kernels but without a driver."""
    if not _core.cuda_architectures():
        message = r"this build of fastcell has no CUDA kernels \(FASTCELL_CUDA=OFF\)"
    else:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            message = r"the CUDA driver is missing, or older than this build needs: 525\.60"
        else:
            pytest.skip("there is a CUDA driver")
    for _ in range(2):  # the second call is no worse
        with pytest.raises(RuntimeError, match=message):
            _core.cuda_limits(0)


def test_the_extension_is_not_too_large():
    assert Path(_core.__file__).stat().st_size < 40e6


# --- the build's options --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package, and so without NVRTC."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    return folder / "bin" / "python"


def configure(python: Path, folder: Path, option: str) -> subprocess.CompletedProcess[str]:
    # cmake and ninja come with the test extra, beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not shutil.which("cmake", path=path) or not shutil.which("ninja", path=path):
        pytest.skip("cmake or ninja is not installed")
    where = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Nor a toolkit that this machine may have.
    environment |= {"PATH": path, "CUDA_HOME": str(folder)}
    return subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja"),
            *(f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={where}"),
            f"-DFASTCELL_CUDA={option}",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("option", ["OFF", "AUTO"])
def test_configures_without_the_packages(bare, tmp_path, option):
    done = configure(bare, tmp_path, option)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: left out" in done.stdout


def test_says_what_is_missing(bare, tmp_path):
    done = configure(bare, tmp_path, "ON")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "no cuda_nvrtc/lib/libnvrtc.so.12" in message
    assert "pip install nvidia-cuda-nvrtc-cu12" in message
