"""LO-ARM: its bound, its gradient and its samples, against the sum over all orders of all tokens. On images and on graphs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from ar_jax.config import UsageError
from ar_jax.heads.protocol import Sampling
from ar_jax.models.generator import Context
from ar_jax.objectives.learned_order import log_shares
from ar_jax.sampling.loop import drawn_from, generate
from ar_jax.system import System

LEARNED = {
    "order": "random",
    "objective": dict(kind="learned_order"),
    "head": dict(kind="categorical", confidence="policy"),
    "sampling": dict(order=dict(kind="random", adaptive=True)),
    "condition__guidance_dropout_rate": 0.0,
}
OWN = {"posterior": dict(num_layers=1, embed_dim=12, mlp_dim=16, mixer=dict(kind="softmax", num_heads=2))}
LABEL, REJECT = 1, 1e-3  # the seeds are fixed, so a test that passes once passes always


def system_of(tokenizer: str, **changes: Any) -> System:
    """Images of four pixels, or graphs of two nodes and the edge between them, of two levels."""
    return cases.tiny.__wrapped__(side=2, levels=2, tokenizer=dict(kind=tokenizer), **LEARNED | changes)


def contexts(orders: np.ndarray) -> Context:
    count = len(orders)
    return Context(jnp.asarray(orders, jnp.int32), jnp.full(count, LABEL), jnp.zeros(count, bool))


def all_orders(system: System) -> np.ndarray:
    return np.asarray(list(itertools.permutations(range(system.model.order.length))))


def parts_of_orders(system: System, params: Any, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p(x, z) and log q(z | x) of every order z, [orders] each, of one example's values [L]."""
    objective, orders = system.objective, all_orders(system)
    context, many = contexts(orders), jnp.broadcast_to(values[None], orders.shape)
    posterior = objective.posterior(system.model, params, many, context, None)
    by_rank = jnp.take_along_axis(posterior, context.slots, axis=1)
    joint = jnp.zeros(len(orders))
    for i in range(orders.shape[1]):
        known = jnp.full(len(orders), i)
        nats, policy, _ = objective.step(system.model, params, many, context, by_rank, known, None)
        joint += nats[:, i] + policy[:, i]
    return joint, log_shares(by_rank).sum(axis=1)


def bound_of(system: System, params: Any, values: jax.Array) -> jax.Array:
    joint, log_q = parts_of_orders(system, params, values)
    return (jnp.exp(log_q) * (joint - log_q)).sum()


@pytest.mark.parametrize("network", [{}, OWN], ids=["one network", "a posterior of its own"])
def test_the_loss_and_its_gradient_are_right_on_average(network: dict[str, Any]) -> None:
    """Of one step and two drawn orders, on graphs; what REINFORCE leaves of the noise is measured, not assumed."""
    system = system_of("symmetric", **network)
    params, length = cases.tiny_params(system), system.model.order.length
    values = jnp.arange(length, dtype=jnp.int32) % 2
    batch = {"tokens": jnp.broadcast_to(values[None], (256, length)), "label": jnp.full(256, LABEL)}

    exact = jax.jit(jax.value_and_grad(lambda params: -bound_of(system, params, values) / length))
    drawn = jax.jit(jax.value_and_grad(lambda params, key: system.loss(params, batch, key, jnp.float32(0))[0]))
    expected = exact(params)
    rounds = [drawn(params, jax.random.key(seed)) for seed in range(30)]
    flat = functools.partial(jnp.concatenate, axis=0)
    means = np.stack([flat([jnp.ravel(a) for a in jax.tree.leaves(one)]) for one in rounds]).astype(np.float64)
    error = means.std(axis=0, ddof=1) / len(means) ** 0.5
    wanted = np.asarray(flat([jnp.ravel(a) for a in jax.tree.leaves(expected)]), np.float64)
    assert (np.abs(means.mean(axis=0) - wanted) < 6 * error + 1e-5).all()  # thousands of numbers, 29 degrees of freedom
    assert (np.abs(wanted) > 20 * error).mean() > 0.3  # most of which are known well
    policy, posterior = (
        np.asarray(expected[1][part]["head"]["order"]["kernel"])
        for part in ("generator", "posterior" if network else "generator")
    )
    assert np.abs(policy[:, 0]).max() > 1e-3 and np.abs(posterior[:, 1]).max() > 1e-3
    assert not network or not policy[:, 1].any()  # the draws leave the network that samples alone


