"""Mesa: each query is answered by the least squares that the keys and values so far pose (MesaNet, arXiv:2506.05233)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.dispatch import choose_form

CHUNK = 64
DENOMINATOR = 1e-5  # added to the denominators of conjugate gradients, as published
STARTS = ("diagonal", "zero")


@struct.dataclass
class MesaMemory:
    """Sums over the tokens so far, faded.

    Attributes:
      keys: [B, N, H, H] float32, of beta k k^T.
      values: [B, N, H, E] float32, of beta k v^T.
    """

    keys: Array
    values: Array


def mesa_attention(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    ridge: Array,
    *,
    log_decay: Array,
    initial_state: MesaMemory | None = None,
    num_iterations: int | None = 30,
    start: str = "diagonal",
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, MesaMemory]:
    """o_t = V_t^T (K_t + diag(ridge))^-1 q_t, the optimal linear regression at each token (arXiv:2506.05233, eq. 5).

    K_t = exp(log_decay_t) K_{t-1} + beta_t k_t k_t^T;   V_t = exp(log_decay_t) V_{t-1} + beta_t k_t v_t^T

    Args:
      q: [B, T, N, H].
      k: [B, T, N, H]; keys of length one keep the systems well conditioned.
      v: [B, T, N, E].
      beta: [B, T, N], >= 0.
      ridge: [N, H], > 0; it does not fade.
      log_decay: [B, T, N], in nats per token, <= 0.
      initial_state: the memory before the first token; nothing if None.
      num_iterations: of conjugate gradients, for all tokens of a chunk at once; None solves exactly. Gradients are those of
        the exact solution, found in the same way: they are right where the iterations converge.
      start: of the iterations, one of STARTS: q over the diagonal, or zeros.
      chunk_size: the length over which the fast form works quadratically; None chooses.
      implementation: a key of FORMS; None takes the platform's.

    Returns:
      o [B, T, N, E] in v's dtype, and the memory after the last token.

    Raises:
      ValueError: shapes that do not fit one another, an unknown start, or an implementation that is unknown.

    Cost: O(B T N (H + E) (num_iterations H + C)) FLOPs in chunks of C, or O(B T N H^3) exactly; the state does not grow.
    """
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, T, N, H], [B, T, N, E]")
    for name, array, shape in (
        ("beta", beta, q.shape[:3]),
        ("log_decay", log_decay, q.shape[:3]),
        ("ridge", ridge, q.shape[2:]),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} {array.shape} should be {shape}, where q is [B, T, N, H] = {q.shape}")
    if start not in STARTS:
        raise ValueError(f"start {start!r} should be one of {', '.join(STARTS)}")
    batch, length, heads, dim = q.shape
    if initial_state is None:
        sizes = ((batch, heads, dim, width) for width in (dim, v.shape[3]))
        initial_state = MesaMemory(*(jnp.zeros(size, jnp.float32) for size in sizes))
    form = choose_form("mesa_attention", FORMS, implementation, "reference" if length == 1 else "xla")
    solve = functools.partial(_solve, num_iterations=num_iterations, start=start)
    arrays = (x.astype(jnp.float32) for x in (q, k, v, beta, log_decay))
    out, state = form(*arrays, ridge=ridge.astype(jnp.float32), state=initial_state, solve=solve, chunk_size=chunk_size)
    return out.astype(v.dtype), state


Solve = Callable[..., Array]


def _solve(
    apply: Callable[[Array], Array],
    diagonal: Array,
    q: Array,
    matrices: Callable[[], Array],
    *,
    num_iterations: int | None,
    start: str,
) -> Array:
    """x [..., H] with A x = q for symmetric A, given as a function, by its diagonal, and whole where it is solved exactly."""
    if num_iterations is None:
        return jnp.linalg.solve(matrices(), q[..., None])[..., 0]
    iterate = functools.partial(
        _conjugate_gradients, diagonal=jax.lax.stop_gradient(diagonal), num_iterations=num_iterations
    )
    found: Array = jax.lax.custom_linear_solve(
        apply, q, functools.partial(iterate, zero=start == "zero"), symmetric=True
    )
    return found


def _conjugate_gradients(
    apply: Callable[[Array], Array], q: Array, *, diagonal: Array, num_iterations: int, zero: bool
) -> Array:
    def dot(a: Array, b: Array) -> Array:
        return (a * b).sum(axis=-1, keepdims=True)

    def turn(_: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, residual, direction, square = carry
        image = apply(direction)
        step = square / (dot(direction, image) + DENOMINATOR)
        x, residual = x + step * direction, residual - step * image
        smaller = dot(residual, residual)
        return x, residual, residual + smaller / (square + DENOMINATOR) * direction, smaller

    x = jnp.zeros_like(q) if zero else q / diagonal
    residual = q if zero else q - apply(x)
    return jax.lax.fori_loop(0, num_iterations, turn, (x, residual, residual, dot(residual, residual)))[0]


def _reference(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, *,
    ridge: Array, state: MesaMemory, solve: Solve, chunk_size: int | None,
) -> tuple[Array, MesaMemory]:  # fmt: skip
    """Token by token."""
    del chunk_size

    def token(memory: MesaMemory, fed: tuple[Array, ...]) -> tuple[MesaMemory, Array]:
        q_t, k_t, v_t, beta_t, log_decay_t = fed
        fade, written = jnp.exp(log_decay_t)[..., None, None], (beta_t[..., None] * k_t)[..., None]
        keys = fade * memory.keys + written * k_t[..., None, :]
        values = fade * memory.values + written * v_t[..., None, :]
        diagonal = jnp.diagonal(keys, axis1=-2, axis2=-1) + ridge[None]

        def apply(x: Array) -> Array:
            return jnp.einsum("bnhi,bni->bnh", keys, x) + ridge[None] * x

        x = solve(apply, diagonal, q_t, lambda: keys + jax.vmap(jnp.diag)(ridge)[None])
        return MesaMemory(keys, values), jnp.einsum("bnhe,bnh->bne", values, x)

    state, out = jax.lax.scan(token, state, tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v, beta, log_decay)))
    return jnp.moveaxis(out, 0, 1), state


def _xla(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, *,
    ridge: Array, state: MesaMemory, solve: Solve, chunk_size: int | None,
) -> tuple[Array, MesaMemory]:  # fmt: skip
    """In chunks: no matrix is made for a token, for what it is multiplied with passes the chunk's keys instead."""
    batch, length, heads, _ = q.shape
    chunk = min(chunk_size or CHUNK, length)

    def split(a: Array) -> Array:
        """[B, T, N, ...] to [T / C, B, N, C, ...]; padding neither writes nor fades."""
        a = jnp.pad(a, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0), 3, 2)

    step = jax.checkpoint(functools.partial(_chunk, ridge=ridge, solve=solve), prevent_cse=False)
    state, out = jax.lax.scan(step, state, tuple(map(split, (q, k, v, beta, log_decay))))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, v.shape[3])
    return out[:, :length], state


