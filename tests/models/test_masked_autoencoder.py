"""MAR, masked and causal: what is drawn set by set, or token by token, is what the network says of what was drawn before."""

from __future__ import annotations

from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from ar_jax.config import get_config
from ar_jax.data.protocol import Facts
from ar_jax.models.generator import Context
from ar_jax.orders.random import cosine_sizes
from ar_jax.sampling.loop import both_branches, drawn_from
from ar_jax.system import System, from_config
from ar_jax.training.paths import named_leaves

CONFIG = Path(__file__).parents[2] / "configs/mar.py"
GARBAGE = 7.0


def system_of(variant: str) -> System:
    config = get_config(f"{CONFIG}:{variant}")
    config.head.num_sampling_steps = 3
    return from_config(config, Facts("image", (8, 8, 1), 17, tuple("0123456789")))


@pytest.mark.parametrize("variant", ["smoke", "causal_smoke"])
def test_each_set_is_a_guided_diffusion_given_the_sets_before_and_nothing_else(variant: str) -> None:
    """S066: random sets of cosine sizes by bidirectional attention, or raster by causal attention and a cache."""
    system, batch = system_of(variant), 2
    model, params, labels = system.sampler, cases.tiny_params(system), jnp.asarray([1, 2])
    sizes = model.step_sizes
    assert sizes == (tuple(cosine_sizes(16, 8)) if variant == "smoke" else (1,) * 16)
    assert model.order.shuffled == (variant == "smoke") and model.feed.remembers == (variant != "smoke")
    slots = model.order.slots(jax.random.key(0), batch)
    context, noise = Context(slots, labels, jnp.zeros(batch, bool)), drawn_from(jax.random.key(1))
    drawing = system.drawing()
    drawn = jax.jit(system.sample_in_order, static_argnums=2)(params, context, noise, drawing)
    assert drawing.guidance_scales is not None and np.ptp(drawing.guidance_scales) > 0.1 and float(jnp.ptp(drawn)) > 0.5

    def again(params: dict, start: jax.Array, step: int, num_seen: jax.Array) -> jax.Array:
        """The step's tokens [B, n, C], where the slots of all ranks from `num_seen` on hold garbage."""
        rank = jnp.argsort(slots, axis=1)[..., None]
        seen = jnp.where(rank < num_seen, drawn, GARBAGE)
        chunk = model.feed.parallel() if model.feed.remembers else model.feed.chunks[step]
        hidden, _ = model.read(params, jnp.concatenate([seen, seen]), both_branches(context), chunk)
        hidden = chunk.pick(hidden)
        if model.feed.remembers:
            hidden = jax.lax.dynamic_slice_in_dim(hidden, start, 1, axis=1)
        asked = jnp.zeros((batch, hidden.shape[1]), jnp.int32)
        scale = jnp.asarray(drawing.guidance_scales)[step]
        return model.ask(params, "sample", hidden[:batch], noise(step, asked), drawing.filters, hidden[batch:], scale)

    one = jax.jit(again) if model.feed.remembers else jax.jit(again, static_argnums=2)
    by_rank = np.take_along_axis(np.asarray(drawn), np.asarray(slots)[..., None], axis=1)
    starts = np.cumsum(sizes) - sizes
    for step in range(len(sizes)) if model.feed.remembers else (0, 3, 7):
        wanted = by_rank[:, starts[step] : starts[step] + sizes[step]]
        found = np.asarray(one(params, starts[step], step, starts[step]))[:, : sizes[step]]
        np.testing.assert_allclose(
            found, wanted, rtol=1e-3, atol=1e-3
        )  # float32; each step divides by its noise's size
    start = starts[-1]
    less = np.asarray(one(params, start, len(sizes) - 1, start - 1))[:, : sizes[-1]]  # another token before it
    assert np.abs(less - by_rank[:, start:]).max() > 1e-2


def test_the_causal_baseline_has_the_published_size() -> None:
    """Sec. 4.2: 32 blocks of width 1024, about 400M parameters."""
    config = get_config(f"{CONFIG}:causal_l")
    system = from_config(config, published.facts_of(config))
    leaves = named_leaves(jax.eval_shape(system.init, jax.random.key(0)))
    layers = sum(leaf.size for name, leaf in leaves.items() if name.startswith("generator/decoder"))
    assert abs(layers - 400e6) < 5e6 and len(system.sampler.feed.chunks) == 256
