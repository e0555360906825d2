"""From plain config values to parts: `kind` picks a part from its table, the other keys are that part's parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class UsageError(ValueError):
    """Something the user can mend: its one sentence names the thing and the remedy. Commands print it and exit with 2."""


def nearest(name: object, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the candidate nearest to `name`, or an empty string where none is near."""
    matches = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def parameters(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a part's constructor, without Linen's own `parent` and `name`."""
    found = inspect.signature(part).parameters
    return {k: p for k, p in found.items() if k not in ("parent", "name") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_keys(config: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Raises UsageError on the first key of `config` that is not in `allowed`, with the nearest allowed name."""
    allowed = sorted(allowed)
    for key in config:
        if key not in allowed:
            raise UsageError(f"config.{where}{'.' * bool(where)}{key} is not a known key.{nearest(key, allowed)} Known: {', '.join(allowed)}.")


def choose(table: Mapping[str, Any], kind: object, where: str) -> Any:
    """table[kind], or a UsageError that names the nearest kind and all of them."""
    if not isinstance(kind, str) or kind not in table:
        raise UsageError(f"config.{where}.kind={kind!r} is unknown.{nearest(kind, table)} Known: {', '.join(sorted(table))}.")
    return table[kind]


def build(table: Mapping[str, Callable[..., Any]], config: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Builds the part that `config` describes.

    Args:
      table: the parts of one folder by their kind.
      config: `kind`, and any of that part's parameters.
      where: the place in the config, for messages, such as "model.mixer".
      **given: parameters that the code supplies; those the part does not take are left out.

    Raises:
      UsageError: an unknown kind or key, a missing key, or a value of the wrong type; it names the nearest valid name.
    """
    options = dict(config)
    part = choose(table, options.pop("kind", None), where)
    accepted = parameters(part)
    check_keys(options, set(accepted) - set(given), where)
    for key, value in options.items():
        _check_type(f"config.{where}.{key}", value, accepted[key].default)
    arguments = {k: v for k, v in given.items() if k in accepted} | options
    missing = [k for k, p in accepted.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise UsageError(f"config.{where} needs {', '.join(missing)} for kind {config['kind']!r}; set config.{where}.{missing[0]}.")
    return part(**arguments)


def _check_type(name: str, value: Any, default: Any) -> None:
    """A default tells the type: a number is not a string, a flag is not a number. None and enumerations are left alone."""
    if default is inspect.Parameter.empty or default is None or value is None:
        return
    numeric = isinstance(default, int | float) and not isinstance(default, bool)
    wrong = (
        (isinstance(default, bool) and not isinstance(value, bool))
        or (numeric and (isinstance(value, bool) or not isinstance(value, int | float)))
        or (isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) and value != int(value))
        or (isinstance(default, str) and not isinstance(value, str))
    )
    if wrong:
        raise UsageError(f"{name}={value!r} has the wrong type; give a {type(default).__name__} such as {default!r}.")
