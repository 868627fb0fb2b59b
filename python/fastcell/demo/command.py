"""``fastcell demo``: from options to exit status."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import cast

import torch

from . import plot
from .checkpoint import load_checkpoint, save_checkpoint
from .errors import UserError
from .files import check_writable
from .model import CharacterModel, ModelConfig
from .progress import Progress
from .report import Report, heading, make_report, to_text
from .sample import sample
from .text import Corpus, default_text, encode, make_corpus, read_text, windows
from .train import (
    DivergedError,
    TrainConfig,
    Training,
    Windows,
    held_out_loss,
    make_training,
    train_side_by_side,
)

EMBEDDING = 64  # at most; a character needs no more
SAMPLING_ROUNDS = 3
DEFAULT_NAME = "the topics of Python's help"


def run(args: argparse.Namespace) -> int:
    """Do what the options of ``fastcell.demo.options`` say; returns the exit status.

    Raises:
        UserError: a file or an option is wrong.
    """
    with threads(args.threads):
        return train_and_sample(args) if args.sample_from is None else only_sample(args)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch, and so fastcell, use ``count`` threads inside."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def only_sample(args: argparse.Namespace) -> int:
    """Write text from a checkpoint."""
    model, vocabulary, prompt = load_checkpoint(args.sample_from)
    prompt = args.prompt or prompt
    text, seconds = sample(model, vocabulary, prompt, args.length, args.temperature, args.seed)
    if args.json:
        report = {
            "checkpoint": args.sample_from,
            "characters_per_second": args.length / seconds,
            "sample": {"prompt": prompt, "temperature": args.temperature, "text": text},
        }
        print(json.dumps(report, indent=2))
    else:
        print(prompt + text)
    return 0


def train_and_sample(args: argparse.Namespace) -> int:
    """Train both models, sample, report."""
    need("tqdm", "matplotlib")
    # Everything that can be wrong is looked at before minutes are spent.
    check_writable(args.out, "picture")
    if args.save is not None:
        check_writable(args.save, "checkpoint")
    text = default_text() if args.text is None else read_text(args.text)
    corpus = make_corpus(args.text or DEFAULT_NAME, text, args.batch, args.window)
    prompt = args.prompt or corpus.opening
    encode(prompt, corpus.vocabulary)

    model = ModelConfig(args.cell, min(EMBEDDING, args.hidden), args.hidden, args.layers)
    config = TrainConfig(args.steps, args.batch, args.window, args.learning_rate, args.seed)
    try:
        training = make_training(model, len(corpus.vocabulary), config)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise UserError(
            f"{args.layers} layer(s) of {args.hidden} hidden units cannot be made: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not args.json:
        print(heading(corpus, model, config), flush=True)
    try:
        with Progress(config.steps, shown=not args.quiet) as progress:
            train_side_by_side(
                training,
                windows(corpus.train, config.batch, config.window),
                held_out_windows(corpus, config),
                progress,
            )
    except DivergedError as error:
        print(f"fastcell demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted(args, corpus, training)
    if args.save is not None:
        save_checkpoint(args.save, training.fastcell.model, corpus.vocabulary, corpus.opening)

    report = make_report(corpus, model, config, training)
    report["quantized"] = quantized_losses(training, held_out_windows(corpus, config))
    add_sample(report, training, corpus.vocabulary, prompt, args)
    draw(args.out, report)
    report.update(picture=args.out, checkpoint=args.save)
    print(json.dumps(report, indent=2) if args.json else to_text(report))
    return 0 if report["agreement"]["ok"] else 1


def need(*packages: str) -> None:
    """Raise UserError if one of ``packages`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the demo needs {' and '.join(missing)}: python -m pip install {' '.join(missing)}"
        )


def held_out_windows(
    corpus: Corpus, config: TrainConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The whole held-out part, in fewer tracks than in training where it is short."""
    tracks = max(1, min(config.batch, (corpus.held_out.numel() - 1) // config.window))
    return windows(corpus.held_out, tracks, config.window, keep_last=True)


def interrupted(args: argparse.Namespace, corpus: Corpus, training: Training) -> int:
    """Say how far it came and keep what was learned, if it was to be kept."""
    done = len(training.fastcell.losses)
    sentence = f"fastcell demo: interrupted after {done} of {training.steps} steps"
    if args.save is not None and done:
        save_checkpoint(args.save, training.fastcell.model, corpus.vocabulary, corpus.opening)
        sentence += f"; the model so far is in {args.save}"
    print(sentence, file=sys.stderr)
    return 130


def quantized_losses(training: Training, pieces: Windows) -> Report:
    """The trained model's held-out loss with its recurrent weights stored small."""
    import fastcell

    exact = training.fastcell.held_out[-1]
    found = {}
    for dtype in (torch.bfloat16, torch.int8):
        small = cast(CharacterModel, fastcell.quantize(training.fastcell.model, dtype))
        loss = held_out_loss(small, pieces)
        name = str(dtype).removeprefix("torch.")
        found[name] = {"held_out_loss": loss, "relative_change": loss / exact - 1}
    return found


def add_sample(
    report: Report, training: Training, vocabulary: str, prompt: str, args: argparse.Namespace
) -> None:
    """Let both models write, in turn, and keep fastcell's text and the speed of both."""
    rates: dict[str, list[float]] = {"torch": [], "fastcell": []}
    texts = {}
    for _ in range(SAMPLING_ROUNDS):
        for key, contender in (("torch", training.torch), ("fastcell", training.fastcell)):
            texts[key], seconds = sample(
                contender.model, vocabulary, prompt, args.length, args.temperature, args.seed
            )
            rates[key].append(args.length / seconds)
    for key, values in rates.items():
        report[key]["sampling_characters_per_second"] = median(values)
    report["sampling_ratio"] = median(
        ours / theirs for theirs, ours in zip(rates["torch"], rates["fastcell"], strict=True)
    )
    report["sample"] = {
        "prompt": prompt,
        "temperature": args.temperature,
        "text": texts["fastcell"],
    }


def draw(path: str, report: Report) -> None:
    """The picture of a report."""
    theirs, ours = (
        plot.Curves(
            report[key]["name"],
            report[key]["losses"],
            report[key]["held_out_losses"],
            report[key]["characters_per_second"],
        )
        for key in ("torch", "fastcell")
    )
    config, ratio = report["config"], report["training_ratio"]
    same = "learns what" if report["agreement"]["ok"] else "does NOT learn what"
    threads_word = "thread" if config["threads"] == 1 else "threads"
    plot.draw(
        path,
        theirs,
        ours,
        report["measured_at"],
        f"{ours.name} {same} {theirs.name} learns, at {ratio:.2f} times the speed",
        f"{config['layers']} x {config['hidden']} {config['cell'].upper()} predicting characters "
        f"of {os.path.basename(report['text']['name'])}; batch {config['batch']}, "
        f"window {config['window']}, {config['threads']} CPU {threads_word}; "
        f"torch {report['versions']['torch']}, fastcell {report['versions']['fastcell']} "
        f"({report['versions']['isa']})",
    )
