"""Finding files: where a path in a config points to, and what to say when nothing usable is there."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

from ar_jax.config import UsageError


def resolve(path: str | os.PathLike[str]) -> Path:
    """The path that a config's `path` means.

    `~` and environment variables are expanded. A relative path starts at $AR_JAX_DATA if that is set, else at the
    working directory.
    """
    expanded = Path(os.path.expandvars(path)).expanduser()
    return Path(os.environ.get("AR_JAX_DATA") or ".").expanduser() / expanded


def find(path: str | os.PathLike[str], remedy: str) -> Path:
    """The existing file or folder that `path` means.

    Raises:
      UsageError: it is no path or nothing is there; the sentence ends with `remedy`, how to get it.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UsageError(f"{path!r} is not a path; {remedy}.")
    found = resolve(path)
    if not found.exists():
        raise UsageError(f"{found} does not exist; {remedy}.")
    return found


def read_bytes(path: Path, remedy: str) -> bytes:
    """The content of the file at `path`, unpacked if its name ends with .gz.

    Raises:
      UsageError: it is empty, a folder, not readable, or not a complete gzip file; the sentence ends with `remedy`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    if not content:
        raise UsageError(f"{path} is empty; {remedy}.")
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is not a complete gzip file; {remedy}.") from error
