"""What is common to all runs: a system with parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

S = TypeVar("S")


@dataclasses.dataclass(frozen=True, eq=False)
class Trained(Generic[S]):
    """A system with parameters. What is compiled for a system is kept, so a second call with the same shapes is fast.

    Attributes:
      system: what the config describes.
      params: its parameters; see the system's class.
      config: what built it.
      step: training steps done.
    """

    system: S
    params: Any
    config: Any
    step: int = 0
