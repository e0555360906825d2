"""AFT: its four variants by their sums, keys of any size, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

ROWS, LENGTH, DIM, WINDOW, HEADS = 9, 7, 4, 3, 2


def mixed(x: np.ndarray, **fields: Any) -> tuple[np.ndarray, Any]:
    """Outputs [T, D] with parameters of order one, and these."""
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    tokens = Tokens(index, index[..., None], len(x))
    mixer = MIXERS["aft"](**dict(embed_dim=DIM, num_rows=ROWS, window=WINDOW, num_heads=HEADS) | fields)
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), jnp.asarray(x)[None], tokens))
    draw = np.random.default_rng(1)
    variables = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(np.float32), shapes)
    out = jax.jit(lambda v, x: mixer.apply(v, x, tokens)[0][0])(variables, jnp.asarray(x)[None])
    return np.asarray(out), variables["params"]


def bias(p: Any, variant: str, causal: bool, channel: int, t: int, s: int) -> float:
    """w_ts by its definition."""
    if variant == "simple" or (variant != "full" and abs(t - s) >= WINDOW):
        return 0.0
    if variant == "full":
        return p["bias"][t, s]
    tap = t - s + (0 if causal else WINDOW - 1)
    if variant == "local":
        return p["bias"][t, tap]
    head = channel // (DIM // HEADS)
    raw = p["bias"][:, head]
    return p["gain"][head] * (raw[tap] - raw.mean()) / (raw.var() + 1e-6) ** 0.5 + p["offset"][head]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["full", "local", "conv", "simple"])
def test_each_channel_averages_its_values_by_keys_and_biases(variant: str, causal: bool) -> None:
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    out, p = mixed(x, variant=variant, causal=causal)
    q, k, v = (x @ p[name]["kernel"] for name in ("query", "key", "value"))
    read = np.zeros((LENGTH, DIM))
    for t in range(LENGTH):
        for c in range(DIM):
            read_by_t = range(t + 1) if causal else range(LENGTH)
            weights = [np.exp(k[s, c] + bias(p, variant, causal, c, t, s)) for s in read_by_t]
            read[t, c] = sum(w * v[s, c] for w, s in zip(weights, read_by_t, strict=True)) / sum(weights)
    expected = (read / (1 + np.exp(-q))) @ p["out"]["kernel"]
    # float32: biases on top of a sum that they may nearly cancel, of exponentials of numbers up to 5
    np.testing.assert_allclose(out, expected, atol=5e-3 if variant in ("local", "conv") else 1e-4)


def test_keys_of_any_size_are_finite() -> None:
    x = 1e4 * np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    assert np.isfinite(mixed(x)[0]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="ful"), "Did you mean 'full'"),
        (dict(variant="local", window=1), "window=1 must be at least 2"),
        (dict(variant="conv", num_heads=3), "num_heads=3 does not divide hidden_dim=4"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(np.zeros((LENGTH, DIM), np.float32), **fields)
