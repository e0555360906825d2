"""TTT-linear: mini-batches at once against single tokens, in value, gradient and what is learned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.kernels.ttt import Inner, ttt_linear

BATCH, LENGTH, HEADS, DIM, SIZE = 2, 11, 2, 4, 3
NAMES = ("q", "k", "v", "read_rate", "write_rate")


def inputs() -> dict[str, Any]:
    r = np.random.default_rng(0)
    tokens = (BATCH, LENGTH, HEADS)
    args = {name: 0.5 * r.normal(size=(*tokens, DIM)) for name in "qkv"}
    args |= {name: r.uniform(0.1, 0.5, tokens) for name in ("read_rate", "write_rate")}
    args |= {"weight": r.normal(size=(HEADS, DIM, DIM))}
    args |= {name: r.normal(size=(HEADS, DIM)) for name in ("bias", "scale", "offset")}
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def learn(args: dict[str, Any], residual: str = "query", piece: slice = slice(None), **options: Any) -> Any:
    inner = Inner(*(args[name] for name in ("weight", "bias", "scale", "offset")), size=SIZE, residual=residual)
    q, k, v, read_rate, write_rate = (args[name][:, piece] for name in NAMES)
    return ttt_linear(q, k, v, read_rate, inner, write_rate=write_rate, **options)


def results(args: dict[str, Any], **options: Any) -> Any:
    """Outputs and what is learned, and the gradients of an uneven sum of them by the inputs."""

    def loss(args: dict[str, Any]) -> tuple[jax.Array, Any]:
        found = learn(args, **options)
        floats = [x for x in jax.tree.leaves(found) if x.dtype == jnp.float32]
        return sum((x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in floats), found

    return jax.jit(jax.grad(loss, has_aux=True))(args)


def assert_close(found: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))  # float32, a dozen steps


@pytest.mark.parametrize("residual", ["query", "read"])
def test_mini_batches_at_once_are_tokens_one_by_one(residual: str) -> None:
    right = results(inputs(), residual=residual, implementation="reference")
    assert_close(results(inputs(), residual=residual, implementation="xla"), right)


def test_pieces_may_be_cut_inside_a_mini_batch() -> None:
    args, state, outs = inputs(), None, []
    for piece in (slice(0, 2), slice(2, 3), slice(3, 9), slice(9, 11)):
        out, state = jax.jit(lambda args, state, piece=piece: learn(args, piece=piece, initial_state=state))(
            args, state
        )
        outs.append(out)
    assert_close(
        (np.concatenate(outs, axis=1), state), jax.jit(lambda args: learn(args, implementation="reference"))(args)
    )


def test_the_gradient_is_that_of_the_inner_loss() -> None:
    """And a mini-batch of one token with rates of one takes a whole step of gradient descent."""
    args = inputs()
    inner = Inner(*(args[name] for name in ("weight", "bias", "scale", "offset")), size=1)

    def loss(weight: jax.Array, bias: jax.Array) -> jax.Array:
        k, v = args["k"][0, 0], args["v"][0, 0]
        x = jnp.einsum("nh,nhe->ne", k, weight) + bias
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return jnp.square(args["scale"] * x + args["offset"] - (v - k)).sum() / 2

    right = jax.grad(loss, argnums=(0, 1))(args["weight"], args["bias"])
    ones = jnp.ones((1, 1, HEADS))
    _, state = ttt_linear(*(args[name][:1, :1] for name in "qkv"), ones, inner)
    assert_close((-state.weight[0], -state.bias[0]), right)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="residual 'none' should be one of query, read"):
        learn(inputs(), residual="none")
    with pytest.raises(ValueError, match=r"read_rate \(2, 10, 2\) should be \[B, T, N\]"):
        learn(inputs() | {"read_rate": jnp.ones((2, 10, 2))})
