"""Random orders: one token at a time (RAR, S045; ARPG, S052) or in sets of growing size (MaskGIT; MAR, S066)."""

from __future__ import annotations

import numpy as np

from ar_jax.config import UsageError
from ar_jax.orders.protocol import Layout, Order, coordinates


def cosine_sizes(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: after step k, floor(length * cos(pi/2 * (k+1)/num_steps)) tokens are still unknown.

    Every step takes at least one token (MaskGIT, arXiv:2202.04200, sec. 3.2).
    """
    return _sizes(length, np.cos(np.pi / 2 * np.arange(1, num_steps + 1) / num_steps))


def arccos_sizes(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: floor(length * 2/pi * arccos((k+1)/num_steps)) are unknown after step k (ARPG, arXiv:2503.10568)."""
    return _sizes(length, np.arccos(np.arange(1, num_steps + 1) / num_steps) / (np.pi * 0.5))


def _sizes(length: int, unknown_fraction: np.ndarray) -> np.ndarray:
    """Step sizes from the fraction that is unknown after each step; the last step leaves nothing."""
    num_steps = len(unknown_fraction)
    unknown = np.floor(length * unknown_fraction).astype(int)
    floor = np.arange(num_steps - 1, -1, -1)  # one token is left for each later step
    unknown = np.maximum(unknown, floor)
    for k in range(num_steps):
        unknown[k] = min(unknown[k], (length if k == 0 else unknown[k - 1]) - 1)
    return -np.diff(unknown, prepend=length)


def uniform_sizes(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: as equal as whole numbers allow."""
    return np.diff(np.arange(num_steps + 1) * length // num_steps)


SIZES = {"cosine": cosine_sizes, "arccos": arccos_sizes, "uniform": uniform_sizes}


def random(layout: Layout, num_steps: int | None = None, sizes: str = "cosine", adaptive: bool = False) -> Order:
    """A permutation per example, drawn from a key.

    Args:
      layout: any grids.
      num_steps: the permuted tokens are cut into this many steps; None gives one token a step.
      sizes: how the steps' sizes grow, "cosine", "arccos" or "uniform".
      adaptive: each step keeps the tokens that the model is surest of (MaskGIT); for feed 'mask'.

    Raises:
      UsageError: more steps than tokens, or an unknown `sizes`.
    """
    length = len(coordinates(layout))
    num_steps = length if num_steps is None else num_steps
    if not 1 <= num_steps <= length:
        raise UsageError(f"config.order.num_steps={num_steps} must lie between 1 and the number of tokens, {length}.")
    if sizes not in SIZES:
        raise UsageError(f"config.order.sizes={sizes!r} is unknown; use one of {', '.join(SIZES)}.")
    step = np.repeat(np.arange(num_steps), SIZES[sizes](length, num_steps)).astype(np.int32)
    return Order(step, coordinates(layout), shuffled=True, adaptive=adaptive)
