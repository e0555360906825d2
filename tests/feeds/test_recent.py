"""Recent steps are read anew in every step: what is further back does not exist, and all steps at once say the same."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.feeds import FEEDS
from ar_jax.feeds.protocol import Chunk
from ar_jax.orders import ORDERS
from ar_jax.sampling.loop import walk


def test_only_the_last_steps_are_fed() -> None:
    order = build(ORDERS, dict(kind="raster"), "order", layout=((5,),))
    made = build(FEEDS, dict(kind="recent", num_steps=2), "feed", order=order, num_prefix=1)
    assert [chunk.source.tolist() for chunk in made.chunks] == [
        [-2, -1],
        [-2, 0, -1],
        [-2, 0, 1, -1],
        [-2, 1, 2, -1],
        [-2, 2, 3, -1],
    ]
    assert len(list(made.runs())) == 3  # all full windows are one scan


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_all_steps_at_once_give_the_outputs_of_each_alone(mixer: str) -> None:
    """Through two layers: had the steps read one another, the second would tell."""
    system = cases.tiny.__wrapped__(mixer, feed="recent", feed__num_steps=2)
    model, params, values = system.model, cases.tiny_params(system), cases.tokens(system, 2)
    context = model.context(None, 2, jnp.asarray([0, 2]))

    @jax.jit
    def outputs(params: Any, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = model.feed.parallel()
        at_once = whole.pick(model.read(params, values, context, whole)[0])

        def one(out: jax.Array, step: Any, chunk: Chunk) -> jax.Array:
            return out.at[:, chunk.answers].set(chunk.pick(model.read(params, values, context, chunk)[0]))

        return at_once, walk(model.feed, one, jnp.zeros_like(at_once))

    at_once, alone = outputs(params, values)
    np.testing.assert_allclose(at_once, alone, atol=1e-4)  # float32
    moved, _ = outputs(params, values.at[:, 3].add(1) % 3)
    changed = np.abs(np.asarray(moved - at_once)).max(axis=(0, 2)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5])


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UsageError, match="num_steps=-1"):
        cases.tiny(feed="recent", feed__num_steps=-1)
    with pytest.raises(UsageError, match="does not keep apart; set config.model.kind='decoder'"):
        cases.tiny(feed="recent", backbone="u_vit")
