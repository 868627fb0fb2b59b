"""README and docs against the project: code runs, commands exist, links and paths lead on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcell.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/**/*.md")])
COMMANDS_OF_OTHERS = ("pip", "pytest", "pre-commit")


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page's fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --- Python ---------------------------------------------------------------------------------------


def run(sources: list[str]) -> dict[str, Any]:
    """The blocks one after the other in one namespace, as a reader would type them."""
    names: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, "README.md", "exec"), names)
    return names


def test_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The whole graph is captured, but the C++ compiler is not waited for.
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    sources = blocks(ROOT / "README.md", "python")
    assert len(sources) >= 5
    names = run(sources)
    assert type(names["layer"]).__module__.startswith("fastcell")


def test_wrong_python_is_noticed():
    with pytest.raises(AssertionError):
        run(["x = 1\n", "assert x == 2\n"])


# --- commands -------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Every command of a page: the lines of its shell blocks, and what the prose names of ours."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    found = [line.partition(" #")[0].strip() for line in lines]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found += re.findall(r"`((?:make|fastcell) [^`]+)`", prose)
    return [command for command in found if command]


def problem(command: str) -> str:
    """What is wrong with a command, or nothing."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[0] == "make":
        return make_problem(words[1:])
    if words[0] == "fastcell":
        return cli_problem(words[1:])
    if words[:2] == ["python", "-m"] and words[2].startswith("fastcell_bench."):
        return module_problem(words[2], words[3:])
    if words[:2] == ["pip", "install"]:
        return pip_problem(words[2:])
    return "" if words[0] in COMMANDS_OF_OTHERS else f"{words[0]} is not known here"


def make_problem(words: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE)
    wrong = [word for word in words if "=" not in word and word not in targets]
    return f"no target {', '.join(wrong)}" if wrong else ""


def cli_problem(words: list[str]) -> str:
    """Whether the command's own help has every option that is named."""
    try:
        text = help_of(words[0])
    except LookupError as error:
        return str(error)
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    missing = [o for o in options if not re.search(rf"{re.escape(o)}\b", text)]
    return f"no option {', '.join(missing)}" if missing else ""


def module_problem(name: str, words: list[str]) -> str:
    """Whether the module is there and its parser takes the options."""
    try:
        importlib.import_module(name).parser().parse_args(words)
    except (ImportError, SystemExit) as error:
        return f"{name}: {error}"
    return ""


@functools.cache
def help_of(command: str) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([command, "--help"])
        except SystemExit as stop:
            status = int(stop.code or 0)
    if status != 0:
        raise LookupError(f"fastcell {command} --help says {err.getvalue()}")
    return out.getvalue()


def pip_problem(words: list[str]) -> str:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            for name in extra.split(","):
                if not re.search(rf"^{name} = \[", project, re.MULTILINE):
                    return f"no extra {name}"
        if word.endswith(".txt") and not (ROOT / word).is_file():
            return f"no file {word}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    wrong = {command: why for command in commands(page) if (why := problem(command))}
    assert not wrong


def test_the_readme_has_commands():
    found = commands(ROOT / "README.md")
    for command in ("make demo", "make test", "fastcell demo", "fastcell bench", "fastcell info"):
        assert command in found


@pytest.mark.parametrize(
    "command",
    [
        "make dema",
        "fastcell bensh",
        "fastcell demo --txet FILE",
        "fastcell bench --jsn FILE",
        "pip install .[tset]",
        "pip install -c constrains.txt .",
        "cargo build",
    ],
)
def test_a_wrong_command_is_noticed(command):
    assert problem(command)


# --- links and paths ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def dead_ends(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere, and paths it names that do not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            found.append(target)
    roots = ("csrc/", "python/", "bench/", "tests/", "docs/")
    for path in re.findall(r"`([\w./-]+)`", text):
        if path.startswith(roots) and not (ROOT / path).exists():
            found.append(path)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    assert not dead_ends(page, page.read_text(encoding="utf-8"))


def test_a_dead_end_is_noticed():
    text = "[a](docs/nowhere.md) [b](docs/index.md#nothing) `csrc/cpu/none.h` [c](docs/index.md)"
    expected = ["docs/nowhere.md", "docs/index.md#nothing", "csrc/cpu/none.h"]
    assert dead_ends(ROOT / "README.md", text) == expected
