"""Attention to slots in chunks is its equation, token by token, for decays of any strength."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.slot_attention import Slots, slot_attention

BATCH, LENGTH, HEADS, SHARED, KEYS, VALUES, SLOTS = 2, 37, 4, 2, 3, 5, 4


def token_by_token(q: Any, k: Any, v: Any, write: Any, log_decay: Any, slots: Slots) -> tuple[Any, Slots]:
    """The equation, query heads repeated."""
    each = HEADS // SHARED

    def step(slots: Slots, now: Any) -> tuple[Slots, Any]:
        q, k, v, write, log_decay = now
        keep = jnp.exp(log_decay)
        keys = slots.keys * keep[:, :, None] + k[..., None] * write[:, :, None]
        values = slots.values * keep[..., None] + write[..., None] * v[:, :, None]
        share = jax.nn.softmax(jnp.einsum("bnh,bnhm->bnm", q, jnp.repeat(keys, each, 1)), axis=-1)
        return Slots(keys, values), jnp.einsum("bnm,bnme->bne", share, jnp.repeat(values, each, 1))

    slots, out = jax.lax.scan(step, slots, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (q, k, v, write, log_decay)))
    return jnp.swapaxes(out, 0, 1), slots


@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_chunks_are_the_equation_in_value_and_gradient(strength: float) -> None:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = [(HEADS, KEYS), (SHARED, KEYS), (SHARED, VALUES)]
    q, k, v = (jax.random.normal(next(keys), (BATCH, LENGTH, *shape)) for shape in shapes)
    write, fade = (jax.random.uniform(next(keys), (BATCH, LENGTH, SHARED, SLOTS)) for _ in range(2))
    start = Slots(*(jax.random.normal(next(keys), (BATCH, SHARED, *s)) for s in ((KEYS, SLOTS), (SLOTS, VALUES))))
    args = (q, k, v, write, -strength * fade, start)
    cotangent = jax.random.normal(next(keys), (BATCH, LENGTH, HEADS, VALUES))

    def chunked(*args: Any) -> Any:
        return slot_attention(*args[:5], slots=args[5])

    def both(function: Any) -> Any:
        def loss(*args: Any) -> Any:
            out, slots = function(*args)
            return (out * cotangent).sum() + slots.keys.sum() + slots.values.sum(), (out, slots)

        return jax.jit(jax.grad(loss, argnums=tuple(range(6)), has_aux=True))(*args)

    # Float32, sums of 37 terms, some of gradients larger than 10.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4, rtol=1e-4), both(chunked), both(token_by_token)
    )
