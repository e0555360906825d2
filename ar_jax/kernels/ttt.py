"""TTT-linear: a linear model as memory, trained on the sequence that it reads (arXiv:2407.04620)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.dispatch import choose_form

RESIDUALS = ("query", "read")


@struct.dataclass
class FastWeights:
    """What the inner model has learned so far.

    Attributes:
      weight: [B, N, H, H] float32, of all mini-batches before the present one.
      bias: [B, N, H] float32, likewise.
      weight_gradient: [B, N, H, H] float32, the sum over the present mini-batch so far.
      bias_gradient: [B, N, H] float32, likewise.
      count: [B] int32, tokens of the present mini-batch.
    """

    weight: Array
    bias: Array
    weight_gradient: Array
    bias_gradient: Array
    count: Array


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner model, f(x) = x + norm(x W + b), and how it is trained.

    Attributes:
      weight: [N, H, H] or [B, N, H, H] float32, W before the first token; FastWeights add to it.
      bias: [N, H] or [B, N, H] float32, likewise.
      scale: [N, H], of the layer norm.
      offset: [N, H], likewise.
      size: tokens of a mini-batch.
      residual: one of RESIDUALS: what is added to what a query reads, itself (as in the paper) or what is read before its norm.
      epsilon: added to the variance.
    """

    weight: Array
    bias: Array
    scale: Array
    offset: Array
    size: int
    residual: str = "query"
    epsilon: float = 1e-6

    def weights(self, memory: FastWeights) -> tuple[Array, Array]:
        """W [B, N, H, H] and b [B, N, H], at which gradients are taken."""
        weight = self.weight if self.weight.ndim == 4 else self.weight[None]
        bias = self.bias if self.bias.ndim == 3 else self.bias[None]
        return weight + memory.weight, bias + memory.bias

    def gradient(self, predicted: Array, target: Array) -> Array:
        """Of |norm(predicted) - target|^2 / 2 by predicted, [B, N, ..., H]."""
        scale, offset = self._rows(predicted)
        normed, deviation = self._standard(predicted)
        g = (scale * normed + offset - target) * scale
        return (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True)) / deviation

    def answer(self, query: Array, read: Array) -> Array:
        """What comes out for a query, [B, N, ..., H], that has read x W + b."""
        scale, offset = self._rows(read)
        return (query if self.residual == "query" else read) + scale * self._standard(read)[0] + offset

    def _standard(self, x: Array) -> tuple[Array, Array]:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        return centred / deviation, deviation

    def _rows(self, x: Array) -> tuple[Array, Array]:
        shape = (1, x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1])
        return self.scale.reshape(shape), self.offset.reshape(shape)


def empty_weights(batch_size: int, num_heads: int, head_dim: int) -> FastWeights:
    """Nothing learned."""
    matrix = jnp.zeros((batch_size, num_heads, head_dim, head_dim), jnp.float32)
    return FastWeights(matrix, matrix[..., 0], matrix, matrix[..., 0], jnp.zeros(batch_size, jnp.int32))


