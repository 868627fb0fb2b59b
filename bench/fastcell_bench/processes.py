"""The other end of the pipe: start a worker, ask it, hold it still while others are timed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastcell_bench.contenders import Entry

_POOL_SIZES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent
_CAN_STOP = hasattr(signal, "SIGSTOP")


class WorkerError(Exception):
    """One sentence on what went wrong. `dead`: the process is gone."""

    def __init__(self, sentence: str, dead: bool) -> None:
        super().__init__(sentence)
        self.dead = dead


class WorkerProcess:
    """A worker between requests is stopped with SIGSTOP: threads of its pools cannot spin."""

    def __init__(self, entry: Entry, threads: int) -> None:
        self.entry = entry
        self.version = ""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._pending = b""
        paths = [str(_PACKAGE_PARENT), *(os.path.abspath(path) for path in sys.path)]
        environment = {
            **os.environ,
            **dict.fromkeys(_POOL_SIZES, str(threads)),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastcell_bench.worker", entry.factory, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            # `-m` looks in the current folder first; a user's torch.py there is not meant.
            cwd=_PACKAGE_PARENT,
            # Ctrl-C belongs to the parent, which then ends its workers.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, timeout: float) -> None:
        """Read the worker's first line. Raises WorkerError, and the process is gone then."""
        try:
            self.version = str(self._answer(timeout)["version"])
        except WorkerError as failure:
            self.close()
            raise WorkerError(f"did not start: {failure}", dead=True) from None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Continue the worker, send, await the answer, stop it again. Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._signal("SIGCONT")
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ProcessLookupError):
            raise WorkerError(self._epitaph(), dead=True) from None
        return self._answer(timeout)

    def close(self) -> None:
        """End the process, whatever it is doing, and free what belongs to it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._errors.close()
        for pipe in (self._process.stdin, self._process.stdout):
            # A request that never left the buffer cannot be flushed into a closed pipe.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        line = self._read_line(timeout)
        with contextlib.suppress(ProcessLookupError):
            self._signal("SIGSTOP")
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            raise WorkerError("answered with something that is not JSON", dead=False) from None
        if not values.pop("ok"):
            raise WorkerError(str(values["error"]), dead=False)
        return values

    def _read_line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    self._process.wait()
                    raise WorkerError(f"gave no answer within {timeout:g} s", dead=True)
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise WorkerError(self._epitaph(), dead=True)
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _epitaph(self) -> str:
        """How the process ended, with the last thing it said."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its pipe"
        if status < 0:
            try:
                return f"was killed by {signal.Signals(-status).name}"
            except ValueError:
                return f"was killed by signal {-status}"
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with status {status}" + (f": {said[-1][:200]}" if said else "")

    def _signal(self, name: str) -> None:
        if _CAN_STOP and self.alive:
            self._process.send_signal(getattr(signal, name))
