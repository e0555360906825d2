"""Weights by rules: official arrays to our parameters and back, bit for bit, or one sentence that says what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.config import UsageError, nearest
from ar_jax.interop.rules import Rule, Rules, flatten
from ar_jax.training.paths import map_with_name, named_leaves

Official = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Converted:
    """Official weights as ours.

    Attributes:
      params: our tree of parameters, with the structure of `like`; numpy, in the dtypes of our model.
      kept: what our parameters do not hold, by official name; whole arrays, or the rows of a table that nobody reads.
      dtypes: the official dtype by official name, where it is not that of our leaf.
      used: official names whose values are in `params`.
    """

    params: Any
    kept: dict[str, np.ndarray]
    dtypes: dict[str, str]
    used: list[str]


def to_ours(rules: Rules, official: Official, like: Any) -> Converted:
    """Official weights as our parameters.

    Args:
      rules: a system's rules; together they make every leaf of `like`.
      official: arrays by official name.
      like: our parameters' shapes and dtypes, such as `jax.eval_shape(system.init, key)`.

    Returns:
      Our parameters, and what is needed to export them again. float16 and bfloat16 weights become float32, exactly.

    Raises:
      UsageError: an official array that is missing, unknown, of another shape or dtype, or not finite; it names the array,
        our leaf and both shapes.
    """
    if found := misfits(rules, official, like):
        raise UsageError(found[0])
    leaves, kept = named_leaves(like), dict[str, np.ndarray]()
    params, dtypes = dict[str, np.ndarray](), dict[str, str]()
    used: list[str] = []
    for rule in _present(rules, official):
        arrays = [official[key] for key in rule.official]
        if rule.copy_of and not np.array_equal(arrays[0], official[rule.copy_of]):
            raise UsageError(
                f"Official weight {rule.official[0]!r} must be a copy of {rule.copy_of!r}, and is not; "
                "give weights of a tied head."
            )
        kept.update({k: v for k, v in zip(rule.official, rule.keep(arrays), strict=True) if v is not None})
        if rule.ours:
            wanted = leaves[rule.ours[0]].dtype
            dtypes |= {
                k: str(array.dtype) for k, array in zip(rule.official, arrays, strict=True) if array.dtype != wanted
            }
            arrays = [_checked(k, array, wanted, rule) for k, array in zip(rule.official, arrays, strict=True)]
            params.update(zip(rule.ours, rule.read(arrays, [leaves[name].shape for name in rule.ours]), strict=True))
            used += rule.official
    return Converted(map_with_name(lambda name, _: params[name], like), kept, dtypes, used)


def to_official(
    rules: Rules, params: Any, kept: Official | None = None, dtypes: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Our parameters as official weights: the inverse of `to_ours`.

    Args:
      rules: the system's rules.
      params: our tree of parameters.
      kept: as `to_ours` gave it. Without it, rows that nobody reads are zeros.
      dtypes: as `to_ours` gave it; the parameters are rounded to these dtypes.

    Raises:
      UsageError: a parameter that is missing, or an array of which our parameters hold nothing and that was not kept.
    """
    kept, dtypes, leaves = kept or {}, dtypes or {}, named_leaves(params)
    present = _present(rules, kept)
    if found := _leaves_not_made(present, leaves):
        raise UsageError(found[0])
    official: dict[str, np.ndarray] = {}
    for rule in present:
        parts = [kept.get(key) for key in rule.official]
        if not rule.ours and any(part is None for part in parts):
            raise UsageError(
                f"{rule.official[0]!r} is part of the official weights but of no parameter of ours, and was not kept; "
                "export a run that was converted from official weights."
            )
        arrays = rule.write([np.asarray(leaves[name]) for name in rule.ours], parts)
        for key, array in zip(rule.official, arrays, strict=True):
            official[key] = array.astype(jnp.dtype(dtypes[key])) if key in dtypes else array
    for rule in present:
        if rule.copy_of:
            official[rule.official[0]] = official[rule.copy_of]
    return official


def misfits(rules: Rules, official: Official, like: Any) -> list[str]:
    """What keeps official weights from being a model's parameters, by names and shapes alone: one sentence each.

    Args:
      rules: as in `to_ours`.
      official: as in `to_ours`; only the shapes are looked at.
      like: as in `to_ours`.
    """
    present, leaves = _present(rules, official), named_leaves(like)
    if found := _leaves_not_made(present, leaves):
        return found
    known = {key: rule for rule in present for key in rule.official}
    extra = [key for key in official if key not in known]
    missing = [key for key in known if key not in official]
    shapes = [text for rule in present for text in _wrong_shapes(rule, official, leaves)]
    absent = [
        f"Official weight {key!r}{_more(missing)} is missing; it belongs to {_told(known[key], leaves)}."
        f"{nearest(key, extra)} Give all files of this system, and a config of their size."
        for key in missing
    ]
    strange = [
        f"Official weight {key!r} {list(official[key].shape)}{_more(extra)} is unknown to this system."
        f"{nearest(key, known)} Give the weights of this system, and a config of their size."
        for key in extra
    ]
    # Of weights of another system few names agree, and shapes tell nothing; of weights of another size, they tell most.
    return absent + strange + shapes if 2 * len(missing) > len(known) else shapes + absent + strange


def _present(rules: Rules, official: Official) -> list[Rule]:
    return [rule for rule in flatten(rules) if rule.required or all(key in official for key in rule.official)]


def _leaves_not_made(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> list[str]:
    """Every leaf must be made by one rule, and every rule must make leaves that there are."""
    made = [name for rule in rules for name in rule.ours]
    remedy = "Choose a config of the system whose weights these are."
    unknown = [
        f"The official weights have a place for {name}, which is no parameter of this model.{nearest(name, leaves)} {remedy}"
        for name in made
        if name not in leaves
    ]
    return unknown + [
        f"Parameter {name} of this model comes from {made.count(name)} official weights, not from one."
        f"{nearest(name, made)} {remedy}"
        for name in leaves
        if made.count(name) != 1
    ]


def _wrong_shapes(rule: Rule, official: Official, leaves: Mapping[str, Any]) -> list[str]:
    """Official arrays must have the shapes that our leaves, written officially, would have."""
    if not rule.ours or any(key not in official for key in rule.official):
        return []
    blank = [np.broadcast_to(np.False_, leaves[name].shape) for name in rule.ours]
    wanted = [array.shape for array in rule.write(blank, [None] * len(rule.official))]
    return [
        f"Official weight {key!r} has shape {list(official[key].shape)}, but {_told(rule, leaves)} of this model needs "
        f"{list(shape)}; choose a config of the weights' size."
        for key, shape in zip(rule.official, wanted, strict=True)
        if official[key].shape != shape
    ]


def _checked(key: str, array: np.ndarray, wanted: Any, rule: Rule) -> np.ndarray:
    """The array in our dtype, if its values are finite and our dtype holds them exactly."""
    floating = jnp.issubdtype(array.dtype, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)
    if array.dtype != wanted and not (floating and np.can_cast(array.dtype, wanted)):
        raise UsageError(
            f"Official weight {key!r} has dtype {array.dtype}, which {rule.ours[0]} ({jnp.dtype(wanted)}) does not hold "
            "exactly; save the official weights as float32."
        )
    if not np.isfinite(array).all():
        raise UsageError(
            f"Official weight {key!r} has values that are not finite; download the file again, or take other weights."
        )
    return array.astype(wanted, copy=False)


def _told(rule: Rule, leaves: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {list(leaves[name].shape)}" for name in rule.ours) or "no parameter of ours"


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
