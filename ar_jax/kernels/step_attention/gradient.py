"""Step attention's gradient from a forward and a backward form: what every flash-like form has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_jax.kernels.step_attention.visibility import Visibility


def differentiable(
    forward: Callable[..., tuple[Array, Array]], backward: Callable[..., tuple[Array, Array, Array, Array | None]]
) -> Callable[..., tuple[Array, Array]]:
    """A form of `step_attention` that keeps out and log-sum-exp, and works the weights out anew in its backward pass.

    With p_ij = exp(s_ij - lse_i) and s_ij the logits,
    ds_ij = p_ij (dout_i . v_j - delta_i), where delta_i = dout_i . out_i - dlse_i;   dsink_n = -sum_i exp(sink_n - lse_i) delta_i.

    Args:
      forward: (q, k, v, visible, bias, sinks, *, scale, soft_cap) -> (out [B, T, N, H], lse [B, T, N] float32).
      backward: (q, k, v, visible, bias, lse, d_out, delta [B, T, N] float32, *, scale, soft_cap) ->
        (dq, dk, dv, dbias), dbias being None without a bias.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(options: tuple[Any, Any], *arrays: Any) -> tuple[Array, Array]:
        return forward(*arrays, scale=options[0], soft_cap=options[1])

    def attend_forward(options: tuple[Any, Any], *arrays: Any) -> tuple[Any, Any]:
        out, lse = attend(options, *arrays)
        return (out, lse), (arrays, out, lse)

    def attend_backward(options: tuple[Any, Any], saved: Any, cotangents: Any) -> tuple[Any, ...]:
        (q, k, v, visible, bias, sinks), out, lse = saved
        d_out, d_lse = cotangents
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
        dq, dk, dv, d_bias = backward(q, k, v, visible, bias, lse, d_out, delta, scale=options[0], soft_cap=options[1])
        d_sinks = None
        if sinks is not None:
            share = jnp.exp(jnp.minimum(sinks.astype(jnp.float32)[None, None] - lse, 0.0))
            d_sinks = -(share * delta).sum(axis=(0, 1)).astype(sinks.dtype)
        return dq, dk, dv, None, d_bias, d_sinks

    attend.defvjp(attend_forward, attend_backward)

    @functools.wraps(forward)
    def form(
        q: Array,
        k: Array,
        v: Array,
        visible: Visibility,
        bias: Array | None,
        sinks: Array | None,
        *,
        scale: float,
        soft_cap: float | None,
    ) -> tuple[Array, Array]:
        return attend((scale, soft_cap), q, k, v, visible, bias, sinks)

    return form


def backward_of(form: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array, Array, Array | None]]:
    """The backward form, as `differentiable` takes it, of a form that JAX differentiates itself.

    The log-sum-exp that it is given may be that of more keys than these: with share_i = exp(own lse_i - lse_i) of its
    weights falling on these, a query's own weights times the share are what it gives each key among all of them.
    """

    def backward(
        q: Array,
        k: Array,
        v: Array,
        visible: Visibility,
        bias: Array | None,
        lse: Array,
        d_out: Array,
        delta: Array,
        **options: Any,
    ) -> tuple[Array, Array, Array, Array | None]:
        attend = lambda q, k, v, bias: form(q, k, v, visible, bias, None, **options)  # noqa: E731
        (out, own_lse), pull = jax.vjp(attend, q, k, v, bias)
        share = jnp.exp(jnp.minimum(own_lse - lse, 0.0))
        d_own = share[..., None] * d_out.astype(jnp.float32)
        d_lse = (d_own * out.astype(jnp.float32)).sum(axis=-1) - share * delta
        return pull((d_own.astype(out.dtype), d_lse))

    return backward
