"""The progress bar of a training run."""

from __future__ import annotations

import sys
from statistics import median
from types import TracebackType
from typing import Any

from .train import Contender, Training

RECENT = 10  # steps in the losses shown
FORMAT = "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {postfix}"


class Progress:
    """One bar for both models on standard error; nothing on it is inside a timed step."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        from tqdm import tqdm

        # In a log file redrawings stay: there, one in ten seconds is enough.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self.bar: Any = tqdm(
            total=2 * steps,
            bar_format=FORMAT,
            mininterval=interval,
            disable=not shown,
            file=sys.stderr,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def __call__(self, training: Training) -> None:
        """One step more of either model."""
        theirs, ours = training.torch, training.fastcell
        text = f"loss {theirs.name} {_recent(theirs)}, {ours.name} {_recent(ours)}"
        pairs = list(zip(training.rates(theirs), training.rates(ours), strict=False))
        if pairs:
            text += f", {median(b / a for a, b in pairs):.2f} x"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()


def _recent(contender: Contender) -> str:
    losses = contender.losses[-RECENT:]
    return f"{sum(losses) / len(losses):.3f}" if losses else "-"
