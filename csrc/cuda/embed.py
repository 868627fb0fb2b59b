"""Writes the C++ source that holds the compiled kernels: see embedded.h.

Images are compressed, to about a seventh of their size (zlib: a quarter); inflate.h unpacks them
where they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import NamedTuple


class Module(NamedTuple):
    architecture: str
    capability: int
    image: Path
    symbols: dict[str, str]  # by name expression

    @property
    def exact(self) -> bool:
        """Whether it runs on that capability alone."""
        return self.architecture[-1].isalpha()

    @property
    def ptx(self) -> bool:
        return self.architecture.startswith("compute_")


def blob(label: str, file: Path) -> list[str]:
    # The digest makes this a new source whenever the file is another one: no compiler, nor a cache
    # of its results, would look into it. A zero ends what is text.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return [
        f"// {digest}",
        'asm(R"(.pushsection .rodata',
        ".balign 16",
        f".global {label}",
        f".hidden {label}",
        f'{label}: .incbin "{file.resolve().as_posix()}"',
        ".byte 0",
        '.popsection)");',
        f'extern "C" const char {label}[];',
        "",
    ]


def compressed(image: Path) -> Path:
    packed = image.with_name(image.name + ".xz")
    if not packed.exists() or packed.stat().st_mtime_ns < image.stat().st_mtime_ns:
        packed.write_bytes(lzma.compress(image.read_bytes()))
    return packed


def write(file: Path, modules: list[Module], report: Path) -> None:
    lines = [
        "// Written by csrc/cuda/compile.py.",
        '#include "cuda/embedded.h"',
        "",
    ]
    packed = [compressed(module.image) for module in modules]
    for index, image in enumerate(packed):
        lines += blob(f"fastcell_cuda_module_{index}", image)
    lines += [
        *blob("fastcell_cuda_report", report),
        "namespace fastcell::cuda {",
        "namespace {",
        "",
    ]
    for index, module in enumerate(modules):
        lines.append(f"const EmbeddedKernel kernels_{index}[] = {{")
        for name, symbol in module.symbols.items():
            lines.append(f"    {{{json.dumps(name)}, {json.dumps(symbol)}}},")
        lines += ["};", ""]
    lines += ["}  // namespace", "", "const EmbeddedModule embedded_modules[] = {"]
    for index, module in enumerate(modules):
        exact, ptx = (str(flag).lower() for flag in (module.exact, module.ptx))
        lines.append(
            f'    {{"{module.architecture}", {module.capability}, {exact}, {ptx}, '
            f"fastcell_cuda_module_{index}, {packed[index].stat().st_size}, kernels_{index}, "
            f"{len(module.symbols)}}},"
        )
    lines += [
        "};",
        f"const std::size_t embedded_module_count = {len(modules)};",
        "const char* const embedded_report = fastcell_cuda_report;",
        "",
        "}  // namespace fastcell::cuda",
        "",
    ]
    file.write_text("\n".join(lines))
