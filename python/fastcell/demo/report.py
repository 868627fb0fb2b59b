"""What a run says in the end: one dictionary, and the same as text."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import torch

from ..info import info
from .agreement import ERRORS, SMOOTH, check_curves, nearest_to_failure
from .model import ModelConfig
from .text import Corpus
from .train import Contender, TrainConfig, Training

Report = dict[str, Any]  # written as JSON


def make_report(
    corpus: Corpus,
    model: ModelConfig,
    config: TrainConfig,
    training: Training,
) -> Report:
    """Everything measured, under names that the JSON keeps."""
    facts = info()
    theirs, ours = training.torch, training.fastcell
    their_rates, our_rates = training.rates(theirs), training.rates(ours)
    curves = check_curves(theirs.losses, ours.losses)
    worst = max(training.checks, key=nearest_to_failure)
    return {
        "text": {
            "name": corpus.name,
            "trained_characters": corpus.train.numel(),
            "held_out_characters": corpus.held_out.numel(),
            "vocabulary": len(corpus.vocabulary),
        },
        "config": {
            **asdict(model),
            **asdict(config),
            "parameters": sum(p.numel() for p in ours.model.parameters()),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "fastcell": facts["fastcell"],
            "torch": facts["torch"],
            "isa": facts["cpu"]["isa"],
        },
        "measured_at": training.measured_at,
        "torch": _of_contender(theirs, their_rates),
        "fastcell": _of_contender(ours, our_rates),
        # Neighbouring blocks see the same load of the machine, so the ratio is taken within pairs.
        "training_ratio": median(b / a for a, b in zip(their_rates, our_rates, strict=True)),
        "agreement": {
            "ok": curves.ok and worst.ok,
            "same_step": {**asdict(worst), "ok": worst.ok, "checks": len(training.checks)},
            "curves": {**asdict(curves), "ok": curves.ok},
        },
    }


def _of_contender(contender: Contender, rates: list[float]) -> Report:
    return {
        "name": contender.name,
        "losses": contender.losses,
        "final_loss": fmean(contender.losses[-SMOOTH:]),
        "held_out_losses": contender.held_out,
        "held_out_loss": contender.held_out[-1],
        "characters_per_second": median(rates),
        "block_characters_per_second": rates,
    }


def heading(corpus: Corpus, model: ModelConfig, config: TrainConfig) -> str:
    """What is about to be trained, on what."""
    return (
        f"model: {model.layers} x {model.hidden} {model.cell.upper()}, "
        f"CPU threads: {torch.get_num_threads()}\n"
        f"text: {corpus.name}, {corpus.train.numel():,} characters to train on, "
        f"{corpus.held_out.numel():,} held out, {len(corpus.vocabulary):,} different ones\n"
        f"training: {config.steps} steps of {config.batch} tracks x {config.window} characters, "
        "each model in turn, from the same weights"
    )


def _table(report: Report) -> list[str]:
    theirs, ours = report["torch"], report["fastcell"]
    rows = [
        ("", theirs["name"], ours["name"], ""),
        (
            f"training loss (last {min(SMOOTH, len(ours['losses']))} steps)",
            f"{theirs['final_loss']:.4f}",
            f"{ours['final_loss']:.4f}",
            "nats per character",
        ),
        (
            "held-out loss",
            f"{theirs['held_out_loss']:.4f}",
            f"{ours['held_out_loss']:.4f}",
            "nats per character",
        ),
        (
            "training, characters per second",
            f"{theirs['characters_per_second']:,.0f}",
            f"{ours['characters_per_second']:,.0f}",
            f"{report['training_ratio']:.2f} x",
        ),
    ]
    if "sampling_ratio" in report:
        rows.append(
            (
                "sampling, characters per second",
                f"{theirs['sampling_characters_per_second']:,.0f}",
                f"{ours['sampling_characters_per_second']:,.0f}",
                f"{report['sampling_ratio']:.2f} x",
            )
        )
    return [f"{a:<33}{b:>15}{c:>16}   {d}".rstrip() for a, b, c, d in rows]


def _agreement(report: Report) -> list[str]:
    step, curves = report["agreement"]["same_step"], report["agreement"]["curves"]
    return [
        f"same step   {'agrees' if step['ok'] else 'DIFFERS'}: loss and gradients from the same "
        f"weights, {step['checks']} times; farthest from float64, relatively: {step['worst']}, "
        f"torch {step['torch']:.1e}, fastcell {step['fastcell']:.1e} "
        f"(tolerance {step['tolerance']:.1e})",
        f"curves      {'agree' if curves['ok'] else 'DIFFER'}: means of {curves['smooth']} steps "
        f"are at most {curves['difference']:.1e} nats apart "
        f"(tolerance there, {ERRORS:g} standard errors: {curves['tolerance']:.1e})",
    ]


def to_text(report: Report) -> str:
    """The report for a person."""
    lines = [*_table(report), "", *_agreement(report)]
    if "quantized" in report:
        losses = [
            f"{found['held_out_loss']:.4f} ({name}, {found['relative_change']:+.3%})"
            for name, found in report["quantized"].items()
        ]
        lines.append(f"quantized   held-out loss with small weights: {', '.join(losses)}")
    sample = report["sample"]
    lines += [
        "",
        f"at temperature {sample['temperature']:g} the {report['fastcell']['name']} model goes on",
        f"{' from: ':-^80}",
        sample["prompt"],
        f"{' with: ':-^80}",
        sample["text"],
        "-" * 80,
    ]
    lines += [f"{what}: {report[what]}" for what in ("picture", "checkpoint") if report[what]]
    return "\n".join(lines)
