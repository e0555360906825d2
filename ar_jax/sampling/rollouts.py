"""An agent in its environment: what `generate` is for tokens, with a world that answers. Compiled whole by the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.environments.protocol import Environment

Act = Callable[[Array, Array, Any], tuple[Array, Any]]  # observation [F], time [], memory to logits [A] and memory


@struct.dataclass
class Rollout:
    """T steps, episode after episode, and the observation behind the last one. Many have a batch's axis in front.

    Attributes:
      observations: [T + 1, F] float32.
      time: [T + 1] int32, steps since the episode began.
      episode: [T + 1] int32, which one it is, from 0.
      actions: [T] int32.
      log_probs: [T] float32, nats, of the actions.
      rewards: [T] float32.
      returns: [T] float32, the sum of all rewards of the episode so far, this one included.
      done: [T] bool, the episode ends.
      success: [T] bool, it ends as it should.
    """

    observations: Array
    time: Array
    episode: Array
    actions: Array
    log_probs: Array
    rewards: Array
    returns: Array
    done: Array
    success: Array


def rollout(
    environment: Environment, act: Act, memory: Any, env_key: Array, act_key: Array, length: int, greedy: Array | bool
) -> Rollout:
    """One agent in one environment for `length` steps, from an episode's start on; where one ends, the next begins.

    Every number of the memory is the agent's own, so it may be put back to its start at any time; `jax.vmap` runs many.

    Args:
      environment: answers.
      act: the agent.
      memory: at an episode's start.
      env_key: the environment's chance.
      act_key: the agent's.
      length: T.
      greedy: [] bool, the likeliest action is taken in place of a drawn one.
    """
    env_keys = jax.random.split(env_key, length + 1)
    state, first = environment.reset(env_keys[0])
    zero = jnp.zeros((), jnp.int32)

    def body(carry: Any, keys: tuple[Array, Array]) -> tuple[Any, tuple[Array, ...]]:
        now, (state, remembered, so_far) = carry
        observation, time, episode = now
        step_key, reset_key = jax.random.split(keys[0])
        logits, remembered = act(observation, time, remembered)
        action = jnp.where(greedy, logits.argmax(), jax.random.categorical(keys[1], logits)).astype(jnp.int32)
        log_prob = jax.nn.log_softmax(logits)[action]
        state, seen, reward, done, success = environment.step(state, action, step_key)
        so_far = so_far + reward
        told = (*now, action, log_prob, reward, so_far, done, success)
        state_anew, first = environment.reset(reset_key)
        goes_on = ((seen, time + 1, episode), (state, remembered, so_far))
        begins = ((first, zero, episode + 1), (state_anew, memory, jnp.zeros_like(so_far)))
        return jax.tree.map(lambda new, old: jnp.where(done, new, old), begins, goes_on), told

    keys = env_keys[1:], jax.random.split(act_key, length)
    start = ((first, zero, zero), (state, memory, jnp.zeros(())))
    (last, _), told = jax.lax.scan(body, start, keys)
    behind = [jnp.concatenate([seen, end[None]]) for seen, end in zip(told, last, strict=False)]
    return Rollout(*behind, *told[len(behind) :])
