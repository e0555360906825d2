"""Delta rules, the selective scan and state-space duality give the numbers of the official code."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.interop.files import read_safetensors
from ar_jax.kernels.delta_attention import DPLR_FORMS, FORMS, delta_attention, dplr_attention
from ar_jax.kernels.linear_attention import linear_attention
from ar_jax.kernels.selective_scan import FORMS as SCAN_FORMS
from ar_jax.kernels.selective_scan import selective_scan

FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures")) / "mixers"


def with_slow_pallas(forms: Iterable[str]) -> list[Any]:
    """The names of forms; interpreted Pallas forms, which other tests compare with the reference, only where asked for."""
    return [pytest.param(form, marks=pytest.mark.slow) if form.startswith("pallas") else form for form in forms]


def official(name: str) -> tuple[dict[str, Any], float]:
    """The inputs and outputs of one run of the official code, and the tolerance that its record states."""
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"no official fixture {folder}; set AR_JAX_FIXTURES")
    arrays = {name: jnp.asarray(x) for name, x in read_safetensors(folder / "io.safetensors").items()}
    return arrays, json.loads((folder / "meta.json").read_text())["atol"]


def tokens_first(x: jax.Array) -> jax.Array:
    """[B, N, T, ...] -> [B, T, N, ...], or back."""
    return jnp.swapaxes(x, 1, 2)


def compare(found: Any, right: Any, atol: float) -> None:
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("implementation", with_slow_pallas(FORMS))
def test_the_delta_rule(implementation: str) -> None:
    x, atol = official("fla_delta_rule")
    q, k, v, beta = (tokens_first(x[f"in.{name}"]) for name in ("q", "k", "v", "beta"))
    attend = jax.jit(functools.partial(delta_attention, implementation=implementation, chunk_size=16))
    for suffix, start in (("", None), ("_h0", x["in.h0"])):
        out, state = attend(q * q.shape[-1] ** -0.5, k, v, beta, initial_state=start)
        compare((tokens_first(out), state), (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), atol)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("implementation", with_slow_pallas(FORMS))
def test_the_gated_delta_rule(implementation: str, per_channel: bool) -> None:
    """Also with the same decay in each channel, which goes by the low-rank rule."""
    if per_channel and implementation not in DPLR_FORMS:
        pytest.skip(f"dplr_attention has no {implementation} form")
    x, atol = official("fla_gated_delta_rule")
    q, k, v, beta, decay = (x[f"in.{name}"] for name in ("q", "k", "v", "beta", "g"))
    decay = jnp.broadcast_to(decay[..., None], q.shape) if per_channel else decay
    attend = jax.jit(functools.partial(delta_attention, implementation=implementation, chunk_size=16))
    for suffix, start in (("", None), ("_h0", x["in.h0"])):
        found = attend(q * q.shape[-1] ** -0.5, k, v, beta, log_decay=decay, initial_state=start)
        compare(found, (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), atol)


@pytest.mark.parametrize("implementation", with_slow_pallas(DPLR_FORMS))
def test_rwkv7(implementation: str) -> None:
    x, atol = official("fla_rwkv7")
    r, k, v, a, b, w = (tokens_first(x[f"in.{name}"]) for name in ("r", "k", "v", "a", "b", "w"))
    attend = jax.jit(functools.partial(dplr_attention, implementation=implementation, chunk_size=16))
    for suffix, start in (("", None), ("_h0", x["in.h0"])):
        out, state = attend(r, k, v, a, b, log_decay=w, initial_state=start)
        compare((tokens_first(out), state), (x[f"out.o{suffix}"], x[f"out.ht{suffix}"]), atol)


@pytest.mark.parametrize("implementation", with_slow_pallas(SCAN_FORMS))
def test_the_selective_scan(implementation: str) -> None:
    """The softplus of delta and the gate are Mamba's block's, not the scan's."""
    x, atol = official("mamba_selective_scan")
    u, delta, b, c = (tokens_first(x[f"in.{name}"]) for name in ("u", "delta", "B", "C"))
    delta = jax.nn.softplus(delta + x["in.delta_bias"][None, None])
    scan = jax.jit(functools.partial(selective_scan, implementation=implementation, chunk_size=8))
    gate = jax.nn.silu(tokens_first(x["in.z"]))
    y, state = scan(u, delta, x["in.A"], b, c, skip=x["in.D"])
    compare((tokens_first(y * gate), state), (x["out.y"], x["out.last_state"]), atol)
    compare([tokens_first(scan(u, delta, x["in.A"], b, c)[0])], [x["out.y_noD_noz"]], atol)


@pytest.mark.parametrize("implementation", with_slow_pallas(SCAN_FORMS))
@pytest.mark.parametrize("case", ["groups", "fixed_BC"])
def test_the_selective_scan_with_several_b_and_c(implementation: str, case: str) -> None:
    """Those that do not follow the token are groups of one channel each; the record has no gate here."""
    x, atol = official("mamba_selective_scan")
    u, delta = (tokens_first(x[f"in.{name}"]) for name in ("u", "delta"))
    delta = jax.nn.softplus(delta + x["in.delta_bias"][None, None])
    if case == "groups":
        b, c = (jnp.transpose(x[f"in.{name}"], (0, 3, 1, 2)) for name in ("Bg", "Cg"))
    else:
        b, c = (jnp.broadcast_to(x[f"in.{name}"][None, None], (*u.shape, 8)) for name in ("B0", "C0"))
    scan = jax.jit(functools.partial(selective_scan, implementation=implementation, chunk_size=8))
    y, _ = scan(u, delta, x["in.A"], b, c, skip=x["in.D"])
    compare([tokens_first(y)], [x[f"out.y_{case}"]], atol)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_state_space_duality_is_linear_attention(implementation: str) -> None:
    """Its C are queries, its B keys and its X values; its state lies the other way round."""
    x, atol = official("mamba2_ssd_minimal")
    attend = jax.jit(functools.partial(linear_attention, implementation=implementation, chunk_size=16))
    for suffix, start in (("", None), ("_h0", jnp.swapaxes(x["in.h0"][:, 0], 2, 3))):
        out, state = attend(x["in.C"], x["in.B"], x["in.X"], log_decay=x["in.A"], initial_state=start)
        compare((out, jnp.swapaxes(state, 2, 3)), (x[f"out.y{suffix}"], x[f"out.final_state{suffix}"]), atol)
