"""The benchmark's companions: errors against float64, and curves with their pictures."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastcell
from fastcell_bench import accuracy, cli, sweep, sweep_plot
from fastcell_bench.accuracy import OUTPUT, VARIANTS, Measurement, Pool
from fastcell_bench.cases import MODES, TABLE_CELLS, TRAINING, Case
from fastcell_bench.contenders import OURS, Entry
from support import threads
from tolerances import accumulation_length, tolerance

SMALL = ["--batch", "3", "--input-size", "5", "--hidden-size", "7", "--seeds", "2"]
JUDGE = Entry("judge", "bench_contenders:Honest", ())


class Off(torch.nn.RNN):
    """Everything that it gives is too large by a hundredth."""

    def forward(self, *args: Any) -> Any:
        output, state = super().forward(*args)
        return output * 1.01, state


# --- errors against float64 -----------------------------------------------------------------------


def test_errors_are_pooled_as_of_one_array() -> None:
    pool = Pool()
    pool.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]).double())
    pool.add(torch.tensor([-4.0]), torch.tensor([0.0]).double())
    assert pool.relative == pytest.approx(5 / math.sqrt(26))
    assert pool.largest == 4.0
    with pytest.raises(ValueError, match="expected"):
        pool.add(torch.zeros(1), torch.zeros(2).double())


def test_nan_is_less_accurate_than_anything() -> None:
    broken, right = Pool(), Pool()
    broken.add(torch.tensor([math.nan, 0.0]), torch.ones(2).double())
    broken.add(torch.ones(2), torch.ones(2).double())
    right.add(torch.zeros(2), torch.ones(2).double())
    assert math.isnan(broken.largest)
    assert Measurement("float32", "RNN", 1, OUTPUT, broken, right).less_accurate
    assert not Measurement("float32", "RNN", 1, OUTPUT, right, right).less_accurate
    exact = Pool()
    exact.add(torch.ones(2), torch.ones(2).double())
    assert Measurement("float32", "RNN", 1, OUTPUT, right, exact).less_accurate
    assert not Measurement("float32", "RNN", 1, OUTPUT, exact, exact).less_accurate


def test_a_library_less_accurate_than_torch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    library = SimpleNamespace(LSTM=torch.nn.LSTM, RNN=Off)
    argv = [*SMALL, "--steps", "1", "4", "--variants", "float32", "--cells", "lstm"]
    assert accuracy.main(argv, library) == 0
    assert accuracy.main([*argv, "rnn"], library) == accuracy.LESS_ACCURATE
    out = capsys.readouterr().out
    for T in (1, 4):
        assert f"float32 RNN at T = {T}: relative error of the output 1.00e-02" in out
    assert "less accurate than torch: float32 LSTM" not in out


def test_errors_of_the_real_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "accuracy.json"
    argv = [*SMALL, "--steps", "1", "20", "--json", str(path)]
    status = accuracy.main(argv)
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert (status == 0) == (not found["failures"])
    assert len(found["rows"]) == 2 * 3 * (len(VARIANTS) + len(accuracy.GRADIENTS))
    for row in found["rows"]:
        variant = VARIANTS[row["variant"]]
        if variant.judged:
            length = accumulation_length(5, 7, gates=4, batch=3)
            allowed = tolerance(variant.dtype, row["T"], length)
            assert row["fastcell"]["relative_error"] <= allowed, row
            assert row["torch"]["relative_error"] > 0 or "weight_hh" in row["quantity"], row
        else:
            assert 0 < row["fastcell"]["relative_error"] < 0.1, row
    assert all(f"{name}, output: relative error" in out for name in VARIANTS)
    assert "float32, gradient of weight_hh: largest error" in out
    assert "no peer for bfloat16-weights GRU: torch has no" in out
    assert "no peer for int8-weights RNN" in out


def test_a_missing_peer_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--cells", "rnn", "--steps", "3", "--variants", "int8-weights"]
    library = SimpleNamespace(quantize=fastcell.quantize)
    assert accuracy.main(argv, library) == 0
    assert "no peer for int8-weights RNN" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--cells", "mlp"], ["--variants", "int4"]])
def test_bad_options_of_accuracy(argv: list[str]) -> None:
    assert accuracy.main(argv) == accuracy.BAD_USAGE


# --- curves ---------------------------------------------------------------------------------------


def test_curves_share_shapes_and_time_them_once() -> None:
    chosen = sweep.curves(sweep.PARTS, 2, quick=False)
    assert [curve.name for curve in chosen] == ["T", "B", "H1", "H32", "threads"]
    cases = sweep.plan(chosen, TABLE_CELLS, MODES)
    assert list(cases) == [2, 1], "threads are a property of the processes"
    for timed in cases.values():
        assert len(timed) == len(set(timed))
    points = sum(len(curve.points) for curve in chosen)
    # T 100 B 8, T 100 B 1 H 256, and T 100 B 32 H 256 of three curves, lie on several.
    assert sum(len(timed) for timed in cases.values()) == 3 * 2 * (points - 4)
    assert {(case.T, case.B, case.I, case.H) for case in cases[1]} == {(100, 32, 256, 256)}
    assert all(len(curve.points) <= 2 for curve in sweep.curves(sweep.PARTS, 16, quick=True))


def test_a_sweep_is_timed_kept_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {OURS: "Honest", "good": "Honest", "bad": "Wrong", "picky": "Picky"}
    registry = {name: Entry(name, f"bench_contenders:{kind}", ()) for name, kind in kinds.items()}
    path = tmp_path / "sweep.json"
    argv = ["--quick", "--parts", "T,threads,roofline", "--cell", "rnn", "--mode", "inference"]
    how = ["--threads", "2", "--blocks", "1", "--min-time", "0.001", "--timeout", "20"]
    output = ["--json", str(path), "--plot-dir", str(tmp_path)]
    status = sweep.main([*argv, *how, *output], registry, JUDGE)
    said = capsys.readouterr()
    assert status == sweep.FAILED, "one contender is wrong"
    assert "bad: output is off by" in said.out

    found = json.loads(path.read_text())
    assert found["complete"] is True
    assert [run["settings"]["threads"] for run in found["runs"]] == [2, 1]
    assert all(run["complete"] for run in (*found["runs"], found["table"]))
    steps, threads = (sweep_plot.times(found, c, "inference", "RNN") for c in found["curves"])
    assert list(steps) == list(threads) == [OURS, "good"]
    assert [x for x, _ in steps[OURS]] == [1, 10]
    assert [x for x, _ in threads["good"]] == [1, 2]
    assert all(seconds > 0 for _, seconds in threads["good"])
    table = sweep_plot.roof_points(found["table"])
    assert [(point.T, point.H) for point in table] == [(1, 128), (100, 128)]
    # These contenders cannot measure the machine, so there is no roof to draw.
    assert (tmp_path / "sweep-inference.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "sweep-training.png").exists()
    assert not (tmp_path / "roofline.png").exists()

    found["table"]["machine"]["rates"] = {"fma": 2e11, "bandwidth": {"L1": 8e11, "memory": 4e10}}
    rows = tmp_path / "table.json"
    rows.write_text(json.dumps(found["table"]))
    (tmp_path / "sweep-inference.png").unlink()
    again = ["--redraw", str(path), "--rows", str(rows), "--plot-dir", str(tmp_path)]
    assert sweep.main(again) == 0
    for name in ("sweep-inference.png", "roofline.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_roofline_has_the_counts_of_the_case() -> None:
    case = Case("GRU", 100, 8, 256, 128, mode=TRAINING)
    counts = {"flops": case.flops, "weight_bytes": case.weight_traffic}
    timed = {**case.to_json(), **counts, "contenders": {OURS: {"seconds": 0.5}}}
    failed = {**timed, "contenders": {OURS: {"seconds": None}}}
    absent = {**timed, "contenders": {}}
    (point,) = sweep_plot.roof_points({"rows": [timed, failed, absent]})
    assert point.flops_per_second == 2 * case.flops
    assert point.intensity == case.flops / case.weight_traffic
    assert (point.cell, point.mode, point.I, point.H) == ("GRU", TRAINING, 256, 128)


def test_labels_move_no_further_than_they_must() -> None:
    assert sweep_plot.spread_out([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]
    assert sweep_plot.spread_out([0.0, 0.0, 0.0], 1.0) == pytest.approx([-1.0, 0.0, 1.0])
    assert sweep_plot.spread_out([0.0, 0.5, 9.0], 1.0) == pytest.approx([-0.25, 0.75, 9.0])
    assert sweep_plot.spread_out([], 1.0) == []


def test_ticks_have_a_unit() -> None:
    ticks = [sweep_plot.duration(seconds) for seconds in (2.0, 1e-3, 5e-5, 1e-7)]
    assert ticks == ["2 s", "1 ms", "50 µs", "100 ns"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "nothing would be kept"),
        (["--parts", "T,W", "--plot-dir", "."], "no part is called 'W'"),
        (["--parts", ",", "--plot-dir", "."], "names none"),
        (["--peers", "nobody", "--plot-dir", "."], "no peer is called 'nobody'"),
        (["--plot-dir", "/no/such/folder"], "no such folder"),
        (["--json", "/no/such/folder/sweep.json"], "cannot be written"),
        (["--redraw", "sweep.json"], "nothing would be kept"),
        (["--redraw", "sweep.json", "--json", "other.json"], "it needs --plot-dir"),
        (["--redraw", "/no/such/sweep.json", "--plot-dir", "."], "No such file"),
        (["--rows", __file__, "--plot-dir", "."], "not JSON"),
    ],
)
def test_bad_options_of_the_sweep(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(argv) == sweep.BAD_USAGE
    assert sentence in capsys.readouterr().err


def test_only_documents_of_the_right_kind_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema": 1, "rows": []}))
    assert sweep.main(["--redraw", str(path), "--plot-dir", str(tmp_path)]) == sweep.BAD_USAGE
    assert "not a sweep" in capsys.readouterr().err


def test_variants_of_fastcell(tmp_path, capsys):
    from fastcell_bench import variants

    out = tmp_path / "variants.json"
    arguments = ["--shape", "LSTM:60:2:4:5", "--shape", "RNN_RELU:60:2:4:5", "--blocks", "2"]
    assert variants.main([*arguments, "--min-time", "0.001", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["shape"][0] for row in found["inference"]] == ["LSTM", "RNN_RELU"]
    for row in found["inference"]:
        assert all(row[name] > 0 for name in ("float32", "bfloat16 weights", "int8 weights"))
    for row in found["training"]:
        assert 0 < row["kept"] <= row["kept by torch"]
        assert row["recompute"] > 0
    assert "LSTM:60:2:4:5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        variants.main(["--shape", "LSTM:60"])


@pytest.mark.parametrize(
    ("cuda", "available", "architectures", "why"),
    [
        (None, False, ["sm_90a"], "is built without CUDA"),
        ("12.9", False, ["sm_90a"], "torch finds none (driver: "),
        ("12.9", True, [], "this build of fastcell has no CUDA kernels"),
    ],
)
def test_gpu_table_without_a_gpu(cuda, available, architectures, why, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(fastcell.cuda, "architectures", lambda: architectures)
    assert cli.main(["--cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcell bench: needs a CUDA device and kernels for it: ")
    assert why in error
    assert error.count("\n") == 1


def test_gpu_table_has_options_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--cuda", "--help"])
    assert stop.value.code == 0
    assert "usage: fastcell bench --cuda" in capsys.readouterr().out
    assert cli.main(["--quick", "--cuda"]) == 2
    assert "--cuda comes first" in capsys.readouterr().err


def test_what_figures_of_a_gpu_belong_to(tmp_path, monkeypatch):
    """The driver from nvidia-smi; the same line heads the report of the tests."""
    import conftest
    from fastcell_bench import gpu

    assert conftest.pytest_report_header() == [] or torch.cuda.is_available()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    facts = gpu.facts(torch.device("cuda", 0))
    assert (facts["gpu"], facts["driver"], facts["torch"]) == (
        "a GPU", "550.54.15", torch.__version__,
    )  # fmt: skip
    (line,) = conftest.pytest_report_header()
    assert f"torch {torch.__version__}" in line
    assert "gpu a GPU, driver 550.54.15" in line


def test_the_driver_without_its_tool(tmp_path, monkeypatch):
    from fastcell_bench import machine

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version) -> int:  # noqa: N802
            version._obj.value = 12090
            return 0

    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert machine.nvidia_driver() == "for CUDA 12.9"

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert machine.nvidia_driver() is None


def test_gpu_table_measures(monkeypatch, capsys):
    """On the emulated engine, whose times mean nothing."""
    from emulation_build import emulated
    from fastcell import cuda, engines
    from fastcell_bench import gpu

    monkeypatch.setitem(engines.ENGINES, "cpu", cuda)
    monkeypatch.setattr(cuda, "device_code", emulated())
    rows = gpu.table(
        [("GRU", 3, 2, 4, 8)], ["float32", "bfloat16"], ["inference", "training"],
        torch.device("cpu"), 2, 1e-4,
    )  # fmt: skip
    assert len(rows) == 4
    assert all(row["seconds"] > 0 and row["limit_seconds"] > 0 for row in rows)
    assert "of limit" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="not timed"):
        gpu.assert_alike([torch.ones(2)], [torch.zeros(2)], 1e-3, "a row")


def test_cells_and_controls(tmp_path, capsys):
    from fastcell_bench import cells, onnx_cells

    out = tmp_path / "cells.json"
    arguments = ["--shape", "5:2:4:6", "--blocks", "1", "--min-time", "0.001", "--json", str(out)]
    assert cells.main([*arguments, "--onnx"]) == 0
    rows = json.loads(out.read_text())["rows"]
    peers = {(r["base"], r["variant"]) for r in rows if "over onnxruntime" in r["inference"]}
    if onnx_cells.why_not(torch.nn.Linear(1, 1), {}) != onnx_cells.NOT_INSTALLED:
        of_lstm = ("peephole", "coupled", "peephole, coupled", "activations", "clip", "lengths=")
        assert peers == {*[("LSTM", name) for name in of_lstm], ("GRU", "reset before")}
    assert len(rows) == len(cells.VARIANTS)
    for row, variant in zip(rows, cells.VARIANTS, strict=True):
        for mode in ("inference", "training"):
            assert row[mode]["of plain"] > 0
            assert ("over loop" in row[mode]) == variant.loop
    assert "LSTM peephole, coupled 5:2:4:6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cells.main(["--shape", "5:2"])


def test_deep_stacks_with_and_without_a_wavefront(tmp_path, capsys):
    from fastcell_bench import variants

    out = tmp_path / "stacks.json"
    options = ["--mode", "stacks", "--threads", "2", "--blocks", "2", "--min-time", "0.001"]
    with threads(2):
        assert variants.main([*options, "--shape", "GRU:60:1:64:64", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["layers"] for row in found["stacks"]] == [4, 8]
    for row in found["stacks"]:
        assert row["chosen"] == "wavefront"
        assert min(row["wavefront"], row["without"], row["gain"]) > 0
    assert not found["inference"]
    assert not found["training"]
    assert "GRU:60:1:64:64" in capsys.readouterr().out


def test_trees_against_loops(tmp_path, capsys):
    from fastcell_bench import trees

    out = tmp_path / "trees.json"
    shapes = ["constituency:3:9:4:5", "dependency:2:7:4:5", "complete:1:7:3:4", "chain:1:5:3:4"]
    arguments = [word for shape in shapes for word in ("--shape", shape)]
    arguments += ["--blocks", "2", "--min-time", "0.001", "--json", str(out)]
    assert trees.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["inference"] * 4 + ["training"] * 4
    assert all(min(row["seconds"], row["batched"], row["recursion"]) > 0 for row in rows)
    assert "constituency:3:9:4:5" in capsys.readouterr().out
    for wrong in ("forest:1:2:3:4", "chain:1:2:3", "chain:1:2:3:x"):
        with pytest.raises(SystemExit):
            trees.main(["--shape", wrong])


def test_steps_against_torch(tmp_path, capsys):
    from fastcell_bench import steps

    out = tmp_path / "steps.json"
    options = ["--blocks", "1", "--min-time", "0.001", "--json", str(out)]
    cases = [arg for m in steps.MODULES for arg in ("--case", f"{m}:2:9")]
    assert steps.main([*options, *cases]) == 0
    rows = json.loads(out.read_text())
    assert len(rows) == len(steps.MODULES) * len(steps.MODES)
    assert all(row["us"] > 0 and row["ratio"] > 0 for row in rows)
    assert "differs" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        steps.main(["--case", "LSTMCell:2"])


def test_steps_that_differ_are_not_timed(capsys, monkeypatch):
    from fastcell_bench import steps

    monkeypatch.setattr(fastcell.GRUCell, "_step", lambda self, cell, x, h: (h[0] * 1.001,))
    with pytest.raises(RuntimeError, match="not.*used in the graph"):
        steps.main(["--case", "GRUCell:2:9"])
    monkeypatch.setattr(steps.Step, "training", lambda self: ())
    assert steps.main(["--case", "GRUCell:2:9"]) == 1
    assert "differs" in capsys.readouterr().out
