"""NPP (S025, arXiv:2412.15321): LlamaGen's networks and weights, trained on patches; replays of official runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.interop import llamagen
from ar_jax.interop.generators import Outputs, Weights, cross_entropy, official_run
from ar_jax.models.generator import Context
from ar_jax.objectives.next_patch import patches
from ar_jax.system import System


def replay(meta: Mapping[str, Any], weights: Weights, inputs: Weights) -> Outputs:
    """Logits and loss for each size of patches that the outputs' names tell, such as `out.logits_p2`."""
    given = meta["config"]
    config = llamagen.from_arguments(given) | dict(order=dict(kind="raster"))
    system, params = official_run(config, given.get("num_classes", 1000), llamagen.rules, weights)
    outputs: Outputs = {}
    for side in sorted({int(name.rpartition("_p")[2]) for name in meta["outputs"]}):
        logits, target = _read(system, params, inputs, side)
        nats = [cross_entropy(logits, target[:, :, k]) for k in range(target.shape[2])]
        size = int(np.prod(meta["outputs"][f"out.logits_p{side}"]["shape"]))
        told = jnp.repeat(logits, size // logits.size, axis=1)  # once for a patch, or for each of its tokens
        outputs |= {f"out.logits_p{side}": told, f"out.loss_p{side}": jnp.stack(nats).mean()}
    return outputs


def _read(system: System, params: Any, inputs: Weights, side: int) -> tuple[Array, Array]:
    """[B, M, V] logits of the patches, and their tokens, [B, M, K]."""
    model, values = system.model, jnp.asarray(inputs["in.tokens"], jnp.int32)
    labels, batch = jnp.asarray(inputs["in.classes"], jnp.int32), len(values)
    context = Context(model.order.slots(None, batch), labels, jnp.zeros(batch, bool))

    def forced(params: Any, values: Array) -> tuple[Array, Array]:
        hidden, target = patches(model, side, params, values, context)
        return model.ask(params, "__call__", hidden), target

    return jax.jit(forced)(params, values)
