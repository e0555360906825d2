"""The equation as a value: a generator, the order in which it fills slots, and the feed that asks it to."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.feeds.mask import masked_chunk
from ar_jax.feeds.protocol import Chunk, Feed
from ar_jax.mixers.protocol import State
from ar_jax.models.generator import Context, Generator
from ar_jax.orders.protocol import Order

Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Autoregressive:
    """p(x) = prod_k p(x[G_k] | x[G_<k]).

    Attributes:
      generator: the network.
      order: the groups G_k.
      feed: what the network is given in step k.
    """

    generator: Generator
    order: Order
    feed: Feed

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        context = self.context(key, 1)
        values = self.empty_values(1)
        chunk = (
            self.feed.parallel()
            if self.feed.remembers
            else masked_chunk(self.order.length, self.num_prefix, jnp.zeros(1, jnp.int32))
        )
        return self.generator.init(key, values, context, chunk, values, key, method="init_all")

    @property
    def num_prefix(self) -> int:
        """The number of prefix tokens."""
        return self.generator.condition.num_tokens

    def empty_values(self, batch_size: int) -> Array:
        """Zeros on all slots, [B, L] int32 or [B, L, C] float32."""
        if self.generator.vocab_size:
            return jnp.zeros((batch_size, self.order.length), jnp.int32)
        return jnp.zeros((batch_size, self.order.length, self.generator.channels), jnp.float32)

    def context(
        self, key: Array | None, batch_size: int, condition: Array | None = None, drop_rate: float = 0.0
    ) -> Context:
        """Draws the order of each example, and which of them lose their condition.

        Args:
          key: for shuffled orders and drop_rate > 0.
          batch_size: B.
          condition: see Context.
          drop_rate: the probability that an example's condition is withheld.
        """
        order_key, drop_key = (None, None) if key is None else jax.random.split(key)
        drop = jnp.full(batch_size, condition is None)
        if drop_rate and drop_key is not None:
            drop = drop | jax.random.bernoulli(drop_key, drop_rate, (batch_size,))
        return Context(self.order.slots(order_key, batch_size), condition, drop)

    def read(
        self,
        params: Params,
        values: Array,
        context: Context,
        chunk: Chunk,
        state: State | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, State | None]:
        """The network's hidden vectors for a chunk, and the state after it; see `Generator.__call__`."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return cast(Any, self.generator.apply(params, values, context, chunk, state, dropout_key is None, rngs=rngs))

    def ask(self, params: Params, method: str, *args: Any) -> Array:
        """Calls the head: "loss", "log_prob", "sample" or "logits" of hidden vectors; see `Head`."""
        return cast(Array, self.generator.apply(params, *args, method=method))
