"""The benchmark: counts, statistics, comparison before times, failures, output, a real run."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcell_bench import cli, limits, record
from fastcell_bench.cases import (
    QUICK,
    TABLE,
    TRAINING,
    Case,
    parse_rows,
    parse_shape,
)
from fastcell_bench.contenders import OURS, REGISTRY, Entry
from fastcell_bench.judge import judge, tolerance
from fastcell_bench.problem import make_problem, pack
from fastcell_bench.processes import WorkerError, WorkerProcess
from fastcell_bench.ratios import geometric_mean, median, paired_ratio, spread, summarize

FAST = ["--threads", "1", "--blocks", "2", "--min-time", "0.001", "--timeout", "20"]


def fake(name: str, kind: str = "Honest") -> Entry:
    return Entry(name, f"bench_contenders:{kind}", ())


JUDGE = fake("judge")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line with contenders of bench_contenders.py, given as name=Class."""

    def call(*argv: str, ours: str = "Honest", **peers: str) -> tuple[int, str, str]:
        registry = {OURS: fake(OURS, ours)}
        registry.update({name: fake(name, kind) for name, kind in peers.items()})
        status = cli.main([*FAST, *argv], registry, JUDGE)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_flops_follow_the_equation(cell: str, gates: int) -> None:
    case = Case(cell, 100, 64, 512, 256)
    forward = 2 * 100 * 64 * gates * 256 * (512 + 256)
    assert case.flops == forward
    assert Case(cell, 100, 64, 512, 256, mode=TRAINING).flops == 3 * forward


def test_flops_of_stacks_directions_and_lengths() -> None:
    one = 2 * 4 * 7
    assert Case("LSTM", 5, 1, 3, 7, layers=2).flops == 5 * one * ((3 + 7) + (7 + 7))
    both = Case("LSTM", 5, 1, 3, 7, layers=2, bidirectional=True)
    assert both.flops == 5 * one * 2 * ((3 + 7) + (14 + 7))
    ragged = Case("LSTM", 8, 3, 3, 7, ragged=True)
    assert ragged.lengths == [8, 5, 2]
    assert ragged.flops == 15 * one * (3 + 7)


def test_weight_traffic_reads_the_recurrent_weights_every_step() -> None:
    case = Case("GRU", 10, 1, 5, 8)
    assert case.recurrent_bytes == 3 * 8 * 8 * 4
    assert case.weight_traffic == 3 * 8 * 5 * 4 + 10 * case.recurrent_bytes
    assert Case("GRU", 10, 1, 5, 8, mode=TRAINING).weight_traffic == 2 * case.weight_traffic
    assert Case("GRU", 10, 1, 5, 8, dtype="float64").weight_traffic == 2 * case.weight_traffic


def test_limit_is_the_larger_of_computing_and_reading() -> None:
    small, large = Case("LSTM", 100, 1, 128, 128), Case("LSTM", 100, 64, 512, 512)
    reading = limits.limit_of(small, fma=200e9, bandwidth=100e9, level="L2")
    assert reading.kind == "L2"
    assert reading.seconds == pytest.approx(small.weight_traffic / 100e9)
    computing = limits.limit_of(large, fma=200e9, bandwidth=100e9, level="L2")
    assert computing.kind == limits.FMA
    assert computing.seconds == pytest.approx(large.flops / 200e9)
    double = limits.limit_of(Case("LSTM", 100, 64, 512, 512, dtype="float64"), 200e9, 1e15, "L2")
    assert double.seconds == pytest.approx(2 * computing.seconds)


