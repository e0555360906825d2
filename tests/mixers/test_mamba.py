"""Mamba and Mamba-2: their recurrences, token by token, how they start, and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

LENGTH, DIM = 6, 4


def mixed(kind: str, x: np.ndarray, **fields: Any) -> tuple[np.ndarray, Any]:
    """What a fresh mixer makes of x [T, D], and its parameters."""
    index = jnp.arange(len(x), dtype=jnp.int32)[None]
    mixer = MIXERS[kind](embed_dim=DIM, **fields)
    tokens = Tokens(index, index[..., None], len(x))
    (out, _), variables = jax.jit(lambda x: mixer.init_with_output(jax.random.key(0), x, tokens))(jnp.asarray(x)[None])
    return np.asarray(out[0]), jax.tree.map(np.asarray, variables["params"])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def convolved(x: np.ndarray, filters: np.ndarray, offset: np.ndarray) -> np.ndarray:
    taps = [[filters[j] * x[t - j] for j in range(len(filters)) if t >= j] for t in range(len(x))]
    return silu(np.stack([sum(row) for row in taps]) + offset)


def normed(x: np.ndarray, num_groups: int) -> np.ndarray:
    parts = x.reshape(len(x), num_groups, -1)
    return (parts / np.sqrt(np.square(parts).mean(axis=-1, keepdims=True) + 1e-5)).reshape(x.shape)


def test_mamba_is_its_recurrence() -> None:
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    out, p = mixed("mamba", x, state_dim=3, step_rank=2)
    u = convolved(x @ p["fed"]["kernel"], **p["convolution"])
    step = softplus(u @ p["step_down"]["kernel"] @ p["step_up"]["kernel"] + p["step_up"]["bias"])
    b, c = (u @ p[name]["kernel"] for name in ("write", "read"))
    h, y = np.zeros((2 * DIM, 3)), []
    for t in range(LENGTH):
        h = np.exp(-step[t, :, None] * np.exp(p["log_rate"])) * h + (step[t] * u[t])[:, None] * b[t]
        y.append(h @ c[t] + p["skip"] * u[t])
    expected = (np.stack(y) * silu(x @ p["gate"]["kernel"])) @ p["out"]["kernel"]
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32, sums of a few terms


@pytest.mark.parametrize(
    "options", [{}, dict(norm_first=True, skip_per_channel=True), dict(norm=False, step_limits=(0.01, 0.05))], ids=str
)
def test_mamba2_is_its_recurrence_beside_a_gated_mlp(options: dict[str, Any]) -> None:
    heads, groups, width, state = 4, 2, 3, 2
    x = np.random.default_rng(0).normal(size=(LENGTH, DIM)).astype(np.float32)
    sizes = dict(state_dim=state, head_dim=width, num_groups=groups, ssm_dim=heads * width, expand=4)
    out, p = mixed("mamba2", x, **sizes, **options)
    fed = convolved(x @ p["fed"]["kernel"], **p["convolution"])
    u, b, c = np.split(fed, [heads * width, heads * width + groups * state], axis=1)
    u, (b, c) = u.reshape(LENGTH, heads, width), (s.reshape(LENGTH, groups, state) for s in (b, c))
    step = np.clip(softplus(x @ p["step"]["kernel"] + p["step_bias"]), *options.get("step_limits", (0, np.inf)))
    memory, y = np.zeros((heads, state, width)), []
    for t in range(LENGTH):
        for n in range(heads):
            g = n // (heads // groups)
            decay = np.exp(-step[t, n] * np.exp(p["log_rate"][n]))
            memory[n] = decay * memory[n] + step[t, n] * np.outer(b[t, g], u[t, n])
            y.append(memory[n].T @ c[t, g] + p["skip"].reshape(heads, -1)[n] * u[t, n])
    y, gate = np.stack(y).reshape(LENGTH, -1), silu(x @ p["gate"]["kernel"])
    if not options.get("norm", True):
        y = y * gate
    else:
        y = normed(y, groups) * gate if options.get("norm_first") else normed(y * gate, groups)
    spare = silu(x @ p["mlp_gate"]["kernel"]) * (x @ p["mlp"]["kernel"])
    expected = np.concatenate([spare, y], axis=1) @ p["out"]["kernel"]
    np.testing.assert_allclose(out, expected, atol=1e-4)  # float32, and a norm of small numbers


def test_steps_and_rates_start_within_their_spans() -> None:
    _, p = mixed("mamba2", np.zeros((LENGTH, DIM), np.float32), expand=64, head_dim=1, step_span=(0.01, 0.2))
    step, rate = softplus(p["step_bias"]), np.exp(p["log_rate"])
    assert 0.01 <= step.min() < 0.02 and 0.1 < step.max() <= 0.201
    assert np.mean(step < np.sqrt(0.01 * 0.2)) == pytest.approx(0.5, abs=0.1)  # even in the logarithm; 256 numbers
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16.01
    _, p = mixed("mamba", np.zeros((LENGTH, DIM), np.float32), state_dim=3)
    np.testing.assert_allclose(np.exp(p["log_rate"]), np.tile([1, 2, 3], (2 * DIM, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba", dict(width=1), "width=1 must be at least 2"),
        ("mamba", dict(step_start="ones"), "step_start='ones' is unknown"),
        ("mamba", dict(step_span=(0.1, 0.01)), "step_span=.* must be two numbers, the smaller one first"),
        ("mamba2", dict(head_dim=3), "head_dim=3 must divide the state space's 8 channels"),
        ("mamba2", dict(head_dim=4, num_groups=3), "num_groups=3 does not divide the 2 heads"),
        ("mamba2", dict(head_dim=4, ssm_dim=12), "at most expand \\* embed_dim = 8"),
    ],
)
def test_what_does_not_fit_is_told(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixed(kind, np.zeros((LENGTH, DIM), np.float32), **fields)