def ttt_linear(
    q: Array,
    k: Array,
    v: Array,
    read_rate: Array,
    inner: Inner,
    *,
    write_rate: Array | None = None,
    writes: Array | None = None,
    starts: Array | None = None,
    initial_state: FastWeights | None = None,
    implementation: str | None = None,
) -> tuple[Array, FastWeights]:
    """o_t = q_t + norm(q_t W_t + b_t), where W and b learn by gradients to map k to v - k (arXiv:2407.04620, sec. 2).

    Gradients are taken at W', where the mini-batch began, so that they are all known at once, and each token reads those of
    the tokens up to itself:

    W_t = W' - read_rate_t sum_{s <= t} write_rate_s dl_s/dW,   l_s = |norm(k_s W' + b') - (v_s - k_s)|^2 / 2

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, N, H].
      v: [B, T, N, H].
      read_rate: [B, T, N]; the last one of a mini-batch also makes the step to the next W'.
      inner: the inner model.
      write_rate: [B, T, N]; ones if None.
      writes: [B or 1, T] bool, which tokens are trained on; None for all. A token that is not reads the sum before it.
      starts: [B or 1, T] bool, the tokens with which another sequence begins, and the inner model anew; None for none.
      initial_state: what was learned before; None is nothing. Mini-batches go on from its count.
      implementation: a key of FORMS; None takes the fast one. With writes or starts both go token by token.

    Returns:
      o [B, T, N, H] in v's dtype, and what is learned after the last token.

    Raises:
      ValueError: shapes that do not fit one another, an unknown residual, or an unknown implementation.

    Cost: O(B T N H (H + size)) FLOPs; the state does not grow with T.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should all be [B, T, N, H]")
    write_rate = jnp.ones(q.shape[:3], jnp.float32) if write_rate is None else write_rate
    for name, rate in (("read_rate", read_rate), ("write_rate", write_rate)):
        if rate.shape != q.shape[:3]:
            raise ValueError(f"{name} {rate.shape} should be [B, T, N] = {q.shape[:3]}")
    if inner.residual not in RESIDUALS:
        raise ValueError(f"residual {inner.residual!r} should be one of {', '.join(RESIDUALS)}")
    batch, length, heads, dim = q.shape
    fed = tuple(x.astype(jnp.float32) for x in (q, k, v, read_rate, write_rate))
    state = empty_weights(batch, heads, dim) if initial_state is None else initial_state
    form = choose_form("ttt_linear", FORMS, implementation, "reference" if length == 1 else "xla")
    if form is _reference or writes is not None or starts is not None:
        out, state = _reference(fed, inner, state, writes, starts)
    else:
        out, state = _xla(fed, inner, state, aligned=initial_state is None)
    return out.astype(v.dtype), state


def _reference(
    fed: tuple[Array, ...], inner: Inner, state: FastWeights, writes: Array | None, starts: Array | None
) -> tuple[Array, FastWeights]:
    """Token by token. Backward keeps the state before each mini-batch's worth of tokens, and computes the rest anew."""
    batch, length = fed[0].shape[:2]
    writing = jnp.broadcast_to(True if writes is None else writes, (batch, length))
    starting = jnp.broadcast_to(False if starts is None else starts, (batch, length))
    empty = empty_weights(batch, *fed[0].shape[2:])

    def token(memory: FastWeights, now: tuple[Array, ...]) -> tuple[FastWeights, Array]:
        q, k, v, read_rate, write_rate, writes, starts = now  # [B, N, H], rates [B, N], [B]
        memory = jax.tree.map(lambda e, m: jnp.where(_like(starts, m), e, m), empty, memory)
        weight, bias = inner.weights(memory)
        g = inner.gradient(jnp.einsum("bnh,bnhe->bne", k, weight) + bias, v - k) * write_rate[..., None]
        g = jnp.where(_like(writes, g), g, 0)
        step = memory.weight_gradient + k[..., :, None] * g[..., None, :], memory.bias_gradient + g
        seen = bias - read_rate[..., None] * (jnp.einsum("bnh,bnhe->bne", q, step[0]) + step[1])
        out = inner.answer(q, jnp.einsum("bnh,bnhe->bne", q, weight) + seen)
        count = memory.count + writes
        return _stepped(memory, step, read_rate, count, count == inner.size), out

    def several(memory: FastWeights, now: tuple[Array, ...]) -> tuple[FastWeights, Array]:
        return jax.lax.scan(token, memory, now)

    pieces = [_pieces(a, min(inner.size, length)) for a in (*fed, writing, starting)]
    state, out = jax.lax.scan(jax.checkpoint(several, prevent_cse=False), state, tuple(pieces))
    return jnp.moveaxis(out.reshape(-1, *out.shape[2:]), 0, 1)[:, :length], state


