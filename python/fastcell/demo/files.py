"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable

from .errors import UserError


def check_writable(path: str, what: str) -> None:
    """Ask before minutes of work whether ``path`` can be written after them.

    Raises:
        UserError: it cannot.
    """
    folder = os.path.dirname(path) or "."
    if not path:
        reason = "it has no name"
    elif os.path.isdir(path):
        reason = "it is a folder"
    elif not os.path.isdir(folder):
        reason = f"there is no folder {folder!r}"
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        reason = "permission denied"
    else:
        return
    raise UserError(f"cannot write the {what} {path!r}: {reason}")


def write_whole(path: str, what: str, write: Callable[[str], None]) -> None:
    """Call ``write`` with a name beside ``path`` and move the result there.

    An interrupt or a full disk leaves an older file as it was.

    Raises:
        UserError: it cannot be written.
    """
    # What is there and no file, /dev/stdout or a pipe, is written to and never replaced.
    special = os.path.exists(path) and not os.path.isfile(path)
    beside = path if special else f"{path}.{os.getpid()}.tmp"
    try:
        write(beside)
        if not special:
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write the {what} {path!r}: {reason}") from error
    finally:
        if not special and os.path.exists(beside):
            os.unlink(beside)
