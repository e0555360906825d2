"""Select and pack: packing under static shapes, nothing lost without a word, and a gate that labels supervise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.mixers.select_and_pack import pack, selection_labels, selection_loss

BATCH, LENGTH, DIM = 3, 6, 8


def tokens(length: int) -> Tokens:
    index = jnp.zeros((1, length), jnp.int32)
    return Tokens(index, index[..., None], length)


def made(**fields: Any) -> tuple[Any, Any, jax.Array]:
    mixer = MIXERS["select_and_pack"](embed_dim=DIM, num_heads=2, **fields)
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, DIM))
    params = jax.jit(lambda x: mixer.init(jax.random.key(1), x, tokens(LENGTH)))(x)["params"]
    select = params["select"] | {"bias": jnp.zeros(1)}
    return mixer, params | {"select": select}, x


def test_each_example_reads_its_own_chosen_tokens_however_many_they_are() -> None:
    mixer, params, x = made()
    out = jax.jit(lambda p, x: mixer.apply({"params": p}, x, tokens(LENGTH))[0])(params, x)
    gate = np.asarray(x @ params["select"]["kernel"])[..., 0]
    counts = (gate > 0).sum(axis=1)
    assert len(set(counts.tolist())) > 1
    q, k, v = (np.asarray(x @ params[n]["kernel"]).reshape(BATCH, LENGTH, 2, -1) for n in ("query", "key", "value"))
    for b in range(BATCH):
        chosen = np.flatnonzero(gate[b] > 0)
        expected = np.zeros((LENGTH, DIM))
        for i in chosen:
            weight = np.exp(np.einsum("nh,jnh->nj", q[b, i], k[b, chosen]) / 2)
            read = np.einsum("nj,jnh->nh", weight / weight.sum(axis=1, keepdims=True), v[b, chosen]).reshape(-1)
            expected[i] = read / (1 + np.exp(-gate[b, i])) @ params["out"]["kernel"]
        np.testing.assert_allclose(out[b], expected, atol=1e-5)  # float32, sums of a few terms


def test_what_finds_no_room_is_counted() -> None:
    chosen = jnp.asarray([[True, False, True], [True, True, False]])
    owner = jnp.asarray([[0, 0, 0], [3, 3, 3]])
    found = pack(chosen, owner, 3)
    np.testing.assert_array_equal(found.index, [0, 2, 3])
    np.testing.assert_array_equal(found.owner, [0, 0, 3])
    assert found.left_out == 1
    roomy = pack(chosen, owner, 6)
    np.testing.assert_array_equal(roomy.index, [0, 2, 3, 4, 6, 6])
    np.testing.assert_array_equal(roomy.owner, [0, 0, 3, 3, -1, -1])
    assert roomy.left_out == 0


def test_the_share_that_was_left_out_is_told_with_the_parameters() -> None:
    """By the gradient of the statistic, which is its change; see `ar_jax.mixers.common.statistics`."""
    for capacity, positive in ((1.0, False), (0.2, True)):
        mixer, params, x = made(capacity=capacity)
        gradient = jax.jit(jax.grad(lambda p, m=mixer, x=x: m.apply({"params": p}, x, tokens(LENGTH))[0].sum()))(params)
        assert (gradient["statistics"]["left_out"] > 0) == positive


def test_labels_from_boxes_teach_the_gate() -> None:
    boxes = jnp.asarray([[[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    labels = selection_labels(boxes, (2, 3))
    np.testing.assert_array_equal(labels, [[True, True, True, False, False, False]])
    mixer, params, x = made()
    labels = jnp.broadcast_to(labels, (BATCH, LENGTH)) & (x[..., 0] > 0)

    @jax.jit
    @jax.value_and_grad
    def loss(select: Any) -> jax.Array:
        return selection_loss(mixer.apply({"params": params | {"select": select}}, x, method="logits"), labels)

    select, first = params["select"], float(loss(params["select"])[0])
    for _ in range(60):
        select = optax.apply_updates(select, jax.tree.map(lambda g: -0.5 * g, loss(select)[1]))
    assert float(loss(select)[0]) < 0.7 * first


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(capacity=0.0), r"capacity=0.0 must lie in \(0, 1\]"), (dict(rate=1.0), "rate=1.0 in")],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(**fields)
