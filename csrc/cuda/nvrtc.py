"""One call of NVIDIA's runtime compiler, and what its log says of each kernel."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class CompileError(Exception):
    pass


class Compiled(NamedTuple):
    image: bytes  # a cubin, or PTX with the zero that ends it
    symbols: dict[str, str]  # the lowered name of each name expression
    log: str


class Nvrtc:
    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            reason = self.library.nvrtcGetErrorString(status).decode()
            raise CompileError(f"{name}: {reason}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", found)
        return list(found)

    def fetch(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, file: Path, names: Sequence[str], options: Sequence[str]) -> Compiled:
        """The image is PTX if the options ask for a virtual architecture."""
        program = ctypes.c_void_p()
        reference = ctypes.byref(program)
        source = file.read_bytes()
        self.call("nvrtcCreateProgram", reference, source, file.name.encode(), 0, None, None)
        try:
            for name in names:
                self.call("nvrtcAddNameExpression", program, name.encode())
            words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            status = self.library.nvrtcCompileProgram(program, len(options), words)
            log = self.fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(log or self.library.nvrtcGetErrorString(status).decode())
            symbols = {}
            for name in names:
                symbol = ctypes.c_char_p()
                place = ctypes.byref(symbol)  # of the program's own string
                self.call("nvrtcGetLoweredName", program, name.encode(), place)
                symbols[name] = (symbol.value or b"").decode()
            virtual = any("=compute_" in option for option in options)
            return Compiled(self.fetch(program, "PTX" if virtual else "CUBIN"), symbols, log)
        finally:
            self.library.nvrtcDestroyProgram(reference)


ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for ")
FRAME = re.compile(
    r"(?:ptxas)?[\s.]*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
STACK = re.compile(r"(\d+) bytes cumulative stack size")
SHARED = re.compile(r"(\d+) bytes smem")
NOTHING = re.compile(r"\s*$|ptxas info\s*: (\d+ bytes gmem|Compile time|Function properties for)")
RESOURCES = ("registers", "spill_stores", "spill_loads", "stack", "shared")


def parse_log(log: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """What ptxas -v says of each kernel, by its symbol, and the lines that are something else.

    Of each kernel of which it said everything, there are the numbers RESOURCES.
    """
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    rest = []
    for line in log.splitlines():
        if match := ENTRY.match(line):
            current = kernels.setdefault(match[1], {})
        elif match := FRAME.match(line):
            # A function that was not inlined comes after its kernel: that is to count, too.
            stack, stores, loads = map(int, match.groups())
            current["stack"] = max(current.get("stack", 0), stack)
            current["spill_stores"] = current.get("spill_stores", 0) + stores
            current["spill_loads"] = current.get("spill_loads", 0) + loads
        elif match := USED.match(line):
            current["registers"] = int(match[1])
            found = SHARED.search(line)  # not mentioned if there is none
            current["shared"] = int(found[1]) if found else 0
            if found := STACK.search(line):
                current["stack"] = max(current.get("stack", 0), int(found[1]))
        elif not NOTHING.match(line):
            rest.append(line)
    return {name: found for name, found in kernels.items() if len(found) == len(RESOURCES)}, rest
