"""The order in which a model would generate an example that is there already (S175, arXiv:2504.17069)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.feeds.protocol import Chunk
from ar_jax.mixers.protocol import State, take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.sampling.loop import Params, Step, surest_first, walk


def own_order(model: Autoregressive, params: Params, values: Array, context: Context) -> Array:
    """Slots in the order z of which each is the surest of all that are left, given those before it.

    z_i = argmax_k log p(x_k | x_z<i)

    So the model is asked where to go on and what stands there at once, as when it samples in an adaptive order, but what
    stands there is the example's own. In steps of several tokens the surest so many come next.

    Args:
      model: with an adaptive order, as a sampler has; one network evaluation a step.
      params: the network's parameters.
      values: [B, L] int32, the examples on their slots.
      context: the condition of each example; its slots are where the search starts, and of no other use.

    Returns:
      [B, L] int32, for `Autoregressive.dealt`.

    Raises:
      UsageError: an order that is not adaptive, or a head without a likelihood.
    """
    if not model.order.adaptive or not model.generator.head.has_likelihood:
        raise UsageError(
            "An own order needs a model that samples by its confidence, and a likelihood; set config.sampling.order = "
            "dict(kind='random', adaptive=True), and a head such as 'categorical'."
        )
    feed = model.feed
    start = model.generator.decoder.init_state(len(values), feed.max_len, feed.max_step_len) if feed.remembers else None

    def body(carry: tuple[Array, State], step: Step, chunk: Chunk) -> tuple[Array, State]:
        slots, state = carry
        hidden, state = model.read(params, values, context.replace(slots=slots), chunk, state)  # type: ignore[attr-defined]
        nats = model.ask(params, "log_prob", chunk.pick(hidden), take(values, slots))
        known = jnp.broadcast_to(jnp.asarray(chunk.answers)[None] < 0, nats.shape)
        return surest_first(slots, nats, known), state

    return walk(feed, body, (context.slots, start))[0]
