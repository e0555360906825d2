"""PAR (S021, arXiv:2412.15119): LlamaGen's weights and those of the tokens in between; replays of official runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.interop import llamagen
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, greedy, logits_in_order, official_run
from ar_jax.interop.rules import same
from ar_jax.system import System


def rules(system: System) -> list[Any]:
    """The network's weights."""
    learned = same("spe_tok_embeddings.special_embeddings.weight", "generator/transition")
    return [*llamagen.rules(system), learned]


def groups(regions: int) -> dict[str, Any]:
    """Order and feed of a config: so many regions along each axis, whose tokens are drawn together."""
    return dict(order=dict(kind="parallel_groups", regions=regions), feed=dict(kind="shift", transition=True))


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    given = meta["config"]
    return llamagen.from_arguments(given) | groups(round(given.get("ar_token_num", 4) ** 0.5))


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Teacher-forced logits and loss; greedy generation. Tokens are in the order of their generation, as in the code."""
    given, labels = meta["config"], jnp.asarray(inputs["in.classes"], jnp.int32)
    system, params = official_run(_config(meta), given.get("num_classes", 1000), rules, weights)
    slots = np.asarray(system.model.order.slots(None, 1))[0]
    tokens = np.asarray(inputs["in.tokens"])[:, np.argsort(slots)]
    logits, target = logits_in_order(system, params, tokens, labels)
    run = functools.partial(greedy, system, params, labels, len(tokens))
    return {
        "out.logits": logits,
        "out.loss": cross_entropy(logits, target).mean(),
        "out.greedy": run(guidance_scale=1.0)[:, slots],
        "out.greedy_cfg": run(guidance_scale=max(given.get("cfg_scale", 1.0), 1.0))[:, slots],
    }
