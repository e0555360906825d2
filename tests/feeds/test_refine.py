"""Coarse to fine: which network is fed what, what an image costs, and that its likelihood is that of both networks."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError, build, get_config
from ar_jax.data.protocol import Facts
from ar_jax.feeds import FEEDS
from ar_jax.feeds.protocol import NOWHERE, prefix_source
from ar_jax.objectives.next_token import NextToken
from ar_jax.orders import ORDERS
from ar_jax.sampling.loop import walk
from ar_jax.system import System, compiled, from_config

FACTS = Facts("image", (2, 2, 1), 4, ("a", "b"))
FIRST = dict(embed_dim=16, num_layers=2, mlp_dim=24, target_positions=False, mixer=dict(kind="softmax", num_heads=2))
P = prefix_source(0)


def system(**changes: Any) -> System:
    """Two networks of different widths on 2 x 2 pixels of 4 levels: a coarse and a fine bit each."""
    config: dict[str, Any] = {
        "tokenizer": dict(kind="pixels", depth=2),
        "order": dict(kind="coarse_to_fine"),
        "feed": dict(kind="refine"),
        "condition": dict(kind="class"),
        "model": FIRST,
        "refiner": FIRST | dict(embed_dim=24, num_layers=1),
    }
    return from_config(config | changes, FACTS)


@functools.cache
def plain() -> System:
    """One for several tests, so that they share its parameters."""
    return system()


def test_the_first_network_is_fed_what_it_drew_and_the_second_all_of_it_at_once() -> None:
    order = build(ORDERS, dict(kind="coarse_to_fine"), "order", layout=((1, 3, 2),))
    feed = FEEDS["refine"](order, 1)
    found = [tuple(a.tolist() for a in (c.source, c.place, c.target)) for c in feed.chunks]
    assert found == [
        ([P], [NOWHERE], [0]),
        ([0], [0], [1]),
        ([1], [1], [2]),
        ([P, 0, 1, 2], [NOWHERE, 0, 1, 2], [NOWHERE, 3, 4, 5]),
    ]
    assert [c.part for c in feed.chunks] == [0, 0, 0, 1] and [c.num_remembered for c in feed.chunks] == [1, 1, 1, 0]
    assert feed.max_len == 3 and feed.place_axes == 2
    assert order.slots(None, 1)[0].tolist() == [0, 2, 4, 1, 3, 5]


def test_an_image_takes_one_evaluation_for_each_place_and_one_more() -> None:
    """Their table 2: 256 + 1 network evaluations an image, of which the last is the refining network's alone."""
    config = get_config("configs/ctf.py:b")
    facts = Facts("image", (256, 256, 3), 256, tuple(map(str, range(1000))))
    made = from_config(config, facts)
    assert len(made.model.feed.chunks) == 256 + 1 and made.model.step_sizes == (1,) * 256 + (256,)
    assert [len(run.target) for _, run in made.model.feed.runs()] == [256, 1]  # one scan, and the last step
    assert made.tokenizer.vocab_sizes == (512, 16384) and made.tokenizer.layout == ((16, 16, 2),)


def test_sizes_are_the_published_ones() -> None:
    """Table 1 and 2: 87M + 343M, 310M + 343M and 734M + 343M. The refining network embeds labels where LlamaGen does codes."""
    facts = Facts("image", (256, 256, 3), 256, tuple(map(str, range(1000))))
    for variant, stated in (("b", 87), ("l", 310), ("xl", 734)):
        shapes = jax.eval_shape(
            from_config(get_config(f"configs/ctf.py:{variant}"), facts).model.init, jax.random.key(0)
        )
        first, second = (
            sum(leaf.size for leaf in jax.tree.leaves(shapes["generator"][part])) for part in ("first", "second")
        )
        assert round(first / 1e6) == stated
        assert second + (16384 - 512) * 1024 == 342_910_976


def test_what_is_drawn_step_by_step_is_what_the_whole_sequence_says() -> None:
    """Law 2, for both networks: logits of the parallel form are those of the steps, with a cache in the first network."""
    made = plain()
    model, params = made.model, cases.tiny_params(made)
    values, context = cases.tokens(made, 2), model.context(None, 2, jnp.asarray([0, 1], jnp.int32))
    chunk = model.feed.parallel()

    def at_once() -> jax.Array:
        return model.ask(params, "__call__", chunk.pick(model.read(params, values, context, chunk)[0]))

    def one_step(carry: Any, step: Any, chunk: Any) -> Any:
        state, out = carry
        hidden, state = model.read(params, values, context, chunk, state)
        logits = model.ask(params, "__call__", chunk.pick(hidden), part=chunk.part)
        return state, out.at[:, chunk.answers].set(logits)

    start = model.generator.decoder.init_state(2, model.feed.max_len, model.feed.max_step_len)
    stepwise, together = jax.jit(lambda: (walk(model.feed, one_step, (start, jnp.zeros((2, 8, 2))))[1], at_once()))()
    np.testing.assert_allclose(stepwise, together, atol=1e-5)  # float32, two layers
    assert float(jnp.abs(together - together[:, :1]).max()) > 0.1


