"""Real text as numbers: reading it, its vocabulary, and the windows that a language model sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

HELD_OUT = 0.05  # the last part of the text, never trained on
HELD_OUT_LIMIT = 50_000  # characters; more would only take longer to evaluate
OPENING = 100  # characters of that part that a sample goes on from
LONG_PARAGRAPH = 60  # characters; a shorter one, as a heading, may come twice


@dataclass(frozen=True)
class Corpus:
    """A text split into a part to train on and a part held out.

    Attributes:
        name: what a reader should call the text.
        vocabulary: every character of the text once, in order of code point; its index is its id.
        train: ids of the training part, int64, shape ``(N,)``.
        held_out: ids of the part held out, int64, shape ``(M,)``.
    """

    name: str
    vocabulary: str
    train: Tensor
    held_out: Tensor

    @property
    def opening(self) -> str:
        """The first characters of the part held out: a start that warms any model's state."""
        return "".join(self.vocabulary[i] for i in self.held_out[:OPENING].tolist())


def _in_table(line: str) -> bool:
    return line.startswith(("+-", "+=")) or (line.startswith("|") and line.endswith("|"))


def default_text() -> str:
    """The language topics of Python's own help: English prose that every Python carries.

    Tables are left out, and so is a long paragraph that an earlier topic has: without that, a
    third of the part held out would also stand in the part to train on.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python comes without pydoc_data, the default text; give one with --text FILE"
        ) from error
    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics):
        lines = [line for line in topics[name].split("\n") if not _in_table(line.strip())]
        for paragraph in "\n".join(lines).split("\n\n"):
            key = paragraph.strip()
            if key not in seen:
                paragraphs.append(paragraph.strip("\n"))
            if len(key) >= LONG_PARAGRAPH:
                seen.add(key)
    return "\n\n".join(paragraphs) + "\n"


def read_text(path: str) -> str:
    """Read a UTF-8 file (a byte order mark is dropped, line ends become ``\\n``).

    Raises:
        UserError: the file is missing, unreadable, empty or no UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read the text {path!r}: {reason}") from error
    if not data:
        raise UserError(f"the text {path!r} is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the text {path!r} is not UTF-8: byte {data[error.start]:#04x} "
            f"at position {error.start} does not decode"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def make_corpus(name: str, text: str, batch: int, window: int) -> Corpus:
    """Number the characters of ``text`` and hold its last part out.

    Raises:
        UserError: the text is too short for ``batch`` tracks of one window each.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    held = min(max(2, int(points.size * HELD_OUT)), HELD_OUT_LIMIT)
    # Every track needs one window, and the last character of the last one needs a successor.
    needed = batch * window + 1
    if points.size - held < needed:
        raise UserError(
            f"the text {name!r} is too short: it has {points.size:,} characters, {held:,} of them "
            f"held out, and {batch} tracks of {window} characters need {needed:,} to train on; "
            "give a longer text, or a smaller --batch or --window"
        )
    distinct, inverse = np.unique(points, return_inverse=True)
    ids = torch.from_numpy(inverse.astype(np.int64).reshape(-1))
    vocabulary = distinct.tobytes().decode("utf-32-le")
    return Corpus(name, vocabulary, ids[:-held], ids[-held:])


def encode(text: str, vocabulary: str) -> Tensor:
    """Ids of ``text``, int64, shape ``(len(text),)``.

    Raises:
        UserError: a character is not in the vocabulary.
    """
    index = {character: i for i, character in enumerate(vocabulary)}
    missing = sorted(set(text) - set(index))
    if missing:
        raise UserError(f"the model's text has no {missing[0]!r}: it cannot be part of a prompt")
    return torch.tensor([index[character] for character in text], dtype=torch.int64)


def windows(
    ids: Tensor, batch: int, window: int, *, keep_last: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Cut ``ids`` into ``batch`` parallel tracks, and those into windows one after the other.

    Window ``k + 1`` of a track goes on where window ``k`` ended, so that a recurrent state can be
    carried from one to the next. The target of a character is the one that follows it.

    Args:
        ids: shape ``(N,)``, with ``N > batch``.
        keep_last: whether a last, shorter window is kept.

    Returns:
        pairs (input, target), both int64 and contiguous, shape ``(window, batch)``.
    """
    length = (ids.numel() - 1) // batch
    inputs = ids[: batch * length].view(batch, length).t().contiguous()
    targets = ids[1 : batch * length + 1].view(batch, length).t().contiguous()
    end = length if keep_last else length // window * window
    return [
        (inputs[start : min(start + window, end)], targets[start : min(start + window, end)])
        for start in range(0, end, window)
    ]
