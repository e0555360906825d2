"""Linear attention gives the numbers of the official code of the systems that are special cases of it."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.interop.files import read_safetensors
from ar_jax.kernels.linear_attention import FORMS, linear_attention

FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures")) / "mixers"


def official(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs and outputs of one run of the official code, and its record."""
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"no official fixture {folder}; set AR_JAX_FIXTURES")
    arrays = {name: jnp.asarray(x) for name, x in read_safetensors(folder / "io.safetensors").items()}
    return arrays, json.loads((folder / "meta.json").read_text())


def tokens_first(x: jax.Array) -> jax.Array:
    """[B, N, T, ...] -> [B, T, N, ...], or back."""
    return jnp.swapaxes(x, 1, 2)


def scaled(q: jax.Array) -> jax.Array:
    return q * q.shape[-1] ** -0.5


@pytest.fixture(params=FORMS)
def attend(request: pytest.FixtureRequest) -> Any:
    return jax.jit(
        functools.partial(linear_attention, implementation=request.param, chunk_size=16), static_argnames="normalize"
    )


def compare(found: Any, right: Any, atol: float) -> None:
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("fla_linear_attn", None),
        ("fla_simple_gla", "in.g"),
        ("fla_gla", "in.gk"),
        ("fla_lightning_attn", "out.g_gamma"),
    ],
)
def test_no_decay_and_decays_per_head_step_and_channel(attend: Any, name: str, decay: str | None) -> None:
    x, record = official(name)
    for suffix, start in (("", None), ("_h0", x["in.h0"])):
        log_decay = None if decay is None else x[decay]
        found = attend(scaled(x["in.q"]), x["in.k"], x["in.v"], log_decay=log_decay, initial_state=start)
        compare(found, (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), record["atol"])


def test_the_normalised_form(attend: Any) -> None:
    x, record = official("fla_linear_attn")
    q, k = (jax.nn.elu(x[f"in.{name}"]) + 1 for name in "qk")
    out, state = attend(scaled(q), k, x["in.v"], normalize=True)
    right = x["out.o_elu_norm"], x["out.ht_elu_norm"], x["out.z_elu_norm"][:, 0]
    compare((out, state[..., :-1], state[..., -1]), right, record["atol"])


def test_retention(attend: Any) -> None:
    x, record = official("fla_retention")
    q, k, v = (tokens_first(x[f"in.{name}"]) for name in "qkv")
    out, _ = attend(scaled(q), k, v, log_decay=jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(q.shape[2])))))
    compare([tokens_first(out)], [x["out.o"]], record["atol"])


def test_rwkv6(attend: Any) -> None:
    x, record = official("fla_rwkv6")
    q, k, v, w = (tokens_first(x[f"in.{name}"]) for name in ("q", "k", "v", "w"))
    for suffix, start in (("", None), ("_h0", x["in.h0"])):
        out, state = attend(q, k, v, log_decay=w, bonus=x["in.u"], initial_state=start)
        compare((tokens_first(out), state), (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), record["atol"])


def test_hgrn(attend: Any) -> None:
    """A recurrence of single numbers: memories of one channel and one column."""
    x, record = official("fla_hgrn")
    x = {name: array[..., :4] for name, array in x.items()}  # each is alone
    values, decay = x["in.x"][..., None], x["in.g"]
    ones = jnp.ones_like(values)
    for suffix, start in (("", None), ("_h0", x["in.h0"][..., None, None])):
        out, state = attend(ones, ones, values, log_decay=decay, initial_state=start)
        compare((out[..., 0], state[..., 0, 0]), (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), record["atol"])
