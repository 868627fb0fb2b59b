"""The command line but for the demo: versions, help, info, the hand-over to the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import fastcell
from fastcell.cli import main
from support import python


def run(*words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fastcell", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        **kwargs,
    )


def test_version_in_a_process_of_its_own():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fastcell {fastcell.__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], ["demo", "bench", "info", "--version"]),
        (["demo", "--help"], ["--temperature", "--sample-from", "--cell", "--json", "exit status"]),
        (["info", "--help"], ["--json"]),
    ],
)
def test_help_names_what_there_is(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert [word for word in expected if word not in out] == []


@pytest.mark.parametrize("words", [[], ["dmeo"], ["info", "--jsno"], ["demo", "--steps", "many"]])
def test_a_wrong_word_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: fastcell" in capsys.readouterr().err


def test_info_as_json_is_the_dictionary_of_the_library(capsys):
    assert main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == fastcell.info()
    assert printed["fastcell"] == fastcell.__version__
    assert printed["torch"] == torch.__version__
    assert printed["numpy"] == numpy.__version__
    assert printed["python"] == ".".join(map(str, sys.version_info[:3]))
    assert printed["cpu"]["isa"] in printed["cpu"]["isas"]
    assert "baseline" in printed["cpu"]["isas"]
    assert printed["cpu"]["threads"] == torch.get_num_threads()
    assert printed["cuda"].keys() == {"architectures", "kernels", "runtime"}


def test_info_follows_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert fastcell.info()["cpu"]["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_info_finds_one_openmp_runtime_and_it_is_mapped():
    # In a process of its own: other packages, such as scikit-learn, bring a runtime of theirs.
    done = python(
        "import json, fastcell\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(json.dumps([fastcell.info()['openmp'], maps]))"
    )
    runtimes, maps = json.loads(done.stdout)
    assert len(runtimes) == 1
    assert Path(runtimes[0]).is_file()
    assert runtimes[0] in maps


def test_openmp_runtimes_are_read_from_the_map(tmp_path):
    # By its module: the package's name `info` is the function.
    module = sys.modules["fastcell.info"]
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 42                 /a b/libgomp.so.1\n"
        "7f01-7f02 rw-p 00001000 08:01 42                 /a b/libgomp.so.1\n"
        "7f02-7f03 r-xp 00000000 08:01 43                 /opt/libiomp5.so\n"
        "7f03-7f04 rw-p 00000000 00:00 0 \n"
        "7f04-7f05 r-xp 00000000 08:01 44                 /libgomp/other.so\n"
    )
    assert module.openmp_runtimes(str(maps)) == ["/a b/libgomp.so.1", "/opt/libiomp5.so"]
    assert module.openmp_runtimes(str(tmp_path / "none")) is None


def test_caches_are_read_from_the_system_folder(tmp_path):
    module = sys.modules["fastcell.info"]
    described = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M")]
    for number, values in enumerate(described):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert module.caches(str(tmp_path)) == {"L1d": 48 * 1024, "L2": 2 * 1024 * 1024}
    assert module.caches(str(tmp_path / "none")) is None


def test_info_for_people_shows_the_same_values(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    facts = fastcell.info()
    for value in (facts["fastcell"], facts["torch"], facts["cpu"]["isa"], *facts["cpu"]["isas"]):
        assert value in out


def test_bench_hands_its_words_over(tmp_path, monkeypatch):
    package = tmp_path / "fastcell_bench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "calls = []\ndef main(argv):\n    calls.append(argv)\n    return 7"
    )
    for name in [n for n in sys.modules if n.split(".")[0] == "fastcell_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert main(["bench", "--help", "--json", "-x", "demo"]) == 7
        assert sys.modules["fastcell_bench.cli"].calls == [["--help", "--json", "-x", "demo"]]
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "fastcell_bench"]:
            del sys.modules[name]


def test_bench_that_is_not_installed_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastcell_bench", None)
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcell bench: ")
    assert error.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcell", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1
    process.stderr.close()
