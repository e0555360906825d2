"""Learned order (LO-ARM, S204, arXiv:2503.05979): which token comes next is drawn from a policy that is trained, too."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.config import UsageError
from ar_jax.feeds.mask import masked_chunk
from ar_jax.mixers.protocol import take
from ar_jax.models.autoregressive import Autoregressive
from ar_jax.models.generator import Context
from ar_jax.objectives.protocol import Loss, Params

NEVER = -1e30  # the logit of a slot that is known already


@dataclasses.dataclass(frozen=True)
class LearnedOrder:
    """A lower bound of log p(x), where p(x, z) = prod_i p(z_i | z_<i, x_z<i) p(x_z_i | z_<i, x_z<i) over all orders z.

    log p(x) >= E_q(z|x) sum_i log p(x_z_i | x_z<i) + log p(z_i | x_z<i) - log q(z_i | z_<i, x)

    Policy p and variational posterior q are two more logits of each token (`Categorical.confidence` = "policy"): of the
    blanks, where some tokens are known, and of the tokens, where all are. q has a network of its own, `config.posterior`,
    which sampling does without (of its head no other logit is asked for); left out, one network is both, and what the draws
    add to the gradient disturbs it. q is a Plackett-Luce distribution: the softmax of its logits over what is left. Of the
    L steps one is drawn, i, and several orders z_<i before it. Given them step i is summed up over all its outcomes,

    F(z_<i) = sum_k q(k | z_<i, x) (log p(x_k | x_z<i) + log p(k | x_z<i) - log q(k | z_<i, x)),

    and the gradient is that of F, and by REINFORCE, with the other orders' F as a baseline (leave one out), that of the draw:
    sum_j (F_j - mean of the others) grad log q(z_<i of j | x).

    Attributes:
      num_orders: orders that are drawn for each example, at least 2.
      uniform: policy and posterior are uniform, and nothing of the order is learned (an order-agnostic model).
    """

    num_orders: int = 2
    uniform: bool = False

    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses a baseline of no other orders."""
        if self.num_orders < 2:
            raise UsageError(
                f"config.objective.num_orders={self.num_orders} must be at least 2: one is the other's baseline."
            )

    def check(self, model: Autoregressive) -> None:
        """Raises UsageError where the order is not free, or the head has no policy."""
        if not model.order.shuffled or max(model.order.sizes) > 1 or model.order.deal is not None:
            raise UsageError(
                "config.objective.kind='learned_order' draws tokens one by one; set config.order.kind='random' without num_steps."
            )
        if getattr(model.generator.head, "confidence", "") != "policy":
            raise UsageError(
                "config.objective.kind='learned_order' needs a policy; set config.head.confidence='policy'."
            )

    def __call__(
        self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array, progress: Array
    ) -> Loss:
        """See Objective: the bound's share of a token, in nats; the metrics are its parts."""
        context_key, order_key, step_key, dropout_key = jax.random.split(key, 4)
        batch, length, count = len(values), model.order.length, self.num_orders
        rate = model.generator.condition.guidance_dropout_rate
        context = model.context(context_key, batch, condition, rate)
        known = jax.random.randint(step_key, (batch,), 0, length)
        posterior = self.posterior(model, params, values, context, dropout_key)

        many = jax.tree.map(lambda a: jnp.concatenate([a] * count), (values, context, known, posterior))
        values, context, known, posterior = many
        slots = drawn_orders(order_key, posterior)
        context = dataclasses.replace(context, slots=slots)
        by_rank = jnp.take_along_axis(posterior, slots, axis=1)
        nats, policy, log_q = self.step(model, params, values, context, by_rank, known, dropout_key)
        q = jnp.exp(log_q)
        bound = (q * (nats + policy - log_q)).sum(axis=1).reshape(count, batch)

        before = jnp.arange(length)[None] < known[:, None]
        log_order = jnp.where(before, log_shares(by_rank), 0).sum(axis=1).reshape(count, batch)
        others = (bound.sum(axis=0, keepdims=True) - bound) / (count - 1)
        reinforced = jax.lax.stop_gradient(bound - others) * log_order
        reinforced -= jax.lax.stop_gradient(reinforced)  # adds a gradient, and nothing to the value
        order_nats = -(q * (policy - log_q)).sum(axis=1).mean()
        return -(bound + reinforced).mean(), {"order_nats": order_nats, "token_nats": -(q * nats).sum(axis=1).mean()}

    def bound(self, model: Autoregressive, params: Params, values: Array, condition: Array | None, key: Array) -> Array:
        """A draw whose mean is the lower bound of log p(values | condition), in nats, [B]: one order, all its steps."""
        context_key, order_key = jax.random.split(key)
        context = model.context(context_key, len(values), condition)
        posterior = self.posterior(model, params, values, context, None)
        slots = drawn_orders(order_key, posterior)
        context = dataclasses.replace(context, slots=slots)
        by_rank = jnp.take_along_axis(posterior, slots, axis=1)

        def add(total: Array, rank: Array) -> tuple[Array, None]:
            known = jnp.full(len(values), rank)
            parts = self.step(model, params, values, context, by_rank, known, None)
            nats, policy, log_q = (part[:, rank] for part in parts)
            return total + nats + policy - log_q, None

        return jax.lax.scan(add, jnp.zeros(len(values), jnp.float32), jnp.arange(model.order.length))[0]

    def posterior(
        self, model: Autoregressive, params: Params, values: Array, context: Context, dropout_key: Array | None
    ) -> Array:
        """q's logits of all slots, [B, L]."""
        length = model.order.length
        slots = jnp.broadcast_to(jnp.arange(length)[None], context.slots.shape)
        whole = masked_chunk(length, model.num_prefix, jnp.full(len(values), length))
        model, params = model.of_posterior(params)
        hidden, _ = model.read(
            params, values, dataclasses.replace(context, slots=slots), whole, dropout_key=dropout_key
        )
        logits = model.ask(params, "order_logits", whole.pick(hidden))[..., 1]
        return jnp.zeros_like(logits) if self.uniform else logits

    def step(
        self,
        model: Autoregressive,
        params: Params,
        values: Array,
        context: Context,
        posterior: Array,
        known: Array,
        dropout_key: Array | None,
    ) -> tuple[Array, Array, Array]:
        """What a step may come to, where the first `known` [B] ranks are known: three arrays [B, L], by rank.

        Returns:
          log p(x_k | x_z<i), log p(k | x_z<i) and log q(k | z_<i, x): 0, and large negative numbers, where k is known.
        """
        chunk = masked_chunk(model.order.length, model.num_prefix, known)
        hidden, _ = model.read(params, values, context, chunk, dropout_key=dropout_key)
        hidden = chunk.pick(hidden)
        nats = model.ask(params, "log_prob", hidden, take(values, context.slots))
        policy = model.ask(params, "order_logits", hidden)[..., 0]
        left = jnp.arange(model.order.length)[None] >= known[:, None]
        policy = jnp.zeros_like(policy) if self.uniform else policy
        policy, log_q = (jax.nn.log_softmax(jnp.where(left, a, NEVER)) for a in (policy, posterior))
        return jnp.where(left, nats, 0), policy, log_q


def drawn_orders(key: Array, logits: Array) -> Array:
    """Slots in the order that they are drawn in without replacement, each from the softmax of what is left, [B, L] int32."""
    return jnp.argsort(-(logits + jax.random.gumbel(key, logits.shape)), axis=1).astype(jnp.int32)


def log_shares(logits: Array) -> Array:
    """log softmax of each of [B, L] among itself and all behind it: log q(z_i | z_<i) of logits in the order z."""
    behind = jax.lax.associative_scan(jnp.logaddexp, logits, reverse=True, axis=1)
    return logits - behind
