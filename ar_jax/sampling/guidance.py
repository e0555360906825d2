"""Schedules of the guidance scale over the steps of a generation."""

from __future__ import annotations

import numpy as np

from ar_jax.config import choose


def constant(progress: np.ndarray) -> np.ndarray:
    """The full scale in every step."""
    return np.ones_like(progress)


def linear(progress: np.ndarray) -> np.ndarray:
    """From no guidance to the full scale, in proportion to the tokens generated (MAR, arXiv:2406.11838; Muse)."""
    return progress


def cosine(progress: np.ndarray, power: float = 1.0) -> np.ndarray:
    """(1 - cos(pi progress^power)) / 2 (MDT, arXiv:2303.14389; RAR)."""
    return (1 - np.cos(np.pi * progress**power)) / 2


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


def guidance_scales(sizes: tuple[int, ...], scale: float, schedule: str = "constant") -> np.ndarray:
    """[num_steps] float32: 1 + (scale - 1) * schedule(progress), progress being the fraction of tokens known after the step.

    Args:
      sizes: tokens per step.
      scale: 1 is the conditional model, 0 the unconditional one.
      schedule: a key of SCHEDULES.
    """
    progress = np.cumsum(sizes) / np.sum(sizes)
    return (1 + (scale - 1) * choose(SCHEDULES, schedule, "sampling.guidance_schedule")(progress)).astype(np.float32)
