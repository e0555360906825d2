"""The kernels for GPUs, interpreted, against the equations in value and gradient: several blocks, the last ones not full."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels import delta_attention, linear_attention, selective_scan, step_attention
from ar_jax.kernels.step_attention import visibility

NEVER = np.iinfo(np.int32).max
# float32: sums of some 40 terms of order one. bfloat16 keeps 8 bits: logits, weights and results each round by up to 1/256.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}
PAIR = ("pallas_gpu", "reference")


@pytest.fixture(autouse=True)
def blocks_that_do_not_hold_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pallas_gpu_blocks", "pallas_gpu_decode"):
        monkeypatch.setattr(sys.modules[f"ar_jax.kernels.step_attention.{module}"], "LARGEST_BLOCK", 16)
    monkeypatch.setattr(sys.modules["ar_jax.kernels.selective_scan.pallas_gpu"], "CHANNELS", 8)


def results(form: Any, arrays: dict[str, Any], rest: dict[str, Any]) -> Any:
    """All outputs of a form, and the gradients of their sum with random weights."""

    def loss(arrays: dict[str, Any]) -> Any:
        outs = form(**arrays, **rest)
        r = np.random.default_rng(1)
        weights = [jnp.asarray(r.normal(size=out.shape), jnp.float32) for out in outs]
        return sum(
            (jnp.where(out > -1e29, out, 0.0).astype(jnp.float32) * w).sum()
            for out, w in zip(outs, weights, strict=True)
        ), outs

    (_, outs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"out": outs, "gradient": grads}


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b[b > -1e29]).max(initial=0)), err_msg=str(path)
        )


def normal(r: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(r.normal(size=shape), dtype)


def mask_of(kind: str, r: np.random.Generator, batch: int, time: int, keys: int) -> Any:
    """Bounds in which blocks of all three kinds occur, and queries that see nothing."""
    query, key = np.arange(keys - time, keys)[None], np.arange(keys)[None]
    options: dict[str, Any] = {}
    if kind == "random":
        query, key = r.integers(0, 6, (batch, time)), r.integers(0, 6, (batch, keys))
        key[:, -3:] = NEVER
        options = {"strict": True}
    if kind == "window":
        options = {"window": 5}
    if kind == "segments":
        options = {
            f"{side}_segment": jnp.asarray(row // 7, jnp.int32) for side, row in (("query", query), ("key", key))
        }
    return visibility(jnp.asarray(query, jnp.int32), jnp.asarray(key, jnp.int32), **options)


@pytest.mark.parametrize(
    ("mask", "time", "keys", "heads", "shared", "head_dim", "dtype", "soft_cap", "more"),
    [
        ("raster", 37, 37, 2, 2, 16, "float32", None, ()),
        ("random", 21, 37, 4, 2, 24, "float32", 3.0, ("bias", "sinks")),
        ("window", 33, 50, 2, 1, 16, "bfloat16", None, ("sinks",)),
        ("segments", 40, 40, 1, 1, 16, "float32", None, ("shared_bias",)),
        ("random", 3, 50, 4, 2, 24, "float32", None, ("sinks",)),  # the decode form
        ("raster", 1, 50, 2, 2, 16, "bfloat16", 2.0, ()),
    ],
)
def test_step_attention_is_the_equation(
    monkeypatch: pytest.MonkeyPatch,
    mask: str,
    time: int,
    keys: int,
    heads: int,
    shared: int,
    head_dim: int,
    dtype: str,
    soft_cap: float | None,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys.modules["ar_jax.kernels.step_attention.pallas_gpu_decode"], "MOST_ROWS", 16)
    r, batch = np.random.default_rng(0), 2
    arrays: dict[str, Any] = {
        "q": normal(r, batch, time, heads, head_dim, dtype=dtype),
        "k": normal(r, batch, keys, shared, head_dim, dtype=dtype),
        "v": normal(r, batch, keys, shared, head_dim, dtype=dtype),
        "bias": normal(r, batch if "bias" in more else 1, heads, time, keys) if "bias" in " ".join(more) else None,
        "sinks": normal(r, heads) if "sinks" in more else None,
    }
    rest = {"visible": mask_of(mask, r, batch, time, keys), "scale": head_dim**-0.5, "soft_cap": soft_cap}
    found, expected = (results(step_attention.FORMS[name], arrays, rest) for name in PAIR)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("decay", "has_bonus", "strength", "dtype"),
    [
        (None, False, 0.0, "float32"),
        ("head", True, 0.3, "float32"),
        ("step", False, 30.0, "float32"),  # nothing is left after a few tokens, and weak decays keep their digits
        ("step", False, 0.3, "bfloat16"),
        ("channel", False, 30.0, "float32"),
        ("channel", True, 0.3, "bfloat16"),
    ],
)
def test_linear_attention_is_the_equation(decay: str | None, has_bonus: bool, strength: float, dtype: str) -> None:
    r, (batch, time, heads, head_dim, width) = np.random.default_rng(0), (1, 37, 2, 24, 20)
    tokens = (batch, time, heads)
    sizes = {"head": (heads,), "step": tokens, "channel": (*tokens, head_dim)}
    arrays: dict[str, Any] = {
        "q": normal(r, *tokens, head_dim, dtype=dtype),
        "k": normal(r, *tokens, head_dim, dtype=dtype),
        "v": normal(r, *tokens, width, dtype=dtype),
        "log_decay": None if decay is None else -strength * jnp.abs(normal(r, *sizes[decay])),
        "bonus": normal(r, heads, head_dim) if has_bonus else None,
        "initial_state": normal(r, batch, heads, head_dim, width),
    }
    found, expected = (results(linear_attention.FORMS[name], arrays, {"chunk_size": 32}) for name in PAIR)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["delta", "dplr"])
def test_delta_rules_are_the_equations(rule: str, dtype: str) -> None:
    r, (batch, time, heads, head_dim, width) = np.random.default_rng(0), (1, 21, 2, 24, 20)
    tokens = (batch, time, heads)

    def unit(length: float) -> jax.Array:
        a = normal(r, *tokens, head_dim)
        return (length * a / jnp.linalg.norm(a, axis=-1, keepdims=True)).astype(dtype)

    arrays: dict[str, Any] = {
        "q": normal(r, *tokens, head_dim, dtype=dtype),
        "k": unit(1.0),
        "v": normal(r, *tokens, width, dtype=dtype),
        "initial_state": normal(r, batch, heads, head_dim, width),
    }
    if rule == "delta":
        arrays |= {"beta": jax.nn.sigmoid(normal(r, *tokens)), "log_decay": -jnp.abs(normal(r, *tokens))}
    else:
        arrays |= {"a": unit(1.0), "b": unit(0.5), "log_decay": -jnp.abs(normal(r, *tokens, head_dim))}
    forms = {"delta": delta_attention.FORMS, "dplr": delta_attention.DPLR_FORMS}[rule]
    found, expected = (results(forms[name], arrays, {"chunk_size": 16}) for name in PAIR)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("states", "groups", "dtype"), [(5, 1, "float32"), (4, 3, "bfloat16")])
def test_selective_scan_is_the_equation(states: int, groups: int, dtype: str) -> None:
    r, (batch, time, channels) = np.random.default_rng(0), (2, 10, 12)
    arrays = {
        "x": normal(r, batch, time, channels, dtype=dtype),
        "delta": jnp.abs(normal(r, batch, time, channels)),
        "a": -jnp.abs(normal(r, channels, states)),
        "b": normal(r, batch, time, groups, states, dtype=dtype),
        "c": normal(r, batch, time, groups, states, dtype=dtype),
        "initial_state": normal(r, batch, channels, states),
    }
    found, expected = (results(selective_scan.FORMS[name], arrays, {"chunk_size": 4}) for name in PAIR)
    assert_close(found, expected, TOLERANCE[dtype])
