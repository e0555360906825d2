"""The directory of a run: one process at a time, one config for ever."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import ml_collections

from ar_jax.config import UsageError

# What may differ when a run is resumed: nothing here changes the parameters that come out, another mesh, another way across it
# or another remat by rounding alone.
_FREE = ("mesh.", "model.mixer.across.", "model.remat.", "checkpoint.", "eval.", "sampling.") + tuple(
    f"train.{key}." for key in ("log_every_steps", "max_skipped_steps", "stuck_seconds", "profile_steps")
)


@contextlib.contextmanager
def claim(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> Iterator[Path]:
    """Makes the directory this process's own while the context lasts, and notes the config in it.

    Raises:
      UsageError: the directory cannot be written, another process has it, or it belongs to a run of another config.
        Nothing has been overwritten then.
    """
    path = Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path) if jax.process_index() == 0 else contextlib.nullcontext()
    except OSError as error:
        raise UsageError(f"Cannot write to {path} ({error.strerror or error}); choose another --workdir.") from error
    with lock:
        plain = plain_values(config)
        if (path / "config.json").exists():
            check_same(read_config(path), plain, path)
        if jax.process_index() == 0:
            write_atomically(path / "config.json", json.dumps(plain, indent=2) + "\n")
        yield path


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The config that a run has left in its directory.

    Raises:
      UsageError: there is none, or it cannot be read.
    """
    file = Path(workdir).absolute() / "config.json"
    try:
        return ml_collections.ConfigDict(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{file} does not exist; give the --workdir of a run that train.py has started.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); mend it or choose another --workdir.") from error


def plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back: dicts, lists, strings, numbers.

    Raises:
      UsageError: it holds a value that JSON cannot.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    try:
        return json.loads(json.dumps(values))
    except TypeError as error:
        raise UsageError(
            f"The config must hold plain values only ({error}); use numbers, strings, lists and dicts."
        ) from error


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError on the first key that differs, unless it cannot change the result."""
    before, now = _flatten(plain_values(old)), _flatten(plain_values(new))
    for key in [*now, *before]:
        if before.get(key, _ABSENT) != now.get(key, _ABSENT) and not f"{key}.".startswith(_FREE):
            raise UsageError(
                f"{path} holds a run with config.{key}={before.get(key, _ABSENT)!r}, not {now.get(key, _ABSENT)!r}; "
                "give another --workdir, or that run's config to resume it."
            )


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's text; whoever reads it, at any moment, sees all of the old or all of the new."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    os.replace(part, file)


def _lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    """The directory's lock, held. The system frees it when the process ends, however it ends."""
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        return lock.acquire()
    except filelock.Timeout as error:
        raise UsageError(
            f"{path} is in use by another process; wait until it ends or give another --workdir."
        ) from error


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()
