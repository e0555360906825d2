"""Parameters of a model of softmax attention, as those of one whose mixers have softmax attention inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ar_jax.config import UsageError
from ar_jax.training.paths import named_leaves, with_leaves

WITH_SOFTMAX = ("loki", "seer_attention", "subsampled")  # kinds of mixers that have it inside
_INSIDE = re.compile(r"(.*/mixer/)softmax/(.*)")


def becomes(trained: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a config's mixers have inside what another config trained: softmax attention."""
    old, new = (dict(dict(c.get("model") or {}).get("mixer") or {}).get("kind") for c in (trained, config))
    return old == "softmax" and new in WITH_SOFTMAX


def from_softmax(params: Any, fresh: Any) -> Any:
    """Fresh parameters with all that the trained ones hold; what is new (gates, statistics) stays as it is.

    Args:
      params: trained, of mixers of kind "softmax".
      fresh: of the same model with mixers such as "loki" or "seer_attention".

    Raises:
      UsageError: the trained parameters do not fit.
    """
    trained, wanted = named_leaves(params), named_leaves(fresh)
    names = {name: _INSIDE.sub(r"\1\2", name) for name in wanted}
    taken = {name: trained[old] for name, old in names.items() if old in trained}
    unused = set(trained) - {names[name] for name in taken}
    if unused or any(leaf.shape != wanted[name].shape for name, leaf in taken.items()):
        raise UsageError(
            "The trained parameters are not those of softmax attention in the same model"
            + (f" (there is no place for {min(unused)})." if unused else " (other shapes).")
        )
    return with_leaves(fresh, taken)
