"""Random orders: one token at a time (RAR, S045; ARPG, S052) or in sets of growing size (MaskGIT; MAR, S066)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.config import UsageError, choose
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


def rounded_cosine_sizes(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: the steps of length * (1 - cos(pi/2 * k/num_steps)), each rounded, and at least 1 (LPD, S116).

    Where their sum is another than length, those that were rounded most are rounded the other way.
    """
    shares = -np.diff(np.cos(np.pi / 2 * np.arange(num_steps + 1) / num_steps)) * length
    sizes = np.maximum(np.round(shares), 1).astype(int)
    while excess := np.sign(sizes.sum() - length):
        gap = np.where((sizes == 1) & (excess > 0), -np.inf, excess * (sizes - shares))
        sizes[gap.argmax()] -= excess
    return sizes


def arccos_shares(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: step k takes a share of arccos(1 - k/(num_steps-1)), rounded, at least 1 (MaskGIL, S033)."""
    return _shares(length, np.arccos(np.linspace(1, 0, num_steps)))


def cosine_shares(length: int, num_steps: int) -> np.ndarray:
    """[num_steps] int: step k takes a share of cos(pi/2 * (1 - k/(num_steps-1))), rounded, at least 1 (MaskGIL, S033)."""
    return _shares(length, np.cos(np.pi / 2 * np.linspace(1, 0, num_steps)))


def _shares(length: int, shares: np.ndarray) -> np.ndarray:
    """Rounded shares of the tokens, at least 1 each; the last step takes what is left, the largest steps pay what is not."""
    if len(shares) == 1:
        return np.asarray([length])
    sizes = np.maximum(np.round(shares / shares.sum() * length), 1).astype(int)
    sizes[-1] += length - sizes.sum()
    while sizes[-1] < 1:
        sizes[sizes[:-1].argmax()] -= 1
        sizes[-1] += 1
    return sizes


SIZES = {
    "cosine": cosine_sizes,
    "arccos": arccos_sizes,
    "uniform": uniform_sizes,
    "rounded_cosine": rounded_cosine_sizes,
    "arccos_shares": arccos_shares,
    "cosine_shares": cosine_shares,
}


def step_sizes(sizes: str | Sequence[int], length: int, num_steps: int | None) -> np.ndarray:
    """[num_steps] int, how many tokens each step takes.

    Args:
      sizes: a key of SIZES, or the numbers themselves.
      length: the number of tokens.
      num_steps: None gives one token a step, or follows from the numbers.

    Raises:
      UsageError: more steps than tokens, an unknown name, or numbers that do not add up.
    """
    if not isinstance(sizes, str):
        given = np.asarray(sizes, int)
        if given.sum() != length or given.min(initial=1) < 1 or num_steps not in (None, len(given)):
            raise UsageError(
                f"config.order.sizes={tuple(given.tolist())} must be whole numbers of at least 1 whose sum is the number of "
                f"tokens, {length}; leave num_steps out."
            )
        return given
    num_steps = length if num_steps is None else num_steps
    if not 1 <= num_steps <= length:
        raise UsageError(f"config.order.num_steps={num_steps} must lie between 1 and the number of tokens, {length}.")
    return choose(SIZES, sizes, "order.sizes")(length, num_steps)


def random(
    layout: Layout,
    num_steps: int | None = None,
    sizes: str | Sequence[int] = "cosine",
    adaptive: bool = False,
    num_told: int = 0,
) -> Order:
    """A permutation per example, drawn from a key.

    Args:
      layout: any grids.
      num_steps: the permuted tokens are cut into this many steps; None gives one token a step.
      sizes: how the steps' sizes grow, "cosine", "arccos", "uniform", "rounded_cosine", "arccos_shares" or
        "cosine_shares", or the numbers themselves.
      adaptive: each step keeps the tokens that the model is surest of (MaskGIT), or that its order policy draws (LO-ARM, S204);
        for feed 'mask'.
      num_told: so many tokens stand in front and are given, and all steps are for the others; for feeds "mask" and "query".

    Raises:
      UsageError: more steps than tokens, an unknown `sizes`, numbers that do not add up, or all tokens told.
    """
    length = len(coordinates(layout))
    if not 0 <= num_told < length:
        raise UsageError(
            f"config.order.num_told={num_told} must be at least 0 and below the number of tokens, {length}."
        )
    counts = step_sizes(sizes, length - num_told, num_steps)
    counts = np.concatenate([[num_told], counts]) if num_told else counts
    step = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return Order(step, coordinates(layout), shuffled=True, adaptive=adaptive, told=num_told > 0)
