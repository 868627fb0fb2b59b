"""Compiles the CUDA kernels for every architecture, and writes the C++ source that embeds them.

    python compile.py --nvrtc LIBRARY --architectures sm_80,compute_100 --output FOLDER

A job is a few of the kernels for one architecture: NVRTC compiles a program on one core, so that a
job per architecture would leave cores idle and be long. A job whose inputs are those of the last
build is not done again. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import embed
import kernel_names
from nvrtc import CompileError, Nvrtc, parse_log

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE, HERE.parent)
# No contraction but where the source says fma: two instantiations must give the same bits.
OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")
# Every job parses all headers again (0.03 s of about 0.3 s per kernel), and a process that uses a
# kernel loads all of its module: few, but not one.
GROUP = 6

Record = dict[str, Any]


class Job(NamedTuple):
    nvrtc: Path
    source: Path
    output: Path
    architecture: str  # sm_90a: a cubin; compute_100: PTX
    number: int  # of the job among the architecture's
    names: tuple[str, ...]
    key: str  # of all inputs

    @property
    def image(self) -> Path:
        suffix = "ptx" if self.architecture.startswith("compute_") else "cubin"
        return self.output / f"{self.architecture}-{self.number}.{suffix}"

    @property
    def record(self) -> Path:
        return self.image.with_suffix(".json")


def capability(architecture: str) -> int:
    found = re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", architecture)
    if not found:
        sys.exit(f"{architecture!r} is no architecture; sm_80 or compute_100 would be")
    return int(found[1])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def closure(file: Path) -> dict[Path, bytes]:
    """The source, and all headers that it may include under whatever condition."""
    found: dict[Path, bytes] = {}
    waiting = [file.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = path.read_bytes()
            for name in re.findall(rb'^\s*#\s*include\s*"(.+?)"', found[path], re.MULTILINE):
                places = (folder / name.decode() for folder in (path.parent, *FOLDERS))
                waiting += [place.resolve() for place in places if place.is_file()][:1]
    return found


def plan(arguments: argparse.Namespace, version: str) -> list[Job]:
    files = closure(arguments.source)
    files |= {path: path.read_bytes() for path in (Path(__file__), HERE / "nvrtc.py")}
    # Not by their full paths: a build elsewhere, of the same sources, is the same.
    inputs = sorted(f"{os.path.relpath(path, HERE)} {digest(text)}" for path, text in files.items())
    inputs += [version, *OPTIONS]
    jobs = []
    for architecture in arguments.architectures:
        names = kernel_names.names(capability(architecture))
        if len(set(names)) != len(names):
            sys.exit(f"kernel_names.py names a kernel of {architecture} twice")
        for number, start in enumerate(range(0, len(names), GROUP)):
            group = tuple(names[start : start + GROUP])
            key = digest("\n".join([*inputs, architecture, *group]).encode())
            where = (arguments.nvrtc, arguments.source, arguments.output)
            jobs.append(Job(*where, architecture, number, group, key))
    return jobs


def recorded(job: Job) -> Record | None:
    """What the last build wrote down, if its inputs were these and its image is still there."""
    try:
        record: Record = json.loads(job.record.read_text())
        same = record["key"] == job.key and record["digest"] == digest(job.image.read_bytes())
    except (OSError, ValueError, KeyError):
        return None
    return record if same else None


def run(job: Job) -> Record:
    began = time.perf_counter()
    options = [f"--gpu-architecture={job.architecture}", *OPTIONS]
    options += [f"-I{folder}" for folder in FOLDERS]
    compiled = Nvrtc(job.nvrtc).compile(job.source, job.names, options)
    resources, warnings = parse_log(compiled.log)
    if job.image.suffix == ".cubin" and (unknown := {*compiled.symbols.values()} - {*resources}):
        raise CompileError(f"{compiled.log}\nnot understood: the report of {', '.join(unknown)}")
    kernels = {
        name: {"symbol": symbol, "resources": resources.get(symbol)}
        for name, symbol in compiled.symbols.items()
    }
    record = {
        "key": job.key,
        "digest": digest(compiled.image),
        "bytes": len(compiled.image),
        "seconds": time.perf_counter() - began,
        "warnings": "\n".join(warnings),
        "kernels": kernels,
    }
    job.image.write_bytes(compiled.image)
    job.record.write_text(json.dumps(record))
    return record


def run_all(jobs: list[Job]) -> list[Record]:
    records = {job: record for job in jobs if (record := recorded(job))}
    waiting = [job for job in jobs if job not in records]
    if waiting:
        workers = min(len(waiting), os.cpu_count() or 1)
        # Not by fork: a library of threads has been loaded.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(run, job): job for job in waiting}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    records[job] = future.result()
                except (CompileError, BrokenProcessPool) as error:
                    pool.shutdown(cancel_futures=True)
                    what = f"{job.source.name} for {job.architecture}, {', '.join(job.names)}"
                    sys.exit(f"{error}\nNVRTC failed on {what}")
    return [records[job] for job in jobs]


def show_warnings(jobs: list[Job], records: list[Record]) -> bool:
    """Prints each warning once, however many jobs gave it."""
    seen: dict[str, Job] = {}
    for job, record in zip(jobs, records, strict=True):
        if record["warnings"]:
            seen.setdefault(record["warnings"], job)
    for text, job in seen.items():
        print(f"{job.architecture}, {', '.join(job.names)}:\n{text}", file=sys.stderr)
    return bool(seen)


def report(compiler: str, jobs: list[Job], records: list[Record]) -> dict[str, Any]:
    """What the extension tells of its kernels. Nothing that varies from build to build."""
    architectures: dict[str, Any] = {}
    for job, record in zip(jobs, records, strict=True):
        of = architectures.setdefault(job.architecture, {"bytes": 0, "modules": 0, "kernels": {}})
        of["bytes"] += record["bytes"]
        of["modules"] += 1
        of["kernels"] |= {name: kernel["resources"] for name, kernel in record["kernels"].items()}
    return {"compiler": compiler, "options": list(OPTIONS), "architectures": architectures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvrtc", type=Path, required=True)
    parser.add_argument("--architectures", type=lambda text: text.split(","), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=HERE / "kernels.cu")
    parser.add_argument("--werror", action="store_true", help="fail if there are warnings")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    nvrtc = Nvrtc(arguments.nvrtc)
    known = nvrtc.architectures()
    if unknown := [a for a in arguments.architectures if capability(a) not in known]:
        sys.exit(f"NVRTC {nvrtc.version()} does not compile for {', '.join(unknown)}")

    began = time.perf_counter()
    compiler = f"NVRTC {nvrtc.version()}"
    jobs = plan(arguments, compiler)
    records = run_all(jobs)
    if show_warnings(jobs, records) and arguments.werror:
        sys.exit("NVRTC warned, and warnings are errors")
    text = json.dumps(report(compiler, jobs, records), indent=1)
    (arguments.output / "report.json").write_text(text)
    modules = [
        embed.Module(
            job.architecture,
            capability(job.architecture),
            job.image,
            {name: kernel["symbol"] for name, kernel in record["kernels"].items()},
        )
        for job, record in zip(jobs, records, strict=True)
    ]
    embed.write(arguments.output / "embedded.cpp", modules, arguments.output / "report.json")
    megabytes = sum(record["bytes"] for record in records) / 2**20
    seconds = time.perf_counter() - began
    print(f"{len(jobs)} CUDA modules, {megabytes:.1f} MiB, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
