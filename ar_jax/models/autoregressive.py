"""The equation as a value: a generator, the order in which it fills slots, and the feed that asks it to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ar_jax.config import UsageError
from ar_jax.feeds.mask import masked_chunk
from ar_jax.feeds.protocol import Chunk, Feed
from ar_jax.mixers.protocol import State, take
from ar_jax.models.cascade import Cascade
from ar_jax.models.conditioning import Condition
from ar_jax.models.generator import Context, Generator, slots_of
from ar_jax.orders.protocol import Order

Params = Any
Resample = Callable[[Params, Array, np.ndarray], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Autoregressive:
    """p(x) = prod_k p(x[G_k] | x[G_<k]).

    Parameters are a mapping: "generator" are the network's, "tokenizer" the tokenizer's (where what is fed comes from it).

    Attributes:
      generator: the network.
      order: the groups G_k.
      feed: what the network is given in step k.
      token_shape: () where tokens are numbers, (C,) where they are vectors.
      vectors: the tokenizer's function of its parameters and tokens [B, n]: their vectors [B, n, C], which are fed in their
        place; None feeds the tokens.
      resample: for a resampled feed, the tokenizer's function of its parameters, values [B, L] and n slots: what is known
        at these slots before their step, [B, n, C].
      posterior: a second network, for training only, that is fed as the first one is; see `LearnedOrder`. Its parameters are
        "posterior".
    """

    generator: Generator | Cascade
    order: Order
    feed: Feed
    token_shape: tuple[int, ...] = ()
    resample: Resample | None = None
    vectors: Callable[[Params, Array], Array] | None = None
    posterior: Generator | None = None

    def init(self, key: Array) -> Params:
        """Fresh parameters of the network."""
        context, values = self.context(key, 1), self.empty_values(1)
        chunk = (
            self.feed.parallel()
            if self.feed.has_parallel
            else masked_chunk(self.order.length, self.num_prefix, jnp.zeros(1, jnp.int32))
        )
        merged = () if chunk.members is None else chunk.members.shape[1:]
        content = jnp.zeros((1, len(chunk), *merged, *self._content_shape), self._content_dtype)
        variables = self.generator.init(key, content, context, chunk, values, key, method="init_all")
        params = {"generator": variables["params"]}
        if self.posterior is None:
            return params
        beside = dataclasses.replace(self, generator=self.posterior, posterior=None)
        return params | {"posterior": beside.init(jax.random.fold_in(key, 1))["generator"]}

    def of_posterior(self, params: Params) -> tuple[Autoregressive, Params]:
        """The posterior in the network's place, with its parameters; all as it is where one network is both."""
        if self.posterior is None:
            return self, params
        beside = dataclasses.replace(self, generator=self.posterior, posterior=None)
        return beside, params | {"generator": params["posterior"]}

    @property
    def num_prefix(self) -> int:
        """The number of prefix tokens."""
        return self.generator.condition.num_tokens

    @property
    def num_stages(self) -> int:
        """In how many stages the network runs in each step: behind each it is asked, and the next one reads the answers."""
        return getattr(self.generator.decoder, "num_stages", 1)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """How many tokens each evaluation of the network generates: several steps of the order, if it runs in stages."""
        sizes = self.order.sizes[int(self.order.told) :]
        count = len(sizes) // len(self.feed.chunks)
        return tuple(sum(sizes[i : i + count]) for i in range(0, len(sizes), count))

    @property
    def _content_shape(self) -> tuple[int, ...]:
        return () if self.generator.vocab_size else (self.generator.channels,)

    @property
    def _content_dtype(self) -> Any:
        return jnp.int32 if self.generator.vocab_size else jnp.float32

    def empty_values(self, batch_size: int) -> Array:
        """Zeros on all slots, [B, L] int32 or [B, L, C] float32."""
        dtype = jnp.float32 if self.token_shape else jnp.int32
        return jnp.zeros((batch_size, self.order.length, *self.token_shape), dtype)

    def with_order(self, order: Order, feed: Feed) -> Autoregressive:
        """The same network, sampled in another order.

        Raises:
          UsageError: the order fills other places, or the feed needs what this network does not have.
        """
        if not np.array_equal(order.position, self.order.position):
            raise UsageError(
                "config.sampling.order fills other places than config.order; choose an order of the same grid."
            )
        kinds = [(f.remembers, f.apart, f.resampled, f.num_outputs, f.num_transition) for f in (feed, self.feed)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                "config.sampling.order needs another feed than the model was trained with; choose another."
            )
        return dataclasses.replace(self, order=order, feed=feed)

    def dealt(self, slots: Array) -> Autoregressive:
        """The same network on examples that bring their own orders, slots [B, L].

        Raises:
          UsageError: the order is the same for all examples.
        """
        if not self.order.shuffled or slots.shape[-1] != self.order.length:
            raise UsageError(
                f"The data bring an order of {slots.shape[-1]} tokens for each example; set config.order.kind='random', and "
                f"the tokenizer that these {self.order.length} tokens are of."
            )
        return dataclasses.replace(self, order=dataclasses.replace(self.order, dealt=slots))

    def context(
        self, key: Array | None, batch_size: int, condition: Condition = None, drop_rate: float = 0.0
    ) -> Context:
        """Draws the order of each example, and which of them lose their condition.

        Args:
          key: for shuffled orders and drop_rate > 0.
          batch_size: B.
          condition: see `Condition`.
          drop_rate: the probability that an example's condition is withheld.
        """
        order_key, drop_key = (None, None) if key is None else jax.random.split(key)
        drop = jnp.full(batch_size, condition is None)
        if drop_rate and drop_key is not None:
            drop = drop | jax.random.bernoulli(drop_key, drop_rate, (batch_size,))
        condition = self.complete(condition, key, batch_size)
        return Context(self.order.slots(order_key, batch_size), condition, drop)

    def complete(self, condition: Condition, key: Array | None, batch_size: int) -> Condition:
        """The condition with what its conditioner draws itself; see `Conditioner`."""
        draw = getattr(self.generator.condition, "complete", None)
        if draw is None:
            return condition
        if key is None:
            raise ValueError("a condition that is drawn needs a key")
        return draw(condition, jax.random.fold_in(key, 2), batch_size)  # 0 and 1 would be the keys of a split

    def read(
        self,
        params: Params,
        values: Array,
        context: Context,
        chunk: Chunk,
        state: State | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, State | None]:
        """The network's hidden vectors for a chunk, and the state after it; see `Generator.__call__`.

        Args:
          params: see the class.
          values: [B, L] int32 or [B, L, C] float, what stands on the slots; only what the chunk feeds is read.
          context: order and condition of each example.
          chunk: what is fed.
          state: what was remembered before; None for a whole sequence.
          dropout_key: trains with dropout; None does without.
        """
        content = self._content(params, values, context, chunk)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        variables, between = {"params": params["generator"]}, self._between(params, values, context, chunk)
        fed = content, context, chunk, state, dropout_key is None, between
        return cast(Any, self.generator.apply(variables, *fed, rngs=rngs))

    def read_stage(
        self,
        number: int,
        params: Params,
        values: Array,
        context: Context,
        chunk: Chunk,
        state: State | None,
        x: Array | None,
    ) -> tuple[Array, Array | None, State | None]:
        """What `read` does, up to the next answers: of a network that runs in one stage, all of it.

        Args:
          number: of the stage.
          params: see the class.
          values: as in `read`, with the answers of the stages before written.
          context: order and condition of each example.
          chunk: what is fed.
          state: as the stage before has left it.
          x: what the stage before has handed on; None in the first one.

        Returns:
          Hidden vectors [B, T, D], of which `chunk.stage(number)` picks the answers; what the next stage needs; the state.
        """
        if self.num_stages == 1:
            hidden, state = self.read(params, values, context, chunk, state)
            return hidden, None, state
        content, between = self._content(params, values, context, chunk), self._between(params, values, context, chunk)
        given = number, content, context, chunk, state, x, between
        return cast(Any, self.generator.apply({"params": params["generator"]}, *given, method="stage"))

    def finished(self, values: Array) -> Array:
        """Values [B, L, ...] as the tokenizer has them: of a blank that was drawn, its last token; see `Embedding.blank_token`."""
        if not self.generator.vocab_size or not self.generator.embedding.blank_token:
            return values
        return jnp.minimum(values, self.generator.vocab_size - 2)

    def _content(self, params: Params, values: Array, context: Context, chunk: Chunk) -> Array:
        """[B, T, ...], or [B, T, K, ...] of members, what is fed; anything where the source is no rank."""
        if chunk.members is not None:
            ranks = jnp.asarray(chunk.members)
            found = self._found(params, values, slots_of(context.slots, ranks.reshape(1, -1)))
            return found.reshape(len(values), *ranks.shape, *found.shape[2:])
        if not self.feed.resampled or self.resample is None:
            return self._found(params, values, slots_of(context.slots, jnp.atleast_2d(jnp.asarray(chunk.source))))
        source = np.asarray(chunk.source)  # known while tracing: runs of a resampled feed are single steps
        fed, content = source >= 0, jnp.zeros((len(values), len(source), *self._content_shape), self._content_dtype)
        if not fed.any():
            return content
        slots = np.argsort(self.order.step, kind="stable")[source[fed]]
        return content.at[:, np.flatnonzero(fed)].set(self.resample(params["tokenizer"], values, slots))

    def _found(self, params: Params, values: Array, slots: Array) -> Array:
        """What stands on slots [B, n], as it is fed."""
        found = take(values, slots)
        return found if self.vectors is None else self.vectors(params["tokenizer"], found)

    def _between(self, params: Params, values: Array, context: Context, chunk: Chunk) -> Array | None:
        """[B, T, R - 1], the tokens that are read between the layers."""
        if chunk.between is None:
            return None
        ranks = jnp.asarray(chunk.between)
        found = self._found(params, values, slots_of(context.slots, ranks.reshape(1, -1)))
        return found.reshape(len(values), *ranks.shape, *found.shape[2:])

    def ask(self, params: Params, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the head, such as "loss", "log_prob" or "sample" of hidden vectors; see `Head`.

        With `part`, the answers are all of that part of the model; see `Chunk.part`.
        """
        return self.generator.apply({"params": params["generator"]}, method, *args, **options, method="ask")
