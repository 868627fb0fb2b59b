"""Settings of the whole suite: repeatable random tests, and what is slow only when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when cuBLAS is first used. Without it torch refuses products on a GPU while it is asked to be
# deterministic, as the poisoned tests do.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

from emulation_build import emulated
from fastcell import cuda, engines
from support import poisoned, skip_lacking

# The same examples on every machine and every day; no folder of remembered failures.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is allocated but never written shows as NaN in whatever reads it."""
    with poisoned():
        assert torch.empty(3).isnan().all(), "memory is not poisoned"
        assert (torch.empty(12, dtype=torch.uint8).view(torch.float32)).isnan().all()
        assert torch.zeros(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        yield


@pytest.fixture(
    params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device that a problem's tensors are on: the CPU where the engine is emulated."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not cuda.architectures():
            pytest.skip("built without CUDA kernels")
        yield "cuda"
        torch.cuda.synchronize()
        return
    emulated().pretend()
    monkeypatch.setitem(engines.ENGINES, "cpu", cuda)
    monkeypatch.setattr(cuda, "device_code", emulated())
    yield "cpu"


def pytest_report_header() -> list[str]:
    """What the results on a GPU belong to."""
    if not torch.cuda.is_available():
        return []
    from fastcell_bench import gpu

    return [gpu.in_words(gpu.facts(torch.device("cuda", torch.cuda.current_device())))]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of the tests on a GPU, skips what that GPU does not have."""
    if item.get_closest_marker("cuda") and torch.cuda.is_available() and cuda.architectures():
        callspec = getattr(item, "callspec", None)
        skip_lacking("cuda", **(callspec.params if callspec else {}))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))
