"""fastcell's layers, called exactly as torch.nn's."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastcell_bench.contenders.torch_layers import TorchLayers

MEASUREMENTS = 6


class FastcellLayers(TorchLayers):
    """The frame of torch.nn with fastcell's classes in it."""

    def __init__(self, threads: int) -> None:
        self.library = importlib.import_module("fastcell")
        super().__init__(threads)

    @property
    def version(self) -> str:
        return str(self.library.__version__)

    def machine_rates(self, bytes_per_thread: int, seconds: float) -> tuple[float, float] | None:
        """By fastcell's own extension, on its threads.

        The best of a few short measurements: another process on the core would halve one, while
        the median of a block's many samples does not notice it.
        """
        core = importlib.import_module("fastcell._core")
        part = seconds / MEASUREMENTS
        # Long enough to read a large buffer several times: the first time fetches it.
        reading = max(part, bytes_per_thread / 2e9)
        repeat = range(MEASUREMENTS)
        fma = max(core.measure_fma_peak(self.threads, part) for _ in repeat)
        bandwidth = max(
            core.measure_read_bandwidth(bytes_per_thread, self.threads, reading) for _ in repeat
        )
        return fma, bandwidth

    def _describe(self, module: torch.nn.Module, x: Any) -> str:
        explain = getattr(self.library, "explain", None)
        if not callable(explain):
            return "fastcell's layer"
        plan = explain(module, x)
        return ", ".join(str(part) for part in (plan.path, plan.isa, plan.schedule) if part)
