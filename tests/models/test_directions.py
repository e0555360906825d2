"""What a token is told of its way: coordinates of its own place and of the next, and the direction (DAR, S196)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data.protocol import Facts
from ar_jax.models.generator import Generator
from ar_jax.orders import ORDERS
from ar_jax.orders.protocol import Order
from ar_jax.system import System, from_config

VQ = dict(kind="vq", vocab_size=11, channels=5, l2_norm=False)
CONV = dict(kind="autoencoder", hidden_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4)


def system(order: dict[str, Any], **tokenizer: Any) -> System:
    """Images of 6 x 6 as 3 x 3 codes, or whatever the tokenizer makes of them."""
    model = dict(embed_dim=32, num_layers=2, adaln="block", learned_positions=False, target_positions=False)
    model |= dict(
        target_axes=True, direction_modulation=True, codebook_inputs=True, mixer=dict(num_heads=2, kind="softmax")
    )
    config = dict(tokenizer=CONV | {"quantizer": VQ} | tokenizer, order=order, model=model)
    return from_config(config, Facts("image", (6, 6, 3), 256, ("a", "b")))


def drawn(made: System) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes)


def fed(made: System, params: Any, method: str, *arguments: Any) -> Any:
    return made.model.generator.apply({"params": params["generator"]}, *arguments, method=method)


def test_a_zigzag_of_diagonals_never_jumps() -> None:
    order: Order = ORDERS["diagonal"](((4, 5),), zigzag=True)
    cells = order.position[np.argsort(order.step)]
    assert np.abs(np.diff(cells, axis=0)).max() == 1 and (np.diff(cells.sum(axis=1)) >= 0).all()
    np.testing.assert_array_equal(cells[:6], [[0, 0], [0, 1], [1, 0], [2, 0], [1, 1], [0, 2]])


def test_tokens_know_their_own_place_the_next_one_and_the_direction() -> None:
    made = system(dict(kind="diagonal", zigzag=True))
    params, chunk = drawn(made), made.model.feed.parallel()
    context = made.model.context(None, 1, jnp.zeros(1, jnp.int32))

    def tokens_of(generator: Generator, content: Any) -> Any:
        return generator._embed(content, context.slots, generator.condition(None, context.drop), chunk)[1]

    position = made.model.generator.apply(
        {"params": params["generator"]}, jnp.zeros((1, len(chunk), 5)), method=tokens_of
    ).position[0]
    np.testing.assert_array_equal(position[:4], [[-1, -1, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 2, 0]])
    way = np.asarray(fed(made, params, "_direction", chunk, context.slots))[0]
    right, down_left, down, up_right = way[1:5]
    assert way[0] == 9 and len({right, down_left, down, up_right, 9}) == 5
    np.testing.assert_array_equal(way[5:9], [up_right, down, down_left, right])


def test_inputs_are_the_codebooks_vectors_and_the_codebook_is_not_trained() -> None:
    made = system(dict(kind="raster"))
    params = drawn(made)
    assert params["generator"]["value_embed"]["kernel"].shape == (5, 32)
    assert made.frozen("tokenizer/quantizer/codebook/embedding")
    values = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    context, chunk = made.model.context(None, 1, jnp.zeros(1, jnp.int32)), made.model.feed.parallel()
    table = params["tokenizer"]["quantizer"]["codebook"]
    swapped = {"embedding": table["embedding"][jnp.asarray([0, 2, 1, *range(3, 11)])]}
    quantizer = params["tokenizer"]["quantizer"] | {"codebook": swapped}
    other = params | {"tokenizer": params["tokenizer"] | {"quantizer": quantizer}}
    read = jax.jit(lambda p, v: made.model.read(p, v, context, chunk)[0])
    exchanged = jnp.asarray([[2, 1, 3, 4, 5, 6, 7, 8, 9]])
    np.testing.assert_allclose(read(other, exchanged), read(params, values), atol=1e-5)  # the same vectors are fed
    assert jnp.abs(read(params, exchanged) - read(params, values)).max() > 0.01


@pytest.mark.parametrize(
    "quantizer", [VQ | dict(kind="residual_vq", depth=2), dict(kind="kl", channels=4)], ids=["residual_vq", "kl"]
)
def test_a_tokenizer_whose_tokens_have_no_vector_of_their_own_is_refused(quantizer: dict[str, Any]) -> None:
    quantizer = {k: v for k, v in quantizer.items() if k != "l2_norm"}
    with pytest.raises(UsageError, match="needs a tokenizer with one vector for each token"):
        system(dict(kind="raster"), quantizer=quantizer)
