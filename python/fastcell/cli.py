"""The command line: ``fastcell demo | bench | info``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
from collections.abc import Sequence

from . import __version__
from .demo.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``fastcell``; those of the process by default.

    Returns:
        the exit status: 0 all is well, 1 the command found something wrong, 2 a file or an option
        is wrong, 130 interrupted.

    Raises:
        SystemExit: from argparse, after ``--help`` (0) or a wrong option (2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write any character, whatever the terminal can show.
        sys.stdout.reconfigure(errors="replace")
    command = "fastcell"
    try:
        if words[:1] == ["bench"]:  # has options of its own, --help among them
            command += " bench"
            return bench(words[1:])
        args = make_parser().parse_args(words)
        command += f" {args.command}"
        status = demo(args) if args.command == "demo" else info(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but ``bench``'s own options."""
    from .demo.options import add_options

    parser = argparse.ArgumentParser(
        prog="fastcell",
        description="Fused RNN, LSTM and GRU layers for PyTorch: drop-in for torch.nn.",
        epilog="fastcell COMMAND --help tells more about each.",
    )
    parser.add_argument("--version", action="version", version=f"fastcell {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_options(
        commands.add_parser("demo", help="train a character language model beside torch.nn's")
    )
    commands.add_parser("bench", help="time every cell beside other libraries", add_help=False)
    report = commands.add_parser(
        "info",
        help="versions, instruction sets, threads",
        description="Print versions, the instruction sets in use and at hand, the OpenMP "
        "runtimes in the process, threads and caches.",
    )
    report.add_argument("--json", action="store_true", help="print JSON")
    return parser


def demo(args: argparse.Namespace) -> int:
    """``fastcell demo``."""
    from .demo.command import run

    return run(args)


def bench(words: list[str]) -> int:
    """``fastcell bench``: all further words belong to the benchmark's own command line."""
    if importlib.util.find_spec("fastcell_bench") is None:
        raise UserError(
            "the benchmark cannot be imported: the package fastcell_bench, the folder bench/ of "
            "fastcell's source, is not installed"
        )
    from fastcell_bench.cli import main as bench_main

    status: int = bench_main(words)
    return status


def info(args: argparse.Namespace) -> int:
    """``fastcell info``."""
    from .info import format_info
    from .info import info as collect

    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else format_info(facts))
    return 0
