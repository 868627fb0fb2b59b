"""The sizes that the CUDA engine's places are made for, beside torch.nn in float64.

Where each of them runs is asked of the plans alone, which need no GPU. The smaller ones are
computed under emulation, all of them on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import fastcell
from emulation_build import emulated
from fastcell import cuda
from support import GATES, Case, Problem, places_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of an H100 or H200.
MULTIPROCESSORS, CAPABILITY = 132, 90
# On the device: weights, packed and for cuDNN, and gradients, most of them in float64; generous.
BYTES_PER_WEIGHT = 80


class Size(NamedTuple):
    cell: str
    dtype: torch.dtype
    B: int
    H: int
    place: str  # on such a GPU

    def __str__(self) -> str:
        return f"{self.cell}-{str(self.dtype).removeprefix('torch.')}-B{self.B}-H{self.H}"

    @property
    def case(self) -> Case:
        steps = 8 if self.H < 4096 else 3
        return Case(self.cell, self.dtype, T=steps, B=self.B, I=64, H=self.H)


SIZES = [
    Size("lstm", BF16, 16, 512, "cluster"),
    Size("lstm", F16, 16, 512, "cluster"),
    Size("lstm", BF16, 256, 512, "cluster"),
    Size("lstm", BF16, 16, 1024, "grid"),
    Size("lstm", BF16, 16, 2048, "grid"),
    Size("lstm", BF16, 256, 1024, "step"),
    Size("lstm", BF16, 16, 4096, "step"),
    Size("lstm", F32, 16, 1024, "grid"),
    Size("gru", BF16, 16, 512, "cluster"),
    Size("gru", BF16, 16, 1024, "grid"),
    Size("rnn_tanh", BF16, 16, 2048, "grid"),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_place_of_a_size(size):
    emulated().pretend(capability=CAPABILITY, multiprocessors=MULTIPROCESSORS)
    products = str(size.dtype).removeprefix("torch.")
    plans = [
        emulated().CudaPlan(
            0, size.cell, products, backward, size.case.T, size.B, size.H, size.H, 1, False, ""
        )
        for backward in (False, True)
    ]
    assert [plan.place for plan in plans] == [size.place] * 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_of_a_size(size, device):
    case = size.case._replace(device=device)
    if device == "cpu":
        quick = size.H <= 512 or (size.dtype is F32 and size.H <= 1024)
        if size.B > 16 or not quick:
            pytest.skip("takes long under emulation")
        emulated().pretend(capability=CAPABILITY, multiprocessors=MULTIPROCESSORS)
        case = case._replace(T=2)
    elif torch.cuda.mem_get_info()[0] < BYTES_PER_WEIGHT * GATES[size.cell] * size.H**2:
        pytest.skip("too little memory on this GPU")
    problem = Problem(case)
    layer = problem.layer(fastcell)
    limits = cuda.device_code.cuda_limits(0)
    if (limits["capability"], limits["multiprocessors"]) == (CAPABILITY, MULTIPROCESSORS):
        said = fastcell.explain(layer, problem.inputs()["x"])
        assert set(places_of(said.schedule)) == {size.place}, said.schedule
    wide = problem.widened()
    wide.case = wide.case._replace(device=device)
    expected = wide.run(wide.layer(torch.nn))
    problem.assert_close(problem.run(layer), {n: v.cpu() for n, v in expected.items()})
