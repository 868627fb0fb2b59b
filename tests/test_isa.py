"""Every instruction set that this machine has: right results, and no code of one in another."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fastcell
from fastcell import _core
from support import python

TESTS = Path(__file__).parent


def test_the_highest_set_is_used():
    assert _core.isas()[0] == "baseline"
    assert _core.isa() == (os.environ.get("FASTCELL_ISA") or _core.isas()[-1])
    assert fastcell.info()["cpu"]["isa"] == _core.isa()


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_kernels(isa):
    """The compact cases, the bit patterns and the functions' contract, in a process of its own."""
    files = ["test_kernels.py", "test_same_bits.py", "test_math.py"]
    chosen = "compact or layout or nan_and_inf or same_bits or test_math"
    code = (
        "import sys, pytest; from fastcell import _core; print(_core.isa(), flush=True);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-q", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
    arguments += ["-k", chosen, *[str(TESTS / file) for file in files]]
    done = python(code, *arguments, FASTCELL_ISA=isa, OMP_NUM_THREADS="1")
    assert done.stdout.splitlines()[0] == isa
    assert " passed" in done.stdout


def test_an_unknown_name_is_refused():
    code = "import torch, fastcell; fastcell.LSTM(2, 3)(torch.zeros(1, 1, 2))"
    done = python(code, check=False, FASTCELL_ISA="sse9")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("RuntimeError: FASTCELL_ISA=sse9 is not an instruction set"), message


def test_no_name_means_the_highest():
    code = "from fastcell import _core; print(_core.isa())"
    assert python(code, FASTCELL_ISA="").stdout.strip() == _core.isas()[-1]


# --- what the linker could merge ------------------------------------------------------------------


def nm(*arguments: str) -> list[tuple[str, str]]:
    """(kind, name) of the symbols that ``nm`` prints."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    text = subprocess.run(
        ["nm", "-C", *arguments], capture_output=True, text=True, check=True
    ).stdout
    lines = [line[17:].split(" ", 1) for line in text.splitlines() if len(line) > 17]
    return [(kind, name) for kind, name in lines]


def test_the_module_exports_its_entry_alone():
    """Nothing of it can replace, or be replaced by, code of another library in the process."""
    code = [name for kind, name in nm("-D", "--defined-only", _core.__file__) if kind in "TtWwVui"]
    assert code == ["PyInit__core"]


def kernel_objects() -> dict[tuple[str, str], Path]:
    """The newest object files of each instruction set in a build folder of this checkout."""
    folder = Path(os.environ.get("FASTCELL_BUILD", TESTS.parent / "build"))
    objects = [
        file
        for file in folder.glob("**/kernels_*.dir/**/*kernels.cpp.o")
        if "sanitize" not in file.relative_to(folder).parts[0]
    ]
    objects.sort(key=lambda file: file.stat().st_mtime)
    return {
        (next(p for p in f.parts if p.startswith("kernels_"))[8:-4], f.name): f for f in objects
    }


def test_objects_share_no_inline_function():
    """A weak symbol outside of the set's namespace would be merged with another set's."""
    objects = kernel_objects()
    if not objects:
        pytest.skip("no build folder in this checkout: installed from a wheel")
    assert set(_core.isas()) <= {isa for isa, _ in objects}
    for (isa, _), file in objects.items():
        symbols = nm(str(file))
        mine = [name for _, name in symbols if f"fastcell::{isa}::" in name]
        assert len(mine) > 5, f"{file} is not what this test takes it for"
        shared = [
            (kind, name)
            for kind, name in symbols
            if kind in "TWVuDBi" and f"fastcell::{isa}::" not in name
        ]
        assert shared == [], f"{file} defines what other instruction sets may define too"
        initialisers = [name for _, name in symbols if name.startswith("_GLOBAL__sub_I")]
        assert initialisers == [], f"{file} runs code when the module is loaded"
