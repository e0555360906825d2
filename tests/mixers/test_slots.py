"""Attention to slots: what it keeps, and wrong options."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens


def test_grouped_heads_share_their_slots() -> None:
    def numbers(shared: int) -> int:
        mixer = MIXERS["slots"](embed_dim=16, num_heads=4, num_kv_heads=shared, num_slots=5)
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: mixer.init_state(1, 1000, 1))))

    assert numbers(4) == 4 * numbers(1) == 4 * 5 * (4 + 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=8"),
        (dict(num_heads=2, num_kv_heads=4), "num_kv_heads=4 does not divide num_heads=2"),
        (dict(write="gate"), "write='gate' is unknown. Did you mean 'gated'"),
        (dict(feature_map="square"), "feature_map='square' changes the width"),
        (dict(rope_base=1e4, head_dim=3), "head_dim=3 is odd"),
    ],
)
def test_options_that_do_not_fit_are_told(fields: dict[str, Any], message: str) -> None:
    index = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UsageError, match=message):
        MIXERS["slots"](embed_dim=8, **fields).init(
            jax.random.key(0), jnp.zeros((1, 1, 8)), Tokens(index, index[..., None], 1)
        )
