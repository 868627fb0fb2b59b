"""Builds the extension with the address and undefined-behaviour sanitizers; runs tests on it.

    python tests/sanitize.py FOLDER [pytest arguments]

The build and a copy of the package with that extension go into FOLDER. Exit status 0 only if the
tests pass and no sanitizer reported anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("kernels", "random", "same_bits", "math", "reservoir", "trees", "lengths")
FILES = [f"tests/test_{name}.py" for name in NAMES]
# Enough to reach every engine, tile height, tail and buffer; the whole grid would take too long.
# Most of it on the baseline: the sanitizer does not see the masked loads and stores of AVX-512.
LONG = "grid or nan_and_inf or error or test_float or T372 or T40 or T35 or T30 or (threads and L2)"
LONG += " or test_estimator or example or benchmark or instruction_set or scikit or machine"
LONG += " or thousand or compiles or transforms or the_operators"
TESTS = [*FILES, "-k", f"not ({LONG})"]
WIDEST_TESTS = [*FILES, "-k", "compact or layout or any_count or unbatched or kernels_against"]


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        check=True,
    )


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(folder: Path) -> Path:
    """The package with a sanitized extension: the folder to put on the path."""
    work = folder / "build"
    # The widest set that runs here, and the baseline that is always there.
    widest = output(sys.executable, "-c", "import fastcell; print(fastcell._core.isas()[-1])")
    run(
        *("cmake", "-S", ROOT, "-B", work, "-G", "Ninja"),
        "-DFASTCELL_SANITIZE=ON",
        f"-DFASTCELL_ISAS={widest}",
        "-DFASTCELL_WERROR=ON",
        "-DFASTCELL_CUDA=OFF",
        # Not Release, which sets its own optimization, and strips what a report would name.
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={output(sys.executable, '-m', 'pybind11', '--cmakedir')}",
    )
    run("cmake", "--build", work)
    package = folder / "package" / "fastcell"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "python" / "fastcell", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for extension in work.glob("_core*.so"):
        shutil.copy(extension, package)
    return package.parent


def runtime() -> str:
    """The libraries that must be in the process before Python is: the sanitizer's runtime, and the
    C++ library whose throw it wraps."""
    compiler = os.environ.get("CXX", "c++").split()
    found = [
        output(*compiler, f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so")
    ]
    if not Path(found[0]).exists():
        sys.exit(f"sanitize: {compiler[0]} has no libasan.so; set CXX to a gcc that has one")
    return " ".join(found)


def main(arguments: list[str]) -> int:
    if not arguments:
        sys.exit(__doc__)
    # cmake and ninja come with the test extra, beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    package = build(Path(arguments[0]).resolve())
    sanitized = {
        "LD_PRELOAD": runtime(),
        # Python itself never frees much of what it allocates.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(package),
        "PYTHONMALLOC": "malloc",
    }
    check = f"import fastcell; assert fastcell.__file__.startswith({str(package)!r})"
    run(sys.executable, "-c", check, **sanitized)
    # A report goes to the process's own error stream: pytest must not swallow it.
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys")
    run(*pytest, *(arguments[1:] or TESTS), FASTCELL_ISA="baseline", **sanitized)
    run(*pytest, *(arguments[1:] or WIDEST_TESTS), **sanitized)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"sanitize: {error}")
