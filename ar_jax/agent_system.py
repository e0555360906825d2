"""An agent in training, and what one can do with it afterwards: the counterpart of `system.System` and `run.Run`.

A training step is one compiled program: agents with the present parameters act, a token at a time, by their mixers' memory;
then the same network reads all that they saw at once, each episode a segment, for the gradient. An example of the data is
the seed of an environment, and every rollout begins with a new episode: so a step needs nothing of the one before, and
`rollout_length` must leave room for an episode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError, build, check_keys, parameters
from ar_jax.data.episodes import build_environment
from ar_jax.data.protocol import Facts
from ar_jax.environments.protocol import Environment
from ar_jax.kernels.dispatch import platform
from ar_jax.mixers.common.statistics import is_statistic
from ar_jax.models.agent import Agent, agent
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import layers_apart
from ar_jax.objectives.actor_critic import ActorCritic
from ar_jax.sampling.rollouts import Rollout, rollout
from ar_jax.system import as_rows, compiled
from ar_jax.trained import Trained

Params = Any
KIND = "actor_critic"
SECTIONS = ("seed", "data", "model", "objective", "optimizer", "schedule", "train", "checkpoint", "eval", "mesh")


@dataclasses.dataclass(frozen=True, eq=False)
class AgentSystem:
    """An agent, its environment and its objective, a `Task` of the trainer.

    Parameters are {"agent": the network's}.

    Attributes:
      facts: what the data is.
      environment: what it acts in.
      agent: the network.
      objective: the loss.
    """

    facts: Facts
    environment: Environment
    agent: Agent
    objective: ActorCritic

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        observation, time = jnp.zeros((1, 1, *self.facts.shape)), jnp.zeros((1, 1), jnp.int32)
        return {"agent": self.agent.init(key, observation, time)["params"]}

    def frozen(self, name: str) -> bool:
        """See Task."""
        return self.measured(name)

    def measured(self, name: str) -> bool:
        """See Task."""
        return is_statistic(name)

    def loss(
        self, params: Params, batch: Mapping[str, Array], key: Array, progress: Array
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """See Task and `ActorCritic`; what was done is given, and has no gradient."""
        done = self.rollouts(jax.lax.stop_gradient(params), batch["seed"], key, self.objective.rollout_length)
        logits, values = self.read(params, jax.lax.stop_gradient(done))
        return *self.objective(logits, values, jax.lax.stop_gradient(done)), {}

    def without_gradient(self, params: Params, batch: Mapping[str, Array], key: Array) -> Rollout:
        """See Program.model_flops: what is done in the environments."""
        return self.rollouts(params, batch["seed"], key, self.objective.rollout_length)

    def rollouts(self, params: Params, seeds: Array, key: Array, length: int, greedy: Array | bool = False) -> Rollout:
        """What agents do for `length` steps in the environments of seeds [B], arrays [B, ...]; see `rollout`.

        The environments' chance is the seeds', the agents' the key's.
        """
        weights = {"params": layers_apart(params["agent"]) if platform() == "cpu" else params["agent"]}
        memory = self.agent.init_state(min(length, self.environment.max_steps))

        def act(observation: Array, time: Array, memory: Any) -> tuple[Array, Any]:
            fed = observation[None, None], time[None, None]
            logits, _, memory = self.agent.apply(weights, *fed, state=memory)  # type: ignore[misc]
            return logits[0, 0], memory

        def one(env_key: Array, act_key: Array) -> Rollout:
            return rollout(self.environment, act, memory, env_key, act_key, length, greedy)

        return jax.vmap(one)(jax.vmap(jax.random.key)(seeds), jax.random.split(key, len(seeds)))

    def read(self, params: Params, rollouts: Rollout) -> tuple[Array, Array]:
        """Logits [B, T + 1, A] and values [B, T + 1] of all that rollouts observed, at once."""
        fed = rollouts.observations, rollouts.time, rollouts.episode
        logits, values, _ = self.agent.apply({"params": params["agent"]}, *fed)  # type: ignore[misc]
        return logits, values

    def episodes(self, params: Params, seeds: Array, key: Array, greedy: Array | bool) -> dict[str, Array]:
        """The first episode of each seed [B] to its end: `return` [B], `length` [B] and `success` [B]."""
        done = self.rollouts(params, seeds, key, self.environment.max_steps, greedy)
        end = done.done.argmax(axis=1)[:, None]
        told = {"return": done.returns, "length": done.time[:, :-1] + 1, "success": done.success}
        return {name: jnp.take_along_axis(of_step, end, axis=1)[:, 0] for name, of_step in told.items()}

    def describe(self) -> dict[str, str]:
        """What a run says of the agent at its start."""
        return {"actions": ", ".join(self.environment.actions), "steps per rollout": str(self.objective.rollout_length)}


class AgentRun(Trained[AgentSystem]):
    """An agent with parameters."""

    def play(self, seeds: Sequence[int] | np.ndarray, greedy: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
        """One episode of each of the environments of seeds [B].

        Args:
          seeds: of the environments; the same have the same cues, starts and noise.
          greedy: take the likeliest actions; otherwise they are drawn, by `seed`.
          seed: of the agents' draws.

        Returns:
          `return` [B] float32, the sum of an episode's rewards; `length` [B] int32, its steps; `success` [B] bool.

        Raises:
          UsageError: seeds that are no whole numbers in one dimension.
        """
        rows = as_rows(seeds)
        if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
            raise UsageError(f"seeds must be whole numbers in one dimension, not of shape {rows.shape}.")
        draw = rows.astype(np.int32), jax.random.key(seed), np.asarray(greedy)
        return jax.tree.map(np.asarray, compiled(self.system.episodes)(self.params, *draw))


def agent_from_config(config: Mapping[str, Any], facts: Facts) -> AgentSystem:
    """Builds and checks agent, environment and objective; nothing is allocated or compiled.

    Args:
      config: see configs/agents/agalite.py.
      facts: what the data is.

    Raises:
      UsageError: an unknown key or kind, a section that has no meaning here, or data that are no episodes.
    """
    check_keys(config, SECTIONS, "")
    if facts.modality != "episodes":
        raise UsageError(
            f"config.objective.kind={KIND!r} trains agents, but the data is {facts.modality}; set config.data.kind='episodes'."
        )
    environment = build_environment(config["data"]["environment"])
    of_blocks = parameters(BlockOptions)
    own = set(parameters(agent)) - {"environment", "options"}
    check_keys(config["model"], {*of_blocks, *own}, "model")
    block, rest = ({k: v for k, v in config["model"].items() if (k in of_blocks) == is_one} for is_one in (True, False))
    options = build({"options": BlockOptions}, {"kind": "options"} | block, "model")
    make = functools.partial(build, {"agent": agent}, {"kind": "agent"} | rest, "model")
    network: Agent = make(environment=environment, options=options)
    objective: ActorCritic = build({KIND: ActorCritic}, config["objective"], "objective")
    system = AgentSystem(facts, environment, network, objective)
    jax.eval_shape(system.init, jax.random.key(0))  # an option that a part refuses is told now
    return system
