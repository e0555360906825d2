"""OAR (S175): a network that was trained in any order tells where and what, and is trained on in its own orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax.config import UsageError
from ar_jax.data.pipeline import test_batches as batches_of
from ar_jax.data.token_shards import load_token_shards
from ar_jax.distill_orders import distill_orders
from ar_jax.heads.protocol import Sampling
from ar_jax.models.generator import Context
from ar_jax.run import load_data
from ar_jax.sampling.likelihood import teacher_forced
from ar_jax.sampling.loop import drawn_from, generate
from ar_jax.sampling.own_order import own_order
from ar_jax.system import System

CONFIG = Path(__file__).parents[2] / "configs/oar.py:smoke"
BATCH = 3


def system_of(**changes: Any) -> System:
    return cases.tiny.__wrapped__(
        order="random",
        feed="query",
        head=dict(kind="categorical", confidence="log_probability"),
        sampling=dict(order=dict(kind="random", adaptive=True)),
        **changes,
    )


def log_probs(system: System, params: Any, values: jax.Array, slots: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """log p of each token [B, L], and of the likeliest in its place, in an order; by one pass over the whole."""
    context = Context(slots, jnp.arange(len(values)) % 3, jnp.zeros(len(values), bool))
    hidden, target = teacher_forced(system.model, system.model.feed.parallel(), params, values, context)
    logits = jax.nn.log_softmax(system.model.ask(params, "__call__", hidden))
    return np.asarray(jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]), np.asarray(logits.max(axis=-1))


def context_of(system: System, seed: int = 0) -> Context:
    return system.sampler.context(jax.random.key(seed), BATCH, jnp.arange(BATCH) % 3)


def test_an_own_order_is_the_one_that_a_search_finds() -> None:
    """Step by step the place whose token is likeliest, each found by passes over whole sequences."""
    system = system_of()
    params, values = cases.tiny_params(system), cases.tokens(system, BATCH)
    find = jax.jit(lambda context: own_order(system.sampler, params, values, context))
    found, again = np.asarray(find(context_of(system))), np.asarray(find(context_of(system, 5)))
    np.testing.assert_array_equal(found, again)  # wherever the search starts
    length = found.shape[1]
    whole = jax.jit(lambda slots: teacher_forced_nats(system, params, values, slots))
    slots = np.tile(np.arange(length), (BATCH, 1))
    for rank in range(length - 1):
        nats = np.full((BATCH, length), -np.inf)
        for other in range(rank, length):
            tried = slots.copy()
            tried[:, [rank, other]] = tried[:, [other, rank]]
            nats[:, other] = np.asarray(whole(tried))[:, rank]
        best = nats.argmax(axis=1)
        rows = np.arange(BATCH)
        slots[rows, rank], slots[rows, best] = slots[rows, best], slots[rows, rank].copy()
    np.testing.assert_array_equal(found, slots)
    assert len(np.unique(found, axis=0)) == BATCH


def teacher_forced_nats(system: System, params: Any, values: jax.Array, slots: jax.Array) -> jax.Array:
    """log p of each token [B, L], in an order."""
    context = Context(jnp.asarray(slots), jnp.arange(BATCH) % 3, jnp.zeros(BATCH, bool))
    hidden, target = teacher_forced(system.model, system.model.feed.parallel(), params, values, context)
    return system.model.ask(params, "log_prob", hidden, target)


def test_samples_are_generated_where_the_network_is_surest() -> None:
    """At temperature 0 each token is the likeliest of all places, so the own order of a sample is that of its generation."""
    system = system_of()
    params = cases.tiny_params(system)
    context, still = context_of(system), Sampling(np.float32(0), confidence_temperature=np.float32(0))
    drawn = jax.jit(lambda: generate(system.sampler, params, context, drawn_from(jax.random.key(1)), still))()
    slots = jax.jit(lambda: own_order(system.sampler, params, drawn, context))()
    nats, best = log_probs(system, params, drawn, slots)
    np.testing.assert_allclose(nats, best, atol=1e-4)  # nothing likelier stands anywhere in the order
    other, likeliest = log_probs(system, params, drawn, context.slots)
    assert (other < likeliest - 1e-3).any() or (np.asarray(slots) == np.asarray(context.slots)).all()


def test_given_tokens_come_first() -> None:
    system = system_of()
    params = cases.tiny_params(system)
    values, mask = cases.tokens(system, BATCH), jnp.zeros((BATCH, 9), bool).at[:, 4:6].set(True)
    drop, label = jnp.zeros(BATCH, bool), jnp.arange(BATCH)
    given = ar_jax.sampling.loop.Given(values, mask)
    made = jax.jit(system.sample)(params, jax.random.key(0), label, drop, system.drawing(), given)
    np.testing.assert_array_equal(made[:, 4:6], values[:, 4:6])


def test_a_batch_that_brings_orders_is_trained_in_them() -> None:
    system = system_of(condition__guidance_dropout_rate=0.0)
    params, values = cases.tiny_params(system), cases.tokens(system, BATCH)
    slots = jax.random.permutation(
        jax.random.key(3), jnp.tile(jnp.arange(9)[None], (BATCH, 1)), axis=1, independent=True
    )
    batch = {"tokens": values, "label": jnp.arange(BATCH), "slots": slots}
    loss = jax.jit(lambda batch, key: system.loss(params, batch, key, jnp.float32(0))[0])
    expected = -log_probs(system, params, values, slots)[0].mean()
    for seed in range(2):  # there is nothing left to draw
        np.testing.assert_allclose(loss(batch, jax.random.key(seed)), expected, rtol=1e-5)
    del batch["slots"]
    assert abs(float(loss(batch, jax.random.key(0))) - expected) > 1e-3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: cases.tiny(order="raster").model.dealt(jnp.zeros((2, 9), int)), "set config.order.kind='random'"),
        (lambda: system_of().model.dealt(jnp.zeros((2, 8), int)), "an order of 8 tokens"),
        (lambda: own_order(system_of().model, {}, jnp.zeros((2, 9), int), context_of(system_of())), "adaptive=True"),
    ],
)
def test_orders_that_do_not_fit_are_told(make: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()


@pytest.mark.slow
def test_training_on_in_its_own_orders_makes_a_network_surer_in_them(tmp_path: Path) -> None:
    """The whole way, on crops of 4 x 4 pixels: any order, its own orders of all images, and on in these.

    It is surer than one that was trained on as long in any order.
    """
    config = ar_jax.get_config(CONFIG)
    config.data = dict(kind="crops", height=4, width=4, shrink=8)
    config.tokenizer = dict(kind="pixels", levels=4)
    config.train.update(num_steps=60, batch_size=32)
    config.checkpoint.every_steps = 60
    config.mesh = dict(data=1)
    first = ar_jax.train(config, tmp_path / "any")
    distill_orders(first, load_data(config), tmp_path / "orders")

    crops = config.data
    config = ar_jax.get_config(CONFIG.with_name("oar.py:smoke_tuned"))
    config.tokenizer = dict(kind="pixels", levels=4)
    config.data.path = str(tmp_path / "orders")
    config.train.update(num_steps=60, batch_size=32, init_from=str(tmp_path / "any"))
    config.checkpoint.every_steps = 60
    config.mesh = dict(data=1)
    tuned = ar_jax.train(config, tmp_path / "tuned")
    config.data = crops
    longer = ar_jax.train(config, tmp_path / "longer")

    data = load_token_shards(str(tmp_path / "orders"))
    batch = {k: jnp.asarray(v) for k, v in next(iter(batches_of(data, len(data.test)))).items() if k != "weight"}
    assert (np.sort(batch["slots"], axis=1) == np.arange(16)).all()
    nats = [-log_probs_of(run, batch).mean() for run in (first, longer, tuned)]
    drawn = dict(batch, slots=first.system.model.order.slots(jax.random.key(0), len(batch["slots"])))
    shuffled = -log_probs_of(first, drawn).mean()
    assert nats[2] < nats[1] and nats[0] < shuffled, (nats, shuffled)


def log_probs_of(run: Any, batch: dict[str, jax.Array]) -> np.ndarray:
    """log p of held-out tokens [B, L], in the orders of the batch."""
    context = Context(batch["slots"], batch["label"], jnp.zeros(len(batch["label"]), bool))
    model = run.system.model
    hidden, target = teacher_forced(model, model.feed.parallel(), run.params, batch["tokens"], context)
    return np.asarray(model.ask(run.params, "log_prob", hidden, target))
