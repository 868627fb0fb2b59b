"""The process that holds one contender. `python -m fastcell_bench.worker module:Class THREADS`

One JSON object per line in, one per line out:

    {"do": "prepare", "case": {...}, "results": "/path.npz"}  run once, store results
    {"do": "block", "seconds": s, "warm": w}                  the median of a call
    {"do": "limits", "bytes": n, "seconds": s}                the machine's rates

An answer is {"ok": true, ...} or {"ok": false, "error": "one sentence"}. The first line out comes
before any request and says the version. Between requests the process blocks on the read, and its
parent also stops it, since the pools of several libraries spin after a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import make_problem

# One sample spans enough calls for the clock's own cost to vanish.
SAMPLE_SECONDS = 2e-4
_PR_SET_PDEATHSIG = 1


class Worker:
    """Answers requests about one contender."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._call: Call | None = None
        self._estimate = 0.0

    def prepare(self, case: dict[str, Any], results: str) -> dict[str, Any]:
        """Make the case ready, run it, store its results; `seconds` is the time of one run."""
        wanted = Case.from_json(case)
        self._call = None
        gc.collect()
        reason = self._contender.why_not(wanted)
        if reason is not None:
            return {"unsupported": reason}
        self._call = self._contender.prepare(wanted, make_problem(wanted))
        start = time.perf_counter()
        raw = self._call()
        self._estimate = time.perf_counter() - start
        np.savez(results, **self._contender.results(wanted, raw))  # type: ignore[arg-type]
        return {
            "seconds": self._estimate,
            "algorithm": self._contender.algorithm(wanted),
            "threads": self._contender.threads,
        }

    def block(self, seconds: float, warm: float) -> dict[str, Any]:
        """Median seconds of a call over a block of `seconds`; a slow case runs once.

        Others used the caches since the last block: `warm` seconds of calls are not counted.
        """
        if self._call is None:
            raise RuntimeError("block before prepare")
        call, clock = self._call, time.perf_counter
        gc.disable()
        try:
            if self._estimate < seconds:
                count, start = 0, clock()
                while not count or clock() - start < warm:
                    call()
                    count += 1
                self._estimate = (clock() - start) / count
            per_sample = max(1, round(SAMPLE_SECONDS / max(self._estimate, 1e-9)))
            samples: list[float] = []
            begin = clock()
            while not samples or clock() - begin < seconds:
                start = clock()
                for _ in range(per_sample):
                    call()
                samples.append((clock() - start) / per_sample)
        finally:
            gc.enable()
        self._estimate = statistics.median(samples)
        return {"seconds": self._estimate, "calls": len(samples) * per_sample}

    def limits(self, bytes: int, seconds: float) -> dict[str, Any]:
        """The FMA rate and the read bandwidth of a buffer of `bytes` per thread, if it can tell."""
        rates = self._contender.machine_rates(bytes, seconds)
        if rates is None:
            return {"unsupported": "not measured"}
        return {"fma": rates[0], "bandwidth": rates[1]}


def serve(factory: str, threads: int, requests: TextIO, answers: TextIO) -> int:
    """Answer until the requests end."""

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        module, _, name = factory.partition(":")
        contender: Contender = getattr(importlib.import_module(module), name)(threads)
        worker = Worker(contender)
        answer({"ok": True, "version": contender.version, "threads": contender.threads})
    except Exception as error:  # whatever a library throws at import is its row's sentence
        answer({"ok": False, "error": _sentence(error)})
        return 1
    actions: dict[str, Callable[..., dict[str, Any]]]
    actions = {"prepare": worker.prepare, "block": worker.block, "limits": worker.limits}
    for line in requests:
        request = json.loads(line)
        try:
            answer({"ok": True, **actions[request.pop("do")](**request)})
        except Exception as error:  # the run goes on with the other contenders
            answer({"ok": False, "error": _sentence(error)})
    return 0


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _die_with_parent() -> None:
    """A stopped worker cannot notice that its parent is gone, so the kernel must end it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Keep the pipe for answers alone: whatever a library prints goes to stderr."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return serve(sys.argv[1], int(sys.argv[2]), sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main())
