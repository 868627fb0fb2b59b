"""The character language model: embedding, recurrent layers, and a linear readout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Library = Literal["torch", "fastcell"]
State = Tensor | tuple[Tensor, Tensor]

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


@dataclass(frozen=True)
class ModelConfig:
    """Everything but the vocabulary that a model is built from."""

    cell: str
    embedding: int
    hidden: int
    layers: int


def layer_name(library: Library, cell: str) -> str:
    """What a user would type, for example ``torch.nn.LSTM``."""
    return f"{'torch.nn' if library == 'torch' else 'fastcell'}.{CELLS[cell]}"


def make_recurrent(library: Library, config: ModelConfig) -> nn.RNNBase:
    """The recurrent layers: the one thing in which the two sides differ."""
    if library == "torch":
        kind = getattr(nn, CELLS[config.cell])
    else:
        import fastcell

        kind = getattr(fastcell, CELLS[config.cell])
    layers: nn.RNNBase = kind(config.embedding, config.hidden, config.layers)
    return layers


class CharacterModel(nn.Module):
    """Predicts the next character from those before it."""

    def __init__(self, library: Library, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.embedding)
        self.recurrent = make_recurrent(library, config)
        self.readout = nn.Linear(config.hidden, vocabulary_size)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map ids ``(T, B)`` and a state to logits ``(T, B, vocabulary)`` and the next state."""
        output, state = self.recurrent(self.embedding(ids), state)
        return self.readout(output), state

    def loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mean cross-entropy in nats per character, and the next state."""
        logits, state = self(ids, state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), state


def detach(state: State) -> State:
    """Cut the graph: gradients stop at the border of a window, the numbers go on."""
    if isinstance(state, Tensor):
        return state.detach()
    return state[0].detach(), state[1].detach()


def cast(state: State | None, dtype: torch.dtype) -> State | None:
    """The same state in another dtype."""
    if state is None or isinstance(state, Tensor):
        return state if state is None else state.to(dtype)
    return state[0].to(dtype), state[1].to(dtype)