def _chunk(memory: MesaMemory, fed: tuple[Array, ...], *, ridge: Array, solve: Solve) -> tuple[MesaMemory, Array]:
    """One chunk: q, k, v [B, N, C, ...], beta and log_decay [B, N, C]."""
    q, k, v, beta, log_decay = fed
    size, own_ridge = beta.shape[-1], ridge[None, :, None]
    after = jnp.tril(jnp.ones((size, size), bool), -1)  # token i comes after j
    between = jnp.cumsum(
        jnp.where(after, log_decay[..., :, None], 0.0), axis=-2
    )  # from after j up to t: no exponent is positive
    weight = jnp.where(jnp.tril(jnp.ones((size, size), bool)), jnp.exp(between), 0) * beta[..., None, :]
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))[..., None]

    def apply_to(x: Array, before: Array, written: Array) -> Array:
        """sum of x_t . k_j times what was written with k_j."""
        near = jnp.einsum("bntj,bnje->bnte", weight * jnp.einsum("bnth,bnjh->bntj", x, k), written)
        return from_start * jnp.einsum("bnth,bnhe->bnte", x, before) + near

    def apply(x: Array) -> Array:
        return apply_to(x, memory.keys, k) + own_ridge * x

    def matrices() -> Array:
        near = jnp.einsum("bntj,bnjh,bnji->bnthi", weight, k, k)
        whole = from_start[..., None] * memory.keys[:, :, None] + near
        return whole + jax.vmap(jnp.diag)(ridge)[None, :, None]

    squares = jnp.einsum("bntj,bnjh->bnth", weight, jnp.square(k))
    diagonal = from_start * jnp.diagonal(memory.keys, axis1=-2, axis2=-1)[:, :, None] + squares + own_ridge
    x = solve(apply, diagonal, q, matrices)
    last = weight[..., -1, :, None] * k
    values = from_start[..., -1:, :] * memory.values + jnp.einsum("bnjh,bnje->bnhe", last, v)
    keys = from_start[..., -1:, :] * memory.keys + jnp.einsum("bnjh,bnji->bnhi", last, k)
    return MesaMemory(keys, values), apply_to(x, memory.values, v)


FORMS = {"reference": _reference, "xla": _xla}