def test_samples_follow_the_sum_over_all_orders_and_the_bound_is_below_it() -> None:
    """On images, by a policy that has a mind of its own."""
    system = system_of("pixels")
    params, length = cases.tiny_params(system), system.model.order.length
    head = params["generator"]["head"]
    even = head["logits"] | {"bias": jnp.zeros_like(head["logits"]["bias"])}
    decided = head | {"order": jax.tree.map(lambda a: 4 * a, head["order"]), "logits": even}
    params = params | {"generator": params["generator"] | {"head": decided}}
    everything = np.asarray(list(itertools.product(range(2), repeat=length)), np.int32)
    joint, log_q = jax.jit(jax.vmap(functools.partial(parts_of_orders, system, params)))(everything)
    np.testing.assert_allclose(jnp.exp(log_q).sum(axis=1), 1, atol=1e-4)  # float32
    p = np.exp(np.asarray(joint, np.float64)).sum(axis=1)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-4)

    count = 8000
    context = contexts(np.broadcast_to(np.arange(length), (count, length)))
    draw = jax.jit(lambda key: generate(system.sampler, params, context, drawn_from(key), Sampling()))
    samples = np.asarray(draw(jax.random.key(0))) @ 2 ** np.arange(length)[::-1]
    assert stats.chisquare(np.bincount(samples, minlength=len(p)), count * p / p.sum()).pvalue > REJECT
    any_order = dataclasses.replace(system.objective, uniform=True)
    flat, _ = jax.jit(
        jax.vmap(functools.partial(parts_of_orders, dataclasses.replace(system, objective=any_order), params))
    )(everything)
    other = np.exp(np.asarray(flat, np.float64)).sum(axis=1)
    assert stats.chisquare(np.bincount(samples, minlength=len(p)), count * other / other.sum()).pvalue < REJECT

    bounds = np.asarray((jnp.exp(log_q) * (joint - log_q)).sum(axis=1), np.float64)
    assert (bounds < np.log(p)).all()
    batch = {"tokens": jnp.broadcast_to(everything[1][None], (2000, length)), "label": jnp.full(2000, LABEL)}
    drawn = np.asarray(jax.jit(system.log_prob)(params, batch, jax.random.key(1)), np.float64)
    assert abs(drawn.mean() - bounds[1]) < 4 * drawn.std() / len(drawn) ** 0.5


def test_the_order_that_pays_is_learned() -> None:
    """Three equal bits, and a network that reads to the left only: whoever draws the leftmost one first pays for it alone.

    Drawn evenly, the k-th from the left comes before all that it could read in one order of k, and then costs log 2. The start
    is random: an order that means something else is unlearned first.
    """
    backwards = dict(kind="neighborhood", num_heads=2, kernel_size=3, causal_axes=True)
    system = system_of("symmetric", model__mixer=backwards, model__num_layers=1, **OWN)
    made = cases.tiny_params(system)
    kept = {"tokenizer": made.pop("tokenizer")}
    optimizer = optax.adam(1e-2)
    bits = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32)[:, None] % 2, (64, 3))
    batch = {"tokens": bits, "label": jnp.full(64, LABEL)}

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        gradient = jax.grad(lambda p: system.loss(p | kept, batch, key, jnp.float32(0))[0])(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def learned(keys: jax.Array) -> jax.Array:
        (params, _), _ = jax.lax.scan(step, (made, optimizer.init(made)), keys)
        return jax.vmap(lambda values: bound_of(system, params | kept, values))(bits[:2])

    bound = float(learned(jax.random.split(jax.random.key(1), 300)).mean())
    assert -1.1 * np.log(2) < bound < -np.log(2)  # evenly drawn at best -(1 + 1/2 + 1/3) log 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(order="raster"), "set config.order.kind='random' without num_steps"),
        (dict(order="random, in sets"), "set config.order.kind='random' without num_steps"),
        (dict(head=dict(kind="categorical")), "set config.head.confidence='policy'"),
        (dict(objective=dict(kind="learned_order", num_orders=1)), "num_orders=1 must be at least 2"),
        (OWN | dict(objective=dict(kind="masked")), "config.posterior is the network that draws the orders"),
        (dict(posterior=dict(mixer=dict(kind="linear"))), "mixer 'linear' reads earlier tokens only"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        cases.tiny.__wrapped__(side=2, levels=2, **LEARNED | {"sampling": {}} | changes)
