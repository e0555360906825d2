"""Gates learn which blocks attention reads, and nothing else is trained (SeerAttention, arXiv:2410.13276, 2506.08889)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.models.autoregressive import Autoregressive
from ar_jax.objectives.protocol import Loss, Params
from ar_jax.sampling.likelihood import teacher_forced


@dataclasses.dataclass(frozen=True)
class GateDistillation:
    """The mean over layers of KL(what blocks weigh in dense attention | the gate), which mixers add themselves.

    See `ar_jax.mixers.seer_attention`; set its `dense = True`, so that every layer is fed what the trained model feeds it.
    The value that is told is that of the step before.
    """

    def frozen(self, name: str) -> bool:
        """All but the mixers' gates."""
        return "/mixer/gate/" not in name

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective."""
        context = model.context(key, len(values), condition)
        hidden, _ = teacher_forced(model, model.feed.parallel(), params, values, context, None)
        told = [
            leaf.mean()
            for path, leaf in jax.tree_util.tree_leaves_with_path(params["generator"])
            if jax.tree_util.keystr(path, simple=True, separator="/").endswith("statistics/divergence")
        ]
        divergence = jax.lax.stop_gradient(sum(told) / max(len(told), 1))
        # Without a share in the loss no derivative would reach the layers, which add their own.
        return 0.0 * hidden.astype(jnp.float32).sum() + divergence, {"gate_divergence": jnp.asarray(divergence)}