def test_cache_levels_are_read_from_the_system(tmp_path: Path) -> None:
    for index, values in enumerate(
        [("1", "Data", "48K", "0"), ("1", "Instruction", "64K", "0"), ("3", "Unified", "8M", "0-3")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        names = ("level", "type", "size", "shared_cpu_list")
        for name, value in zip(names, values, strict=True):
            (folder / name).write_text(value + "\n")
    levels = limits.cache_levels(2, str(tmp_path))
    assert [(level.name, level.share) for level in levels] == [("L1", 48 << 10), ("L3", 4 << 20)]
    assert limits.level_holding(40 << 10, levels) == "L1"
    assert limits.level_holding(1 << 20, levels) == "L3"
    assert limits.level_holding(1 << 30, levels) == "memory"
    sizes = limits.probe_sizes(2, levels)
    assert (48 << 10) < sizes["L3"] <= (4 << 20)
    assert 2 * sizes["memory"] > 8 << 20
    assert limits.cache_levels(2, str(tmp_path / "none")) == []
    with pytest.raises(ValueError, match="not a size"):
        limits.parse_size("lots")


# --- statistics -----------------------------------------------------------------------------------


def test_medians_and_ratios() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no values"):
        median([])
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([1.0, 0.0])


def test_paired_ratio_survives_a_machine_that_slows_down() -> None:
    ours = [1.0, 1.0, 4.0, 4.0, 4.0]
    assert paired_ratio([2 * seconds for seconds in ours], ours) == pytest.approx(2.0)
    assert paired_ratio([2.0, 2.0], ours) == pytest.approx(2.0)


def test_summary_names_the_worst_row() -> None:
    summary = summarize("torch", "inference", {"a": 4.0, "b": 0.5, "c": 4.0})
    assert summary is not None
    assert (summary.worst, summary.worst_row, summary.faster_rows) == (0.5, "b", 2)
    assert summary.geometric_mean == pytest.approx(2.0)
    assert summarize("torch", "inference", {}) is None


# --- problems and the judge -----------------------------------------------------------------------


def test_a_problem_is_the_same_in_every_dtype_and_zero_past_the_end() -> None:
    single = make_problem(Case("GRU", 6, 3, 2, 5, bidirectional=True, ragged=True))
    double = make_problem(Case("GRU", 6, 3, 2, 5, dtype="float64", bidirectional=True, ragged=True))
    assert np.array_equal(single.input, double.input)
    assert all(
        np.array_equal(single.weights[name], double.weights[name]) for name in double.weights
    )
    assert len(single.weights) == 8
    assert not single.input[single.lengths[2] :, 2].any()
    assert pack(single.input, single.lengths).shape == (single.lengths.sum(), 2)
    assert np.abs(single.weights["weight_hh_l0"]).max() <= 1 / math.sqrt(5)


def test_the_judge_refuses() -> None:
    case = Case("LSTM", 10, 2, 8, 8)
    truth = {"output": np.linspace(-1, 1, 20).reshape(10, 2)}
    right = {"output": truth["output"].astype(np.float32)}
    assert judge(case, right, truth).equal

    slightly = {"output": right["output"] * np.float32(1 + 2 * tolerance(case))}
    assert "off by" in judge(case, slightly, truth).sentence
    assert "gave no output" in judge(case, {}, truth).sentence
    assert "shape" in judge(case, {"output": right["output"].T}, truth).sentence
    assert "float64" in judge(case, truth, truth).sentence
    poisoned = {"output": np.full((10, 2), np.nan, np.float32)}
    assert "finite" in judge(case, poisoned, truth).sentence
    for found in (slightly, {}, poisoned, truth):
        assert not judge(case, found, truth).equal


def test_tolerance_grows_with_the_chain_of_additions() -> None:
    short, long = Case("LSTM", 1, 1, 8, 8), Case("LSTM", 100, 1, 8, 8)
    assert tolerance(short) == 4 * 4 * np.finfo(np.float32).eps
    assert tolerance(short) < tolerance(long) < 1e-5
    assert tolerance(Case("LSTM", 1, 1, 8, 8, dtype="float64")) < 1e-14


# --- comparison before times, failures ------------------------------------------------------------


def test_a_wrong_peer_gets_no_time(run: Run) -> None:
    argv = ["--shape", "LSTM:3:2:4:5", "--mode", "inference"]
    status, out, _ = run(*argv, good="Honest", bad="Wrong")
    assert status == cli.FAILED_COMPARISON
    assert "differs" in out
    assert "bad: output is off by" in out
    assert "against good: geometric mean" in out
    assert "against bad" not in out
    assert "A comparison failed" in out


def test_a_wrong_gradient_fails_training_alone(run: Run) -> None:
    status, out, _ = run("--shape", "LSTM:3:2:4:5", good="Honest", bad="WrongGradient")
    assert status == cli.FAILED_COMPARISON
    assert "inference, against bad" in out
    assert "training, against bad" not in out
    assert "bad: grad_input is off by" in out


def test_fastcell_wrong_means_a_row_without_times(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    argv = ["--shape", "LSTM:3:2:4:5", "--mode", "inference", "--json", str(path)]
    status, out, _ = run(*argv, ours="Wrong", good="Honest")
    assert status == cli.FAILED_COMPARISON
    assert "fastcell is wrong: output is off by" in out
    row = json.loads(path.read_text())["rows"][0]
    assert row["failure"].startswith("fastcell is wrong")
    assert all(outcome["seconds"] is None for outcome in row["contenders"].values())
    assert all(outcome["blocks"] == [] for outcome in row["contenders"].values())


def test_a_crash_or_an_exception_is_one_sentence_and_the_run_goes_on(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    status, out, _ = run(
        *["--shape", "LSTM:3:2:9:5", "--shape", "GRU:3:2:4:5", "--mode", "inference"],
        *["--json", str(path)],
        good="Honest",
        crash="CrashesOnce",
        late="CrashesWhenTimed",
        raises="Raises",
        absent="Absent",
        picky="Picky",
    )
    assert status == 0, "a peer's failure is no failed comparison"
    assert "crash: was killed by SIGKILL" in out
    assert "late: ended with status 3: the library says why" in out
    assert "raises: RuntimeError: out of luck" in out
    assert "absent: did not start: ImportError: no such library" in out
    first, second = json.loads(path.read_text())["rows"]
    assert first["contenders"]["good"]["status"] == "ok"
    assert first["contenders"]["crash"]["status"] == "failed"
    assert first["contenders"]["picky"]["status"] == "unsupported"
    assert second["contenders"]["crash"]["status"] == "ok", "it has a new process for the next row"
    assert second["contenders"]["late"]["ratio"] is None


def test_a_silent_contender_is_given_up(run: Run) -> None:
    argv = ["--shape", "LSTM:3:2:4:5", "--mode", "inference", "--timeout", "2"]
    status, out, _ = run(*argv, good="Honest", hangs="Hangs")
    assert status == 0
    assert "hangs: gave no answer within 2 s" in out


def test_fastcell_that_cannot_run_is_a_failure(run: Run) -> None:
    argv = ["--shape", "LSTM:3:2:4:5", "--mode", "inference"]
    status, out, _ = run(*argv, ours="Raises", good="Honest")
    assert status == cli.FAILED_COMPARISON
    assert "fastcell RuntimeError: out of luck" in out
    status, _, err = run(*argv, ours="Absent", good="Honest")
    assert status == cli.FAILED_COMPARISON
    assert "fastcell did not start: ImportError" in err


def test_a_slow_contender_runs_fewer_blocks_and_says_so(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    argv = ["--shape", "LSTM:3:2:4:5", "--mode", "inference", "--budget", "0.04"]
    status, out, _ = run(*argv, "--json", str(path), slow="Slow")
    assert status == 0
    assert "* fewer blocks than the others" in out
    slow = json.loads(path.read_text())["rows"][0]["contenders"]["slow"]
    assert slow["shortened"]
    assert len(slow["blocks"]) == 1
    assert slow["seconds"] >= 0.03


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_is_stopped_between_requests_and_gone_after() -> None:
    worker = WorkerProcess(fake("honest"), 1)
    stat = Path(f"/proc/{worker.pid}/stat")

    def state() -> str:
        return stat.read_text().rpartition(")")[2].split()[0]

    try:
        worker.wait_until_ready(30)
        for _ in range(2):
            deadline = time.monotonic() + 5
            while state() != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state() == "T"
            with pytest.raises(WorkerError, match="block before prepare"):
                worker.ask({"do": "block", "seconds": 0.01, "warm": 0.0}, 10)
    finally:
        worker.close()
    assert not stat.exists()


# --- output ---------------------------------------------------------------------------------------


def test_json_says_everything(run: Run, tmp_path: Path) -> None:
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    argv = ["--shape", "RNN:3:2:4:5", "--json", str(path), "--plot", str(picture)]
    status, _, err = run(*argv, good="Honest")
    assert status == 0, err
    found = json.loads(path.read_text())
    assert found["schema"] == record.SCHEMA
    assert found["complete"] is True
    assert found["command"][:3] == ["fastcell", "bench", "--threads"]
    assert found["versions"] == {"fastcell": "1.0", "good": "1.0", "judge": "1.0"}
    assert found["machine"]["usable_cores"] >= 1
    assert found["settings"]["threads"] == 1
    assert [row["mode"] for row in found["rows"]] == ["inference", "training"]
    row = found["rows"][0]
    assert (row["cell"], row["T"], row["B"], row["I"], row["H"]) == ("RNN", 3, 2, 4, 5)
    assert row["flops"] == Case("RNN", 3, 2, 4, 5).flops
    good = row["contenders"]["good"]
    assert good["status"] == "ok"
    assert len(good["blocks"]) == 2
    assert good["seconds"] == pytest.approx(median(good["blocks"]))
    assert good["error"] <= good["tolerance"]
    assert good["algorithm"] == "arithmetic"
    assert {entry["mode"] for entry in found["summary"]} == {"inference", "training"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5000


def test_json_on_stdout_leaves_the_table_on_stderr(run: Run) -> None:
    status, out, err = run("--shape", "RNN:3:2:4:5", "--json", "-", good="Honest")
    assert status == 0
    assert json.loads(out)["rows"][0]["cell"] == "RNN"
    assert "geometric mean" in err


# --- the command line -----------------------------------------------------------------------------


def test_shapes_and_rows_are_parsed() -> None:
    assert parse_shape("gru:50:3:40:129") == ("GRU", 50, 3, 40, 129)
    assert parse_rows("1,3-4", 21) == [0, 2, 3]
    assert len(TABLE) == 21
    assert set(QUICK) <= set(TABLE)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--shape", "LSTM:1:2:3"], "is not CELL:T:B:I:H"),
        (["--shape", "LSTM:1:2:3:x"], "must be whole numbers"),
        (["--shape", "LSTM:0:2:3:4"], "T is 0"),
        (["--shape", "LSTM:1:-2:3:4"], "B is -2"),
        (["--shape", "QRNN:1:2:3:4"], "unknown cell 'QRNN'"),
        (["--rows", "0"], "the table has rows 1 to 21"),
        (["--rows", "20-22"], "the table has rows 1 to 21"),
        (["--rows", "a"], "is not a list"),
        (["--rows", "1", "--cell", "rnn"], "no row of the table is left"),
        (["--shape", "LSTM:1:1:1:1", "--cell", "lstm"], "--shape replaces the table"),
        (["--cell", "qrnn"], "invalid choice"),
        (["--mode", "sleep"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--threads", "0"], "is not a whole number"),
        (["--blocks", "two"], "is not a whole number"),
        (["--min-time", "nan"], "is not a positive number"),
        (["--peers", "tensorrt"], "no peer is called 'tensorrt'"),
        (["--peers", ","], "names no peer"),
        (["--plot", "run.svg"], "must end in .png"),
        (["--json", "/no/such/folder/run.json"], "there is no folder"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_options_get_one_sentence_and_status_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == cli.BAD_USAGE
    said = capsys.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_peer_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    registry = {OURS: REGISTRY[OURS], "jax": Entry("jax", "nowhere:Jax", ("no_such_module",))}
    assert cli.main(["--peers", "jax"], registry) == cli.BAD_USAGE
    assert "jax is not installed (needs no_such_module)" in capsys.readouterr().err


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "--bidirectional" in capsys.readouterr().out
    assert cli.main(["--list"]) == 0
    assert " 21  RNN:100:64:512:512" in capsys.readouterr().out


# --- the real thing -------------------------------------------------------------------------------


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_a_real_run(tmp_path: Path) -> None:
    """fastcell and its peers agree, and torch.nn with the sign of one weight changed does not."""
    flipped = {**REGISTRY, "flipped": Entry("flipped", "bench_flipped:FlippedTorch", ("torch",))}
    path = tmp_path / "run.json"
    argv = ["--shape", "LSTM:5:3:6:9", "--shape", "GRU:1:1:4:8", "--shape", "RNN:7:2:3:5"]
    argv += ["--peers", "torch,flipped", "--json", str(path), *FAST]
    assert cli.main(argv, flipped) == cli.FAILED_COMPARISON
    rows = _rows(path)
    assert len(rows) == 6
    for row in rows:
        assert row["failure"] is None
        for name in ("fastcell", "torch"):
            assert row["contenders"][name]["status"] == "ok", row
            assert row["contenders"][name]["seconds"] > 0
        assert row["contenders"]["flipped"]["status"] == "differs"
        assert row["contenders"]["flipped"]["seconds"] is None


def test_a_real_run_of_odd_stacks(tmp_path: Path) -> None:
    """Two layers, both directions, ragged: every installed peer agrees on what that means."""
    path = tmp_path / "run.json"
    argv = ["--layers", "2", "--bidirectional", "--ragged"]
    for cell in ("LSTM", "GRU", "RNN", "RNN_RELU"):
        argv += ["--shape", f"{cell}:6:3:5:7"]
    assert cli.main([*argv, "--json", str(path), *PATIENT]) == 0
    for row in _rows(path):
        expected = {"ok"} if row["mode"] == "inference" else {"ok", "unsupported"}
        assert {outcome["status"] for outcome in row["contenders"].values()} <= expected, row
        assert row["contenders"]["torch"]["ratio"] > 0


def _if_installed(name: str) -> Any:
    missing = [module for module in REGISTRY[name].requires if not importlib.util.find_spec(module)]
    reason = f"{name} needs {', '.join(missing)}"
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=reason))


COMPILED = [_if_installed("keras"), _if_installed("jax")]
# A peer that compiles may take long over a case before it answers, and while others compute longer.
PATIENT = [*FAST, "--timeout", "120"]


@pytest.mark.parametrize("peer", COMPILED)
def test_a_compiled_peer_trains_what_it_infers(peer: str, tmp_path: Path) -> None:
    """Gates, biases, directions and layers are where torch has them, to the last bits of float64;
    test_a_real_run_of_odd_stacks has float32 and samples of different lengths."""
    path = tmp_path / "run.json"
    argv = ["--peers", peer, "--dtype", "float64", "--layers", "2", "--bidirectional"]
    for cell in ("LSTM", "GRU", "RNN", "RNN_RELU"):
        argv += ["--shape", f"{cell}:4:3:5:7"]
    assert cli.main([*argv, "--json", str(path), *PATIENT]) == 0
    rows = _rows(path)
    assert [row["mode"] for row in rows] == 4 * ["inference"] + 4 * ["training"]
    for row in rows:
        assert row["contenders"][peer]["status"] == "ok", row
        assert row["contenders"][peer]["seconds"] > 0


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs /proc")
@pytest.mark.parametrize("peer", COMPILED)
def test_a_compiled_peer_keeps_to_its_threads(peer: str, tmp_path: Path) -> None:
    """Of its threads one at a time runs or waits for a core, whatever else the machine does."""
    worker = WorkerProcess(REGISTRY[peer], 1)

    def thread_seconds() -> float:
        """Running and waiting for a core, all threads together."""
        states = Path(f"/proc/{worker.pid}/task").glob("*/schedstat")
        return 1e-9 * sum(sum(map(int, state.read_text().split()[:2])) for state in states)

    try:
        worker.wait_until_ready(120)
        case = Case("LSTM", 20, 64, 256, 256)
        results = str(tmp_path / "results.npz")
        answer = worker.ask({"do": "prepare", "case": case.to_json(), "results": results}, 120)
        assert answer["threads"] == 1
        before, start = thread_seconds(), time.monotonic()
        worker.ask({"do": "block", "seconds": 0.5, "warm": 0.0}, 120)
        elapsed = time.monotonic() - start
        # Between what one thread and what two would take.
        assert thread_seconds() - before < 1.5 * elapsed
    finally:
        worker.close()
