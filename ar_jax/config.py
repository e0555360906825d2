"""Configs: files of plain values, and from values to parts: `kind` picks a part, the other keys are its parameters."""

from __future__ import annotations

import difflib
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
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
    return {
        k: p
        for k, p in found.items()
        if k not in ("parent", "name") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def check_keys(config: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Raises UsageError on the first key of `config` that is not in `allowed`, with the nearest allowed name."""
    allowed = sorted(allowed)
    for key in config:
        if key not in allowed:
            raise UsageError(
                f"config.{where}{'.' * bool(where)}{key} is not a known key.{nearest(key, allowed)} Known: {', '.join(allowed)}."
            )


def choose(table: Mapping[str, Any], name: object, where: str) -> Any:
    """table[name], or a UsageError that names the nearest entry and all of them; `where` is the place in the config."""
    if not isinstance(name, str) or name not in table:
        raise UsageError(
            f"config.{where}={name!r} is unknown.{nearest(name, table)} Known: {', '.join(sorted(table))}."
        )
    return table[name]


def choose_variant(variants: Mapping[str, Any], name: str) -> Any:
    """What a config file's table of variants holds under a name, or a UsageError that names the nearest variant."""
    if name not in variants:
        raise UsageError(f"Variant {name!r} is unknown.{nearest(name, variants)} Known: {', '.join(variants)}.")
    return variants[name]


def get_config(spec: str | os.PathLike[str]) -> Any:
    """The config of a file, `FILE.py` or `FILE.py:variant`: what the file's `get_config(variant)` returns.

    The file may import others as `configs.NAME` or `configs.FOLDER.NAME`: the folder that holds `configs`, or else the one
    above the file's own, is on the path meanwhile.

    Raises:
      UsageError: there is no such file or variant, or the file does not work.
    """
    name, _, variant = os.fspath(spec).partition(":")
    file = Path(name).absolute()
    if not file.is_file():
        hint = nearest(file.name, [path.name for path in file.parent.glob("*.py")])
        raise UsageError(f"Config file {name!r} does not exist.{hint} Name a file such as configs/digits.py.")
    root = next((str(folder.parent) for folder in file.parents if folder.name == "configs"), str(file.parent.parent))
    sys.path.insert(0, root)
    try:
        make = runpy.run_path(str(file))["get_config"]
        return make(variant) if variant else make()
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except Exception as error:  # whatever somebody's file raises is for them to mend
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{name} gives no config ({reason}); it needs a function get_config(variant).") from error
    finally:
        sys.path.remove(root)


def build(table: Mapping[str, Callable[..., Any]], config: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Builds the part that `config` describes.

    Args:
      table: the parts of one folder by their kind.
      config: `kind`, and any of that part's parameters.
      where: the place in the config, for messages, such as "model.mixer".
      **given: parameters that the code supplies; those the part does not take are left out (but for Linen's `parent`).

    Raises:
      UsageError: an unknown kind or key, a missing key, or a value of the wrong type; it names the nearest valid name.
    """
    options = dict(config)
    part = choose(table, options.pop("kind", None), f"{where}.kind")
    accepted = parameters(part)
    check_keys(options, set(accepted) - set(given), where)
    for key, value in options.items():
        _check_type(f"config.{where}.{key}", value, accepted[key])
    arguments = {k: v for k, v in given.items() if k in accepted or k == "parent"} | options
    missing = [k for k, p in accepted.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise UsageError(
            f"config.{where} needs {', '.join(missing)} for kind {config['kind']!r}; set config.{where}.{missing[0]}."
        )
    return part(**arguments)


def _check_type(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """A parameter's annotation tells the type, as in `int | None`; types that config files cannot write are left alone."""
    kinds = str(parameter.annotation).split(" | ")
    if not any(_is_a(value, kind) for kind in kinds):
        example = "" if parameter.default in (inspect.Parameter.empty, None) else f" such as {parameter.default!r}"
        raise UsageError(f"{name}={value!r} has the wrong type; give {' or '.join(kinds)}{example}.")


def _is_a(value: Any, kind: str) -> bool:
    """Whether a value is of a kind: a whole number is a float, a flag is no number, and a list is a sequence."""
    if kind.startswith("Sequence["):
        return isinstance(value, list | tuple) and all(_is_a(item, kind[len("Sequence[") : -1]) for item in value)
    if isinstance(value, bool) and kind in ("int", "float"):
        return False
    plain: dict[str, Any] = {"int": int, "float": int | float, "bool": bool, "str": str, "None": type(None)}
    return isinstance(value, plain.get(kind, object))
