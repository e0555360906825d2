"""RWKV-6 and RWKV-7: the layers are their equations, and what they may not be asked for."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.blocks import BlockOptions
from ar_jax.models.decoder import Stack, mixer_pattern

LENGTH, DIM, HEADS, KEY, VALUE = 5, 8, 2, 3, 4
X = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype(np.float32)
BACK = np.concatenate([np.zeros_like(X[0, :1]), X[0, :-1]]) - X[0]  # to the token before


def tokens_of(length: int = LENGTH) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def drawn(mixer: Any, method: str, *args: Any) -> tuple[Any, Any]:
    """Parameters away from zero, for Linen and for numpy."""
    shapes = jax.eval_shape(lambda: mixer.init(jax.random.key(0), X, tokens_of(), *args, method=method))
    leaves, tree = jax.tree.flatten(shapes)
    draw = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [0.5 * draw.normal(size=a.shape).astype(np.float32) for a in leaves])
    return params, params["params"]


def by_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(LENGTH, HEADS, -1)


def normed(x: np.ndarray, p: Any, epsilon: float) -> np.ndarray:
    """Layer norm of each head of [N, E]."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def low_rank(x: np.ndarray, p: Any, activation: Any) -> np.ndarray:
    return activation(x @ p["down"]["kernel"]) @ p["up"]["kernel"] + p["up"].get("bias", 0)


def test_the_layer_of_rwkv6_is_its_equation() -> None:
    mixer = MIXERS["rwkv6"](
        embed_dim=DIM, num_heads=HEADS, head_dim=KEY, value_head_dim=VALUE, mix_rank=2, decay_rank=3
    )
    variables, p = drawn(mixer, "__call__")
    low = np.tanh((X[0] + BACK * p["share"]) @ p["mix_down"]["kernel"]).reshape(LENGTH, 5, -1)
    shares = np.einsum("tir,ird->itd", low, p["mix_up"]) + p["shares"][:, None]
    r, w, k, v, g = (X[0] + BACK * share for share in shares)
    decay = np.exp(-np.exp(by_head(low_rank(w, p["decay"], np.tanh))))
    r, k, v = (by_head(a @ p[name]["kernel"]) for a, name in ((r, "receptance"), (k, "key"), (v, "value")))
    g = g @ p["gate"]["kernel"]
    memory, right = np.zeros((HEADS, KEY, VALUE)), []
    for t in range(LENGTH):
        written = k[t][:, :, None] * v[t][:, None, :]
        read = np.einsum("nh,nhe->ne", r[t], memory + p["bonus"][:, :, None] * written)
        memory = decay[t][:, :, None] * memory + written
        gated = normed(read, p["norm"], 64e-5).reshape(-1) * g[t] * sigmoid(g[t])
        right.append(gated @ p["out"]["kernel"])
    found = jax.jit(lambda variables: mixer.apply(variables, X, tokens_of())[0])(variables)
    np.testing.assert_allclose(found[0], np.stack(right), atol=2e-5)  # float32, sums of some ten terms