def _pieces(a: Array, size: int) -> Array:
    """[B, T, ...] to [T / size, size, B, ...]; padding writes nothing."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a, 1, 0).reshape(-1, size, a.shape[0], *a.shape[2:])


def _stepped(
    memory: FastWeights, gradients: tuple[Array, Array], rate: Array, count: Array, full: Array
) -> FastWeights:
    """With the gradients so far, and, where the mini-batch is full [B], the step of rate [B, N] taken."""
    weight, bias = (
        jnp.where(_like(full, old), old - rate.reshape(*rate.shape, *(1,) * (old.ndim - 2)) * g, old)
        for old, g in zip((memory.weight, memory.bias), gradients, strict=True)
    )
    ahead, of_bias = (jnp.where(_like(full, g), 0, g) for g in gradients)
    return FastWeights(weight, bias, ahead, of_bias, jnp.where(full, 0, count))


def _like(which: Array, a: Array) -> Array:
    """[B] with axes of size 1 behind, as many as a has."""
    return which.reshape(-1, *(1,) * (a.ndim - 1))


def _xla(fed: tuple[Array, ...], inner: Inner, state: FastWeights, aligned: bool) -> tuple[Array, FastWeights]:
    """A mini-batch at a time. Where the first of them has begun before, the tokens are laid behind what it holds."""
    batch, length, heads, dim = fed[0].shape
    size = inner.size
    slots = -(-(length if aligned else length + size - 1) // size) * size
    index = jnp.arange(slots, dtype=jnp.int32)[None] - state.count[:, None]  # [B, slots]: which token lies there
    valid = (index >= 0) & (index < length)

    def lay(a: Array) -> Array:
        """[B, T, N, ...] to [slots / size, B, N, size, ...]."""
        if aligned:
            laid = jnp.pad(a, [(0, 0), (0, slots - length)] + [(0, 0)] * (a.ndim - 2))
        else:
            laid = jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(a, jnp.clip(index, 0, length - 1))
        laid = jnp.moveaxis(laid.reshape(batch, -1, size, *a.shape[2:]), 1, 0)
        return jnp.moveaxis(laid, 3, 2)

    def mini_batch(memory: FastWeights, now: tuple[Array, ...]) -> tuple[FastWeights, Array]:
        q, k, v, read_rate, write_rate, valid = now  # [B, N, C, H], rates [B, N, C], [B, C]
        weight, bias = inner.weights(memory)
        bias = bias[:, :, None]
        g = inner.gradient(jnp.einsum("bnch,bnhe->bnce", k, weight) + bias, v - k) * write_rate[..., None]
        g = jnp.where(valid[:, None, :, None], g, 0)
        scores = jnp.tril(jnp.einsum("bnth,bnsh->bnts", q, k) + 1)  # the bias is a key of ones
        before = jnp.einsum("bnch,bnhe->bnce", q, memory.weight_gradient) + memory.bias_gradient[:, :, None]
        seen = before + jnp.einsum("bnts,bnse->bnte", scores, g)
        out = inner.answer(q, jnp.einsum("bnch,bnhe->bnce", q, weight) + bias - read_rate[..., None] * seen)
        step = memory.weight_gradient + jnp.einsum("bnch,bnce->bnhe", k, g), memory.bias_gradient + g.sum(axis=2)
        count = memory.count + valid.sum(axis=1, dtype=jnp.int32)
        return _stepped(memory, step, read_rate[..., -1], count, valid[:, -1]), out

    now = (*map(lay, fed), jnp.moveaxis(valid.reshape(batch, -1, size), 1, 0))
    place = jnp.arange(length, dtype=jnp.int32)[None] + state.count[:, None]
    state, out = jax.lax.scan(jax.checkpoint(mini_batch, prevent_cse=False), state, now)
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, slots, heads, dim)
    if aligned:
        return out[:, :length], state
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0))(out, place), state


FORMS = {"reference": _reference, "xla": _xla}
