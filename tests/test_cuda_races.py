"""The CUDA kernels, emulated, under ThreadSanitizer: races.cpp and tree_races.cpp of emulation/.

A block is a thread and its threads are fibers, between which a switch orders nothing. So a missing
barrier inside of a block is reported as well as a missing release between blocks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from emulation_build import ROOT, build

FOLDER = ROOT / "build" / "emulation-threads"
REPORTED = 66


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a command that runs a program with the sanitizer begins with."""
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "empty.cpp").write_text("int main() { return 0; }")
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-fsanitize=thread", "empty.cpp", "-o", "empty"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no thread sanitizer")
    # A kernel that places memory anywhere leaves the sanitizer no room for its own.
    start = ["setarch", "-R"] if shutil.which("setarch") else []
    if subprocess.run([*start, str(folder / "empty")], capture_output=True, check=False).returncode:
        pytest.skip("programs with the thread sanitizer do not run here")
    return start


def built(start: list[str], name: str) -> list[str]:
    build(FOLDER, "-DFASTCELL_SANITIZE_THREADS=ON", target=name)
    return [*start, str(Path(FOLDER, name))]


@pytest.fixture(scope="module")
def program(start: list[str]) -> list[str]:
    return built(start, "races")


@pytest.fixture(scope="module")
def trees(start: list[str]) -> list[str]:
    return built(start, "tree_races")


def run(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={REPORTED}"}
    return subprocess.run(
        [*program, *arguments], env=os.environ | options, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


def test_no_race_and_the_same_results_in_every_place(program):
    done = run(program)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert ", 0 failures" in done.stdout


@pytest.mark.parametrize("defect", ["exchange", "states"])
def test_a_race_is_reported(program, defect):
    """Between blocks, and between the threads of one."""
    done = run(program, defect)
    assert done.returncode == REPORTED, done.stdout + done.stderr
    assert "data race" in done.stderr


def test_no_race_of_trees(trees):
    done = run(trees)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert ", 0 failures" in done.stdout


def test_a_race_of_trees_is_reported(trees):
    done = run(trees, "order")
    assert done.returncode == REPORTED, done.stdout + done.stderr
    assert "data race" in done.stderr
