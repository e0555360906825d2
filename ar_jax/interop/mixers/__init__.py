"""Official runs of mixers, by the class that made them: which function replays them. Found when they are asked for."""

from __future__ import annotations

from ar_jax.interop import lazily
from ar_jax.interop.kinds import Replay

REPLAYS: dict[str, Replay] = {}
