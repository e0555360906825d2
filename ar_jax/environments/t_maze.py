"""T-Maze (Bakker, 2001), as AGaLiTe's code has it (arXiv:2310.15719): a cue at the start tells where to turn at the end."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.environments.protocol import Environment, Transition, check_at_least

ACTIONS = UP, DOWN, LEFT, RIGHT = range(4)
PLACE_BITS = 8  # more where the corridor is longer


class Place(NamedTuple):
    """Where the agent is.

    Attributes:
      cell: [] int32, of the corridor; the last one is the junction.
      cue: [] int32, where the reward is, UP or DOWN.
      time: [] int32, steps done.
    """

    cell: Array
    cue: Array
    time: Array


def t_maze(corridor_length: int = 10, num_distractors: int = 6, max_steps: int = 1000) -> Environment:
    """A corridor and a junction. Only the first observation shows the cue, so without memory half of the turns are right.

    An observation is two bits of the cue, the place in Gray code, and random bits, none of them set in the first
    observation. Up and down do nothing in the corridor, left and right nothing at the junction. The right turn is
    worth 4, the wrong one -1, every other step -0.1.

    Args:
      corridor_length: cells, with the junction.
      num_distractors: random bits.
      max_steps: an episode that has not ended by then ends without success.

    Raises:
      UsageError: a corridor of fewer than two cells, a negative number of bits, or fewer steps than the way takes.
    """
    check_at_least(2, corridor_length=corridor_length)
    check_at_least(0, num_distractors=num_distractors)
    check_at_least(corridor_length, max_steps=max_steps)
    bits = max(PLACE_BITS, (corridor_length - 1).bit_length())
    junction = corridor_length - 1

    def observation(cell: Array, cue: Array, noise: Array) -> Array:
        gray = cell ^ (cell >> 1)
        place = gray >> jnp.arange(bits - 1, -1, -1) & 1
        return jnp.concatenate([cue, place, noise]).astype(jnp.float32)

    def reset(key: Array) -> tuple[Place, Array]:
        zero = jnp.zeros((), jnp.int32)
        place = Place(zero, jax.random.bernoulli(key).astype(jnp.int32), zero)
        shown = jnp.stack([place.cue == DOWN, place.cue == UP])
        return place, observation(zero, shown, jnp.zeros(num_distractors))

    def step(place: Place, action: Array, key: Array) -> Transition:
        at_end = place.cell == junction
        turned = at_end & ((action == UP) | (action == DOWN))
        success = turned & (action == place.cue)
        moved = jnp.clip(place.cell + (action == RIGHT) - (action == LEFT), 0, junction).astype(jnp.int32)
        after = Place(jnp.where(at_end, place.cell, moved), place.cue, place.time + 1)
        reward = jnp.where(turned, jnp.where(success, 4.0, -1.0), -0.1)
        noise = jax.random.bernoulli(key, shape=(num_distractors,))
        seen = observation(after.cell, jnp.zeros(2), noise)
        return Transition(after, seen, reward, turned | (after.time >= max_steps), success)

    return Environment(reset, step, 2 + bits + num_distractors, ("up", "down", "left", "right"), max_steps)
