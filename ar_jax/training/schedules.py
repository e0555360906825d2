"""Learning rates over a run, put together from optax's pieces: functions of the peak and the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import optax

from ar_jax.config import UsageError

Schedule = Callable[[jax.Array | int], jax.Array]


def constant(peak: float, num_steps: int, warmup_steps: int = 0) -> Schedule:
    """Warm-up, then the peak for ever."""
    _check(num_steps, warmup_steps)
    return _after_warmup(peak, warmup_steps, optax.constant_schedule(peak))


def cosine(peak: float, num_steps: int, warmup_steps: int = 0, final_scale: float = 0.0) -> Schedule:
    """Warm-up, then half a cosine down to `final_scale` times the peak at the last step."""
    _check(num_steps, warmup_steps, final_scale=final_scale)
    return _after_warmup(
        peak, warmup_steps, optax.cosine_decay_schedule(peak, max(1, num_steps - warmup_steps), final_scale)
    )


def warmup_stable_decay(
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    final_scale: float = 0.0,
    cosine_decay: bool = False,
    stage_ends: Sequence[float] = (1.0,),
) -> Schedule:
    """Warm-up, the peak, and over the last `decay_fraction` of all steps a line down to `final_scale` of it.

    Args:
      peak: the highest rate.
      num_steps: steps of the whole run.
      warmup_steps: steps of the straight line from 0 to the peak.
      decay_fraction: part of the steps spent on the way down.
      final_scale: the last rate over the peak.
      cosine_decay: half a cosine in place of the line.
      stage_ends: parts of the run after which all of this begins anew, the last of them 1 (NPP, arXiv:2412.15321).
    """
    if tuple(stage_ends) != tuple(sorted(set(stage_ends))) or stage_ends[0] <= 0 or stage_ends[-1] != 1:
        raise UsageError(
            f"config.schedule.stage_ends={tuple(stage_ends)} must rise from above 0 to 1; use (1.0,) for one stage."
        )
    ends = [round(end * num_steps) for end in stage_ends]
    stages = []
    for steps in (end - start for start, end in zip([0, *ends], ends, strict=False)):
        _check(steps, warmup_steps, decay_fraction=decay_fraction, final_scale=final_scale)
        decay_steps = min(round(decay_fraction * steps), steps - warmup_steps)
        decay = (
            optax.cosine_decay_schedule(peak, max(1, decay_steps), final_scale)
            if cosine_decay
            else optax.linear_schedule(peak, final_scale * peak, max(1, decay_steps))
        )
        stable = optax.join_schedules([optax.constant_schedule(peak), decay], [steps - warmup_steps - decay_steps])
        stages.append(_after_warmup(peak, warmup_steps, stable))
    return optax.join_schedules(stages, ends[:-1])


def infinite(
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    cooldown_fraction: float = 0.3,
    anneal_fraction: float = 0.2,
    constant_scale: float = 0.5,
    final_scale: float = 0.01,
) -> Schedule:
    """Warm-up, cosine cooldown to a constant rate, exponential anneal (arXiv:2503.02844; default fractions are ours).

    A run that is to be continued on new data goes on from its constant phase: the anneal is for a model to be used.

    Args:
      peak: the highest rate, at the end of the warm-up.
      num_steps: steps of the whole run.
      warmup_steps: steps of the straight line from 0 to the peak.
      cooldown_fraction: part of all steps spent on the cosine from the peak to the constant rate.
      anneal_fraction: part of all steps, at the end, spent on the exponential down to the final rate; 0 for none.
      constant_scale: the constant rate over the peak.
      final_scale: the final rate over the peak, above 0.
    """
    fractions = {"cooldown_fraction": cooldown_fraction, "anneal_fraction": anneal_fraction}
    _check(num_steps, warmup_steps, **fractions, constant_scale=constant_scale, final_scale=final_scale)
    cooldown_steps, anneal_steps = round(cooldown_fraction * num_steps), round(anneal_fraction * num_steps)
    constant_steps = num_steps - warmup_steps - cooldown_steps - anneal_steps
    if constant_steps < 0:
        raise UsageError(
            f"config.schedule: warm-up, cooldown and anneal take {num_steps - constant_steps} steps but "
            f"config.train.num_steps={num_steps}; lower warmup_steps, cooldown_fraction or anneal_fraction."
        )
    if final_scale <= 0 or constant_scale <= 0:
        raise UsageError(
            "config.schedule: final_scale and constant_scale must be above 0, as an exponential never reaches 0."
        )
    pieces = [
        optax.cosine_decay_schedule(peak, max(1, cooldown_steps), constant_scale),
        optax.constant_schedule(constant_scale * peak),
        optax.exponential_decay(
            constant_scale * peak, max(1, anneal_steps), final_scale / constant_scale, end_value=final_scale * peak
        ),
    ]
    if anneal_steps == 0:
        pieces.pop()
    boundaries = [cooldown_steps, cooldown_steps + constant_steps][: len(pieces) - 1]
    return _after_warmup(peak, warmup_steps, optax.join_schedules(pieces, boundaries))


def _after_warmup(peak: float, warmup_steps: int, schedule: Schedule) -> Schedule:
    """A straight line from 0 at step 0 to the peak at step `warmup_steps`, then `schedule` from its own step 0."""
    if warmup_steps == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), schedule], [warmup_steps])


def _check(num_steps: int, warmup_steps: int, **fractions: float) -> None:
    """Raises UsageError for phases that do not fit in the run."""
    if not 0 <= warmup_steps <= num_steps:
        raise UsageError(
            f"config.schedule.warmup_steps={warmup_steps} does not fit in config.train.num_steps={num_steps}; "
            f"use 0 to {num_steps}."
        )
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise UsageError(f"config.schedule.{name}={value} is a fraction; use 0 to 1.")