def test_the_layer_of_rwkv7_is_its_equation_with_the_values_of_the_first_layer() -> None:
    mixer = MIXERS["rwkv7"](
        embed_dim=DIM, num_heads=HEADS, head_dim=KEY, value_head_dim=VALUE, decay_rank=2, rate_rank=3, gate_rank=4,
        value_residual=True, value_rank=2,
    )  # fmt: skip
    first = np.random.default_rng(2).normal(size=(1, LENGTH, HEADS * VALUE)).astype(np.float32)
    variables, p = drawn(mixer, "read", None, first)
    x_r, x_w, x_k, x_v, x_a, x_g = (X[0] + BACK * share for share in p["shares"])
    own = x_v @ p["value"]["kernel"]
    v = by_head(own + (first[0] - own) * sigmoid(low_rank(x_v, p["first_share"], lambda x: x)))
    r, k = by_head(x_r @ p["receptance"]["kernel"]), by_head(x_k @ p["key"]["kernel"])
    decay = np.exp(-np.exp(-0.5) * sigmoid(by_head(low_rank(x_w, p["decay"], np.tanh))))
    rate = sigmoid(by_head(low_rank(x_a, p["rate"], lambda x: x)))
    gate = low_rank(x_g, p["gate"], sigmoid)
    removed = k * p["kappa"]
    removed = removed / np.sqrt((removed**2).sum(-1, keepdims=True))
    k = k * (1 + (rate - 1) * p["alpha"])
    memory, right = np.zeros((HEADS, KEY, VALUE)), []
    for t in range(LENGTH):
        lost = (removed[t] * rate[t])[:, :, None] * np.einsum("nhe,nh->ne", memory, removed[t])[:, None, :]
        memory = decay[t][:, :, None] * memory - lost + k[t][:, :, None] * v[t][:, None, :]
        read = normed(np.einsum("nhe,nh->ne", memory, r[t]), p["norm"], KEY * 1e-5)
        read = read + (r[t] * k[t] * p["rho"]).sum(-1, keepdims=True) * v[t]
        right.append((read.reshape(-1) * gate[t]) @ p["out"]["kernel"])
    read = jax.jit(lambda variables: mixer.apply(variables, X, tokens_of(), None, first, method="read")[:2])
    found, values = read(variables)
    np.testing.assert_allclose(found[0], np.stack(right), atol=2e-5)  # float32, sums of some ten terms
    np.testing.assert_allclose(values[0], own, atol=1e-5)
    with pytest.raises(UsageError, match="value_residual=True and first_values belong together"):
        mixer.apply(variables, X, tokens_of())


def test_a_decoder_hands_the_first_layers_values_to_all_others() -> None:
    """Layer by layer with `read`, by the scan over layers, and piece by piece: the same numbers."""
    fields = dict(num_heads=HEADS, head_dim=KEY, value_head_dim=VALUE, decay_rank=2, rate_rank=3, gate_rank=4)
    make = mixer_pattern(dict(kind="rwkv7", value_residual=True, value_rank=2, **fields), embed_dim=DIM)
    options = BlockOptions(mlps="none", norm="layer")
    stack, x = Stack(make, 3, options), jnp.asarray(X)
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, tokens_of()))
    assert list(shapes["params"]) == ["layers"]  # asking what is handed on makes no parameters
    params = cases.away_from_zero(shapes, seed=1)
    whole = jax.jit(stack.apply)(params, x, tokens_of())[0]

    @jax.jit
    def layer_by_layer(x: jax.Array) -> jax.Array:
        first = None
        for i in range(3):
            layer = jax.tree.map(lambda a, i=i: a[i], params["params"]["layers"]["block_0"])
            given = jnp.zeros((1, LENGTH, HEADS * VALUE)) if first is None else first
            fed = options.make_norm()().apply({"params": layer["mixer_norm"]}, x), tokens_of(), None, given, i > 0
            out, own, _ = make[0]().apply({"params": layer["mixer"]}, *fed, method="read")
            first, x = own if first is None else first, x + out
        return x

    @jax.jit
    def in_pieces(x: jax.Array) -> jax.Array:
        state, pieces = stack.init_state(1, LENGTH, 1), []
        for piece in (slice(0, 3), slice(3, LENGTH)):
            out, state = stack.apply(params, x[:, piece], tokens_of().part(piece), None, state)
            pieces.append(out)
        return jnp.concatenate(pieces, axis=1)

    np.testing.assert_allclose(layer_by_layer(x), whole, atol=2e-5)  # float32, three layers
    np.testing.assert_allclose(in_pieces(x), whole, atol=2e-5)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(stack.apply(p, x, tokens_of())[0]).sum()))(params)
    share = gradient["params"]["layers"]["block_0"]["mixer"]["first_share"]
    assert all(not leaf[0].any() and leaf[1:].any() for leaf in jax.tree.leaves(share))  # the first layer mixes nothing


@pytest.mark.parametrize("kind", ["rwkv6", "rwkv7"])
def test_heads_must_divide_the_channels(kind: str) -> None:
    with pytest.raises(UsageError, match="num_heads=3 does not divide embed_dim=8; set head_dim"):
        MIXERS[kind](embed_dim=8, num_heads=3).init_state(1, 4, 1)
