"""Lightweight and dynamic convolutions: the equation, sums of filters, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM, HEADS, WIDTH = 7, 6, 2, 5
bare: dict[str, Any] = dict(embed_dim=DIM, num_heads=HEADS, width=WIDTH, gated=False)


def mixed(x: np.ndarray, seed: int = 0, **fields: Any) -> tuple[np.ndarray, Any]:
    """Outputs [T, D] of one sequence, and the parameters."""
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    tokens = Tokens(index, index[..., None], len(x))
    mixer = MIXERS["lightweight_convolution"](**bare | fields)
    run = jax.jit(lambda x: mixer.init_with_output(jax.random.key(seed), x, tokens))
    (out, _), variables = run(jnp.asarray(x)[None])
    return np.asarray(out[0]), variables.get("params", {})


def sequence() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_each_head_sums_its_channels_with_the_softmax_of_its_filter(
    causal: bool, dynamic: bool, renormalize: bool
) -> None:
    x = sequence()
    out, params = mixed(x, causal=causal, dynamic=dynamic, renormalize=renormalize)
    ahead = 0 if causal else WIDTH - 1 - WIDTH // 2
    for t in range(LENGTH):
        logits = (x[t] @ params["logits"]["kernel"]).reshape(WIDTH, HEADS) if dynamic else params["filters"]
        for head in range(HEADS):
            weight = np.exp(logits[:, head])
            taps = [(w, t + ahead - j) for j, w in enumerate(weight) if 0 <= t + ahead - j < LENGTH]
            total = sum(w for w, _ in taps) if renormalize else weight.sum()
            channels = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
            expected = sum(w * x[s, channels] for w, s in taps) / total
            np.testing.assert_allclose(out[t, channels], expected, atol=1e-5)  # float32, sums of five terms


def test_renormalized_filters_keep_a_constant_up_to_the_ends() -> None:
    ones = np.ones((LENGTH, DIM), np.float32)
    np.testing.assert_allclose(mixed(ones, renormalize=True, dynamic=True)[0], 1, atol=1e-6)  # a division of equals
    assert mixed(ones)[0][0].max() < 0.9


def test_interleaved_heads_are_a_permutation_of_the_channels() -> None:
    x, place = sequence(), np.arange(DIM).reshape(HEADS, -1).T.reshape(-1)
    interleaved, contiguous = mixed(x[:, place], interleaved_heads=True)[0], mixed(x)[0]
    np.testing.assert_array_equal(interleaved, contiguous[:, place])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(width=1), "width=1 must be at least 2"),
        (dict(num_heads=4), "num_heads=4 does not divide embed_dim=6"),
        (dict(in_proj=True), "in_proj belongs to dynamic filters"),
        (dict(softmax=False, renormalize=True), "renormalize needs filters that sum to one"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(sequence(), **fields)
