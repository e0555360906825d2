"""The Block Transformer: blocks read blocks once a block, tokens read one block, and so caches are read far less."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers.protocol import NEVER, Tokens
from ar_jax.models.block_transformer import BlockTransformer, cache_bytes_per_token
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Decoder, mixer_pattern

DIM, BLOCK, LENGTH = 8, 4, 11
MIXERS = mixer_pattern(dict(kind="softmax", num_heads=2), embed_dim=DIM)
OPTIONS = BlockOptions(mlp_dim=8)


def model_of(num_prefix: int = 1, num_rows: int = LENGTH, **fields: Any) -> BlockTransformer:
    sizes: dict[str, Any] = {"num_layers": 1, "decoder_layers": 1, "block_length": BLOCK} | fields
    return BlockTransformer(DIM, MIXERS, OPTIONS, num_rows, num_prefix, MIXERS, **sizes)


def tokens_of(length: int, first: int = 0) -> Tokens:
    step = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length)


def cost_of_branches(jaxpr: Any) -> list[list[int]]:
    """FLOPs of both cases of every conditional whose cases cost differently, at any depth."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            branches = equation.params["branches"]
            costs = [flops(jax.extend.core.jaxpr_as_fun(case), *case.in_avals) for case in branches]
            found += [costs] if len(set(costs)) > 1 else []
        for value in equation.params.values():
            found += cost_of_branches(value.jaxpr) if hasattr(value, "jaxpr") else []
    return found


def test_a_token_reads_caches_of_blocks_once_a_block_and_of_its_own_block() -> None:
    """Half of the layers read S / L entries once for L tokens, the other half at most L + 1: 31 times fewer for L = 4."""
    model, length = model_of(num_layers=2, decoder_layers=2), 4096
    plain = Decoder(DIM, MIXERS, OPTIONS, num_layers=4)
    ratio = cache_bytes_per_token(plain, 2, length) / cache_bytes_per_token(model, 2, length)
    assert 0.9 * 2 * BLOCK**2 < ratio < 2 * BLOCK**2
    inner = [jax.eval_shape(lambda n=n: model.init_state(2, n, 1)).tokens for n in (length, 2 * length)]
    assert jax.tree.map(jnp.shape, inner[0]) == jax.tree.map(jnp.shape, inner[1])


def test_a_step_runs_the_block_decoder_only_where_a_block_is_full() -> None:
    def costs(num_layers: int) -> list[int]:
        model, x = model_of(num_layers=num_layers), jnp.zeros((1, 1, DIM))
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, LENGTH, DIM)), tokens_of(LENGTH)))
        state = jax.eval_shape(lambda: model.init_state(1, LENGTH, 1))
        step = functools.partial(lambda params, state: model.apply(params, x, tokens_of(1), None, state))
        (both,) = cost_of_branches(jax.make_jaxpr(step)(params, state).jaxpr)
        return sorted(both)

    (token, block), (same, blocks) = costs(1), costs(3)
    assert token == same and blocks > block + token


def test_padding_in_front_of_a_ragged_prompt_changes_nothing() -> None:
    """Three prompt tokens behind five of padding, one block of which is all padding, or behind one empty place."""
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, DIM))
    model, kept = model_of(num_prefix=3), LENGTH
    params = jax.jit(lambda x: model.init(jax.random.key(1), x, tokens_of(kept)))(x)
    padding = 5
    index = jnp.arange(kept + padding) - padding
    step = jnp.where(index < 0, NEVER, index)[None]
    wide = jnp.concatenate([jnp.full((2, padding, DIM), 100.0), x], axis=1)
    padded = Tokens(step, index[None, :, None], kept + padding, padded=True)
    longer = model_of(num_prefix=3 + padding, num_rows=kept + padding)
    expected = jax.jit(lambda x: model.apply(params, x, tokens_of(kept))[0])(x)[:, 2:]
    state = longer.init_state(2, kept + padding, kept)
    found = [jax.jit(lambda x, s: longer.apply(params, x, padded, None, s)[0])(wide, s) for s in (None, state)]
    np.testing.assert_allclose(found[0][:, padding + 2 :], expected, atol=1e-5)  # float32, sums of a few terms
    np.testing.assert_allclose(found[1][:, padding + 2 :], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__block_length=3), "block_length=3 must divide embed_dim=16"),
        (dict(model__strategy="sum"), "model.strategy='sum' is unknown"),
        (dict(model__strategy="summation", model__expansion=2), "to be added, block_length=4"),
        (dict(model__strategy="cross_attention", model__mixer=dict(kind="linear")), "needs config.model.decoder_mixer"),
        (dict(model__adaln="block"), "takes its condition as prefix tokens"),
        (dict(model__adaln="shared", model__side_by_side=True), "side_by_side needs norm_first=True"),
    ],
)
def test_what_blocks_do_not_have_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny.__wrapped__(backbone="block_transformer", **changes)


def test_queries_are_refused() -> None:
    system = cases.tiny(order="raster", feed="query", backbone="block_transformer")
    with pytest.raises(UsageError, match="set config.feed.kind='shift'"):
        jax.eval_shape(system.init, jax.random.key(0))
