"""Text from a trained model, one character at a time."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor

from .errors import UserError
from .model import CharacterModel
from .text import encode


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one id, shape ``(1,)``, from logits ``(vocabulary,)``.

    The probabilities are softmax(logits / temperature): below 1 the likely become likelier; at 0
    the likeliest is taken.

    Raises:
        UserError: the logits are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("the model's output is not finite: nothing can be sampled from it")
    if temperature == 0:
        return logits.argmax().view(1)
    # The largest becomes 0, so that no temperature however small overflows to inf - inf.
    scaled = (logits - logits.max()) / temperature
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)


def sample(
    model: CharacterModel,
    vocabulary: str,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> tuple[str, float]:
    """Let ``model`` go on from ``prompt`` for ``length`` characters.

    The prompt runs as one sequence; then every character is one call with one step, from the state
    that the call before left.

    Returns:
        the new characters, and the seconds that they took (the prompt not counted).

    Raises:
        UserError: a character of the prompt is not in the vocabulary.
    """
    prompt_ids = encode(prompt, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    model.eval()
    with torch.inference_mode():
        logits, state = model(prompt_ids.view(-1, 1))
        began = perf_counter()
        for _ in range(length):
            next_id = choose(logits[-1, 0], temperature, generator)
            drawn.append(vocabulary[int(next_id)])
            logits, state = model(next_id.view(1, 1), state)
        seconds = perf_counter() - began
    return "".join(drawn), seconds