def test_coarse_codes_do_not_know_fine_ones_and_fine_ones_know_all_coarse_ones_and_no_other() -> None:
    made = plain()
    model, params = made.model, cases.tiny_params(made)
    context, chunk = model.context(None, 1, jnp.zeros(1, jnp.int32)), model.feed.parallel()

    @jax.jit
    def nats(values: jax.Array) -> jax.Array:
        """[L] log-probabilities of token 0, by rank."""
        return model.ask(params, "__call__", chunk.pick(model.read(params, values, context, chunk)[0]))[0, :, 0]

    values = cases.tokens(made, 1)
    slots = np.asarray(context.slots[0])
    moved = np.stack([np.abs(nats(values.at[0, s].set(1 - values[0, s])) - nats(values)) > 1e-6 for s in slots])
    count = len(slots) // 2
    expected = np.zeros((2 * count, 2 * count), bool)
    expected[:count, :count] = np.triu(np.ones((count, count), bool), 1)
    expected[:count, count:] = True
    np.testing.assert_array_equal(moved, expected)


def test_the_likelihood_is_a_distribution_and_samples_have_it() -> None:
    """All 2^8 pictures of two bits a pixel: probabilities sum to one; 4000 samples come as often as these say."""
    made = plain()
    params = cases.tiny_params(made)
    every = (np.arange(256)[:, None] >> np.arange(8)) & 1
    label = jnp.zeros(256, jnp.int32)
    nats = compiled(made.log_prob)(params, {"tokens": jnp.asarray(every, jnp.int32), "label": label}, jax.random.key(0))
    np.testing.assert_allclose(np.exp(nats).sum(), 1.0, rtol=1e-5)
    count, drawing = 4000, made.drawing(guidance_scale=1.0)
    drawn = jax.jit(made.sample)(
        params, jax.random.key(1), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool), drawing
    )
    numbers = (np.asarray(drawn) << np.arange(8)).sum(axis=1)
    found, expected = np.bincount(numbers, minlength=256) / count, np.asarray(np.exp(nats))
    assert (
        np.abs(found - expected).sum() < 0.25
    )  # of a sample of itself: 0.17 for 256 outcomes as likely as one another


def test_the_first_network_is_not_paid_for_fine_codes() -> None:
    """A thousandfold more fine codes add to the last step alone: less than a tenth of the whole."""

    def cost(fine: int) -> int:
        quantizer = dict(kind="vq", vocab_size=fine, channels=2, num_clusters=8)
        tokenizer = dict(
            kind="autoencoder", quantizer=quantizer, hidden_channels=8, channel_multipliers=(1,), num_groups=4
        )
        made = from_config(
            {"tokenizer": tokenizer, "order": dict(kind="coarse_to_fine"), "feed": dict(kind="refine"), "model": FIRST}
            | {"refiner": FIRST},
            Facts("image", (4, 4, 1), 4),
        )
        shapes = jax.eval_shape(made.init, jax.random.key(0))
        drop, drawing = jnp.ones(1, bool), made.drawing()
        return flops(lambda p, k: made.sample(p, k, None, drop, drawing), shapes, jax.random.key(0))

    head = 2 * 16 * 16  # a product for each code, of 16 numbers, at 16 places
    assert 0 < cost(1032) - cost(8) < 1.5 * head * 1024


def test_guidance_steers_both_networks_and_both_are_trained() -> None:
    made = plain()
    params, label, drop = cases.tiny_params(made), jnp.zeros(64, jnp.int32), jnp.zeros(64, bool)
    draw = compiled(made.sample)
    unguided, guided = (
        draw(params, jax.random.key(0), label, drop, made.drawing(guidance_scale=scale)) for scale in (1.0, 4.0)
    )
    assert (unguided[:, ::2] != guided[:, ::2]).any() and (unguided[:, 1::2] != guided[:, 1::2]).any()
    values = cases.tokens(made, 4)
    loss = lambda p: NextToken()(made.model, p, values, jnp.zeros(4, jnp.int32), jax.random.key(0), jnp.zeros(()))[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)["generator"]
    for part in ("first", "second"):
        assert all(leaf.any() for leaf in jax.tree.leaves(gradient[part]["head"]))
        assert all(leaf.any() for leaf in jax.tree.leaves(gradient[part]["decoder"]))


@pytest.mark.parametrize("order", ["raster", "coarse_to_fine", "random", "blocks"])
def test_another_order_is_refused(order: str) -> None:
    made = build(ORDERS, dict(kind=order), "order", layout=((2, 3),))
    with pytest.raises(UsageError, match="feed 'refine' needs config.order.kind='coarse_to_fine'"):
        FEEDS["refine"](made, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(feed=dict(kind="query")), "config.refiner is the second network"),
        (dict(model=FIRST | dict(branch_layers=(1,))), "leave out branch_layers"),
        (dict(refiner=FIRST | dict(branch_layers=(1,))), "must be of kind 'decoder' with one output"),
        (dict(refiner=FIRST | dict(kind="block_transformer", target_positions=True)), "must be of kind 'decoder'"),
        (dict(refiner=FIRST | dict(layers=3)), "num_layers"),
        (
            dict(refiner=FIRST | dict(mixer=dict(kind="convolution", width=2))),
            "mixer 'convolution' reads earlier tokens only",
        ),
        (dict(head=dict(kind="categorical", tied=True)), "head that is not tied"),
        (dict(objective=dict(kind="permuted")), "feed 'refine' is trained on whole sequences"),
        (dict(objective=dict(kind="next_token", num_answers=2)), "leave out num_answers"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        system(**changes)


def test_a_second_network_that_is_missing_is_told() -> None:
    config = get_config("configs/ctf.py:smoke")
    del config.refiner
    with pytest.raises(UsageError, match="set both or neither"):
        from_config(config, Facts("image", (8, 8, 1), 17, ("a", "b")))
