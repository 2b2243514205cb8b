"""Artefacts appear whole or not at all: written beside their place, then renamed onto it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_em.errors import OutputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it onto ``path`` if the block ends well.

    Raises:
        OutputError: the folder cannot be made or written to.  Whatever stood at ``path`` before is then untouched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a" / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (folder / "a" / "note.txt").read_text()
        'whole'
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
    except OSError as error:
        raise OutputError(_message(target, error)) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(_message(target, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise now, before long work, if ``path`` could not be written at its end.

    Raises:
        OutputError: no file can be made there.
    """
    target = Path(path)
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    reason = None
    if not folder.is_dir():
        reason = NotADirectoryError(f"{folder} is not a directory")
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = PermissionError(f"no permission to write in {folder}")
    elif target.is_dir():
        reason = IsADirectoryError(f"{target} is a directory")
    if reason is not None:
        raise OutputError(_message(target, reason)) from reason


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _message(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error}; nothing was left behind. Pass a path in a folder that you can write to"
