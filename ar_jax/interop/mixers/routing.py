"""Official runs of routed attention: clusters of the Routing Transformer (lucidrains/routing-transformer)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs
from ar_jax.kernels.routed_attention import balanced_clusters, cluster_sums, unit


def replay_routing(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Attention within clusters of given means, the commitment to them, and the means after a step of k-means."""
    config = meta["config"]
    q, k, v = (jnp.swapaxes(jnp.asarray(inputs[f"in.{name}"]), 1, 2) for name in "qkv")
    shared, means = config["shared_qk"], jnp.asarray(weights["kmeans.means"])
    memory = jnp.asarray(weights["mem_key"]), jnp.asarray(weights["mem_value"])
    out = balanced_clusters(
        q,
        k,
        v,
        means,
        window=config["window_size"],
        causal=config["causal"],
        shared=shared,
        memory=memory if memory[0].shape[2] else None,
    )
    x = unit(q if shared else jnp.concatenate([q, k], axis=1))
    scores = jnp.einsum("btnh,nch->bntc", x, means)
    own = jnp.take_along_axis(means[None], jnp.argmax(scores, axis=-1)[..., None], axis=2)
    gap = jnp.square(jnp.swapaxes(x, 1, 2) - own).mean()
    sums, counts = cluster_sums(x, means)
    return {
        "out.y": jnp.swapaxes(out, 1, 2),
        "out.dists": scores,
        "out.commitment_mse": gap,
        "out.aux_loss": np.float32(config.get("commitment_factor", 1e-4)) * gap,
        "out.kmeans_new_means": jnp.where((counts > 0)[..., None], unit(sums), means),
    }
