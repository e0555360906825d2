"""Balancing a pole on a cart (Barto, Sutton and Anderson, 1983, with the constants of Gym's CartPole), speeds hidden."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.environments.protocol import Environment, Transition, check_at_least

GRAVITY, FORCE, SECONDS = 9.8, 10.0, 0.02  # m/s^2, N, a step
CART, POLE, HALF_LENGTH = 1.0, 0.1, 0.5  # kg, kg, m
FARTHEST, STEEPEST = 2.4, math.radians(12)  # m, from the middle; from upright
SPREAD = 0.05  # of the state at the start, each number evenly from -SPREAD to it


class Motion(NamedTuple):
    """What moves.

    Attributes:
      place: [2] float32, the cart's place in m and the pole's angle.
      speed: [2] float32, per second.
      time: [] int32, steps done.
    """

    place: Array
    speed: Array
    time: Array


def cart_pole(max_steps: int = 200, speeds: bool = False) -> Environment:
    """A cart that is pushed to the left or to the right, and a pole on it that must not fall: 1 for every step.

    An observation is the cart's place and the pole's angle, as parts of how far they may go: how fast they move is known only
    to an agent that remembers. An episode ends where one goes too far or, with success, after `max_steps`.

    Args:
      max_steps: of an episode.
      speeds: they are observed, too, and no memory is needed.

    Raises:
      UsageError: an episode without a step.
    """
    check_at_least(1, max_steps=max_steps)
    farthest = jnp.asarray([FARTHEST, STEEPEST])

    def observation(motion: Motion) -> Array:
        seen = motion.place / farthest
        return jnp.concatenate([seen, motion.speed]) if speeds else seen

    def reset(key: Array) -> tuple[Motion, Array]:
        place, speed = jax.random.uniform(key, (2, 2), minval=-SPREAD, maxval=SPREAD)
        motion = Motion(place, speed, jnp.zeros((), jnp.int32))
        return motion, observation(motion)

    def step(motion: Motion, action: Array, key: Array) -> Transition:
        after = Motion(
            motion.place + SECONDS * motion.speed,
            motion.speed + SECONDS * acceleration(motion, jnp.where(action == 1, FORCE, -FORCE)),
            motion.time + 1,
        )
        fell = (jnp.abs(after.place) > farthest).any()
        survived = ~fell & (after.time >= max_steps)
        return Transition(after, observation(after), jnp.ones(()), fell | survived, survived)

    return Environment(reset, step, 4 if speeds else 2, ("left", "right"), max_steps)


def acceleration(motion: Motion, force: Array) -> Array:
    """Of cart and pole without friction, [2], where the cart is pushed with so many N."""
    angle, turning = motion.place[1], motion.speed[1]
    sine, cosine, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    pushed = (force + POLE * HALF_LENGTH * turning**2 * sine) / mass
    pole = (GRAVITY * sine - cosine * pushed) / (HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass))
    return jnp.stack([pushed - POLE * HALF_LENGTH * pole * cosine / mass, pole])
