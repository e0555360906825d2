"""Schedules over the steps of a generation: of the guidance scale, and of the temperature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ar_jax.config import choose


def _steps(sizes: np.ndarray) -> np.ndarray:
    """The steps done before each step, as a fraction of all."""
    return np.arange(len(sizes)) / len(sizes)


GuidanceSchedule = Callable[[np.ndarray, float], np.ndarray]
SCHEDULES: dict[str, GuidanceSchedule] = {
    "constant": lambda sizes, power: np.ones(len(sizes)),
    # in proportion to the tokens known after the step (MAR, arXiv:2406.11838; ARPG, arXiv:2503.10568)
    "linear": lambda sizes, power: np.cumsum(sizes) / sizes.sum(),
    # the same as MAR's code has it, where the last step counts one token less
    "linear_mar": lambda sizes, power: np.minimum(np.cumsum(sizes), sizes.sum() - 1) / sizes.sum(),
    # from nothing in the first step to everything in the last (VAR, arXiv:2404.02905)
    "linear_steps": lambda sizes, power: np.arange(len(sizes)) / max(len(sizes) - 1, 1),
    # the same up to half of the steps, then everything (Token-Shuffle, arXiv:2504.17789)
    "half_linear": lambda sizes, power: np.minimum(2 * _steps(sizes), 1),
    # in proportion to the steps done before (MaskGIT as in TiTok's code)
    "linear_before": lambda sizes, power: _steps(sizes),
    # (1 - cos(pi progress^power)) / 2 of the steps done before (MDT, arXiv:2303.14389; RAR, arXiv:2411.00776)
    "cosine": lambda sizes, power: (1 - np.cos(np.pi * _steps(sizes) ** power)) / 2,
}
# The same of the tokens before each token of a step (LPD, arXiv:2507.01957), so that each has a scale of its own.
BY_TOKEN: dict[str, Callable[[int], np.ndarray]] = {"linear_tokens": lambda length: np.arange(length) / length}
TEMPERATURE_SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    "linear": lambda remaining: remaining,  # none left in the last step (MaskGIT)
    # the same from all in the first step on (MaskGIL)
    "linear_steps": lambda remaining: 1 - np.arange(len(remaining)) / max(len(remaining) - 1, 1),
    "annealed": lambda remaining: remaining * (0.5 + 0.8 * remaining),  # TiTok: the logits are divided, too
}


def guidance_scales(
    sizes: tuple[int, ...], scale: float, schedule: str = "constant", power: float = 1.0, num_guided: int | None = None
) -> np.ndarray:
    """1 + (scale - 1) * schedule, float32: [num_steps], or [num_steps, L] where each token has its own.

    Args:
      sizes: tokens per step.
      scale: 1 is the conditional model, 0 the unconditional one.
      schedule: a key of SCHEDULES or BY_TOKEN.
      power: bends "cosine".
      num_guided: only the first so many steps are guided (LlamaGen's interval, arXiv:2406.06525); None guides all.
    """
    guided = np.arange(len(sizes)) < (len(sizes) if num_guided is None else num_guided)
    if schedule in BY_TOKEN:
        progress, guided = BY_TOKEN[schedule](sum(sizes))[None], guided[:, None]
    else:
        progress = choose(SCHEDULES | BY_TOKEN, schedule, "sampling.guidance_schedule")(np.asarray(sizes), power)
    return (1 + (scale - 1) * progress * guided).astype(np.float32)


def temperature_factors(num_steps: int, schedule: str = "constant") -> np.ndarray:
    """[num_steps] float32, what the temperature is multiplied with in each step.

    Args:
      num_steps: steps of the generation.
      schedule: a key of TEMPERATURE_SCHEDULES.
    """
    remaining = 1 - np.arange(1, num_steps + 1) / num_steps
    return choose(TEMPERATURE_SCHEDULES, schedule, "sampling.temperature_schedule")(remaining).astype(np.float32)
