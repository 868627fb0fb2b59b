"""Training two models side by side: the same weights, the same batches, alternating blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from .agreement import StepCheck, check_step
from .model import CharacterModel, Library, ModelConfig, State, detach, layer_name

CLIP = 1.0  # largest gradient norm
WARM_UP = 0.05  # fraction of the steps in which the learning rate rises
FLOOR = 0.05  # the learning rate at the end, as a fraction of the highest one
BLOCKS = 20  # timed blocks of each model, at least,
LONGEST_BLOCK = 40  # of at most so many steps
MEASUREMENTS = 5  # of held-out loss and agreement, and one more at the beginning

Windows = Sequence[tuple[Tensor, Tensor]]


class DivergedError(Exception):
    """A loss that is not finite; its text is a sentence."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and from which seed."""

    steps: int
    batch: int
    window: int
    learning_rate: float
    seed: int


def learning_rate_factor(step: int, steps: int) -> float:
    """A short linear rise, then half a cosine down to ``FLOOR``; 1 is the highest rate."""
    rise = max(1.0, WARM_UP * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, steps - rise)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Contender:
    """One of the two models with its optimizer, its carried state and what was measured of it."""

    name: str
    model: CharacterModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    state: State | None = None
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)

    def step(self, ids: Tensor, targets: Tensor, *, fresh: bool) -> float:
        """One step of truncated BPTT; returns the seconds that it took.

        Args:
            ids, targets: one window, shape ``(T, B)``.
            fresh: the window is the first of its tracks, and so there is no state to carry.
        """
        began = perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss, state = self.model.loss(ids, targets, None if fresh else self.state)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.state = detach(state)
        value = loss.item()
        seconds = perf_counter() - began
        self.losses.append(value)
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss of {self.name} is {value} at step {len(self.losses)}: "
                "a lower --learning-rate may help"
            )
        return seconds


def make_contender(
    library: Library, model: ModelConfig, vocabulary_size: int, config: TrainConfig
) -> Contender:
    """A fresh model whose weights come from ``config.seed``, and its optimizer."""
    torch.manual_seed(config.seed)
    network = CharacterModel(library, model, vocabulary_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.steps)
    )
    return Contender(layer_name(library, model.cell), network, optimizer, schedule)


def held_out_loss(model: CharacterModel, pieces: Windows) -> float:
    """Mean loss in nats per character over all windows, the state carried through them."""
    total, count = 0.0, 0
    state: State | None = None
    model.eval()
    with torch.inference_mode():
        for ids, targets in pieces:
            loss, state = model.loss(ids, targets, state)
            total += loss.item() * ids.numel()
            count += ids.numel()
    model.train()
    return total / count


@dataclass
class Training:
    """What a training run left behind.

    Attributes:
        torch, fastcell: the two contenders.
        steps: how many are to be done.
        block_steps: steps of each timed block; the last may be shorter and is then not timed.
        characters_per_step: batch times window.
        measured_at: steps after which held-out loss and ``checks`` were taken; begins with 0.
        checks: both libraries against float64 at ``measured_at``.
    """

    torch: Contender
    fastcell: Contender
    steps: int
    block_steps: int
    characters_per_step: int
    measured_at: list[int] = field(default_factory=list)
    checks: list[StepCheck] = field(default_factory=list)

    def rates(self, contender: Contender) -> list[float]:
        """Characters per second in each timed block, the first left out where there are more.

        The first block finds cold caches and a memory allocator that has yet to grow.
        """
        characters = self.block_steps * self.characters_per_step
        seconds = contender.block_seconds
        return [characters / s for s in (seconds[1:] if len(seconds) > 1 else seconds)]


def make_training(model: ModelConfig, vocabulary_size: int, config: TrainConfig) -> Training:
    """Two contenders that start from the same weights."""
    theirs = make_contender("torch", model, vocabulary_size, config)
    ours = make_contender("fastcell", model, vocabulary_size, config)
    ours.model.load_state_dict(theirs.model.state_dict())
    block = min(max(1, config.steps // BLOCKS), LONGEST_BLOCK)
    return Training(theirs, ours, config.steps, block, config.batch * config.window)


def train_side_by_side(
    training: Training,
    train_pieces: Windows,
    held_out_pieces: Windows,
    progress: Callable[[Training], None],
) -> None:
    """Train both contenders, block by block in turn: A B A B.

    Both run in one process, on the same threads of the one OpenMP runtime that they share, and see
    the same windows in the same order. Only the steps themselves are timed. ``training`` is filled
    as it goes, so that it holds what was done when an interrupt ends it early.

    Args:
        progress: called after every step of either.
    """
    pair = (training.torch, training.fastcell)
    steps, block = training.steps, training.block_steps
    measure_every = block * math.ceil(steps / MEASUREMENTS / block)
    for begin in range(0, steps, block):
        if begin % measure_every == 0:
            measure(training, begin, train_pieces, held_out_pieces)
        end = min(begin + block, steps)
        for contender in pair:
            seconds = 0.0
            for step in range(begin, end):
                place = step % len(train_pieces)
                seconds += contender.step(*train_pieces[place], fresh=place == 0)
                progress(training)
            if end - begin == block:
                contender.block_seconds.append(seconds)
    measure(training, steps, train_pieces, held_out_pieces)


def measure(training: Training, step: int, train_pieces: Windows, held_out_pieces: Windows) -> None:
    """Held-out loss of both, and one step of both from torch's weights against float64."""
    for contender in (training.torch, training.fastcell):
        contender.held_out.append(held_out_loss(contender.model, held_out_pieces))
    place = step % len(train_pieces)
    state = None if place == 0 else training.torch.state
    training.checks.append(
        check_step(training.torch.model, training.fastcell.model, *train_pieces[place], state)
    )
    training.measured_at.append(step)
