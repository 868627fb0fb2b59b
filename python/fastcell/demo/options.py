"""The options of ``fastcell demo``."""

from __future__ import annotations

import argparse
import math

from .model import CELLS

DESCRIPTION = """\
Train a character language model on real text twice at once, with torch.nn's layers and with
fastcell's, from the same weights and on the same batches; compare losses and speed; then let the
model write. By default that takes a minute or two on two cores.

Both train in this process, in blocks of steps that alternate, on the same threads. Speeds are
medians over the blocks, of whole training steps: embedding, layers, readout, gradients, Adam."""

EPILOG = """\
exit status: 0 all is well; 1 the two libraries disagree, or the loss is no longer finite;
2 a file or an option is wrong; 130 interrupted"""


def positive(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def seed(text: str) -> int:
    """An integer that torch takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value


def temperature(text: str) -> float:
    """A finite number from 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError("must be finite and 0 or more")
    return value


def rate(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError("must be finite and above 0")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` everything that ``fastcell.demo.command.run`` reads."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--cell", choices=list(CELLS), default="lstm", help="default: %(default)s")
    add("--hidden", type=positive, default=256, metavar="N", help="units (default: %(default)s)")
    add("--layers", type=positive, default=2, metavar="N", help="default: %(default)s")

    add = parser.add_argument_group("training").add_argument
    add("--text", metavar="FILE", help="UTF-8 text (default: the topics of Python's own help)")
    add(
        "--steps",
        type=positive,
        default=800,
        metavar="N",
        help="training steps of each model (default: %(default)s)",
    )
    add(
        "--batch",
        type=positive,
        default=16,
        metavar="N",
        help="parallel tracks of text (default: %(default)s)",
    )
    add(
        "--window",
        type=positive,
        default=64,
        metavar="N",
        help="characters between updates; the state is carried on from one window to the next, "
        "gradients are not (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=rate,
        default=0.004,
        metavar="R",
        help="Adam's highest (default: %(default)s)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of weights and samples (default: 0)")
    add("--threads", type=positive, metavar="N", help="for both libraries (default: torch's)")

    add = parser.add_argument_group("sampling").add_argument
    add(
        "--temperature",
        type=temperature,
        default=0.7,
        metavar="X",
        help="below 1 is safer, above 1 wilder, 0 always takes the likeliest (default: 0.7)",
    )
    add(
        "--length",
        type=positive,
        default=500,
        metavar="N",
        help="characters to write (default: %(default)s)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="what to go on from (default: the first held-out characters)",
    )

    files = parser.add_argument_group("files and output")
    add = files.add_argument
    add(
        "--out",
        metavar="PNG",
        default="fastcell-demo.png",
        help="picture of the curves (default: %(default)s)",
    )
    either = files.add_mutually_exclusive_group()
    either.add_argument("--save", metavar="FILE", help="write the model that fastcell trained")
    either.add_argument(
        "--sample-from",
        metavar="FILE",
        help="train nothing: write text with a model that --save wrote",
    )
    add("--json", action="store_true", help="print results as JSON")
    add("--quiet", action="store_true", help="no progress bar")
