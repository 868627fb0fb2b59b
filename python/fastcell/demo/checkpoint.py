"""Saving a trained model, and loading it again without running any code from the file."""

from __future__ import annotations

import warnings
from dataclasses import asdict, fields
from typing import Any

import torch

from .errors import UserError
from .files import write_whole
from .model import CELLS, CharacterModel, Library, ModelConfig

FORMAT = "fastcell demo 1"


def save_checkpoint(path: str, model: CharacterModel, vocabulary: str, prompt: str) -> None:
    """Write all that sampling needs; ``torch.load`` reads it as plain data.

    Args:
        prompt: what a sample goes on from if it is not told.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "vocabulary": vocabulary,
        "prompt": prompt,
        "config": asdict(model.config),
        "state_dict": dict(model.state_dict()),
    }
    write_whole(path, "checkpoint", lambda name: torch.save(content, name))


def load_checkpoint(path: str, library: Library = "fastcell") -> tuple[CharacterModel, str, str]:
    """Read what ``save_checkpoint`` wrote: the model, its vocabulary and its prompt.

    Raises:
        UserError: the file is missing, no checkpoint of this demo, or its parts do not fit.
    """
    try:
        with warnings.catch_warnings():  # about pickles that the next lines refuse anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path!r}: {error.strerror}") from error
    except Exception as error:  # torch.load raises a dozen types on files that are something else
        raise UserError(f"{path!r} is no checkpoint of fastcell demo") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path!r} is no checkpoint of fastcell demo")
    try:
        return _rebuild(content, library)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {path!r} is damaged: {_first_line(error)}") from error


def _rebuild(content: dict[str, Any], library: Library) -> tuple[CharacterModel, str, str]:
    vocabulary, raw, weights = content["vocabulary"], content["config"], content["state_dict"]
    if not isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary) or not vocabulary:
        raise ValueError("its vocabulary is not a string of different characters")
    prompt = content["prompt"]
    if not isinstance(prompt, str) or not prompt or not set(prompt) <= set(vocabulary):
        raise ValueError("its prompt is not a string over its vocabulary")
    config = ModelConfig(**{field.name: raw[field.name] for field in fields(ModelConfig)})
    if config.cell not in CELLS:
        raise ValueError(f"it has an unknown cell {config.cell!r}")
    for name in ("embedding", "hidden", "layers"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"its {name} is {value!r}")
    # Two weights at least for each layer: a wrong count ends here, not in a loop without end.
    if not isinstance(weights, dict) or config.layers > len(weights):
        raise ValueError("it has too few weights")
    if any(not torch.is_tensor(w) or w.dtype != torch.float32 for w in weights.values()):
        raise ValueError("its weights are not float32 tensors")
    # Shapes are compared on the meta device, before memory is taken for sizes that may be wrong.
    with torch.device("meta"):
        model = CharacterModel(library, config, len(vocabulary))
    model.load_state_dict(weights, assign=True)
    return model, vocabulary, prompt


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0]).rstrip(".")
