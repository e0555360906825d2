"""What kinds of official runs can be replayed: how each is told, and which function replays it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Replay:
    """How the runs of one official class are replayed.

    Attributes:
      told_by: a pattern found in "<source>; <system>; <class>" of meta.json, and in those of no other entry.
      function: (meta, weights by official name, inputs by name) to outputs by name.
    """

    told_by: str
    function: Callable[[Meta, Arrays, Arrays], Mapping[str, Any]]
