"""Log-linear attention: a memory for each power of two of the past, read with weights of their own (arXiv:2506.04761)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from ar_jax.kernels.dispatch import choose_form

CHUNK = 64


@struct.dataclass
class Levels:
    """What came so far, as a Fenwick tree: level m holds a block of 2^(m - 1) tokens where the count's bit m - 1 is set.

    Attributes:
      memory: [B, N, M, H, E] float32, of levels 1 to M, zeros where a level is empty; faded to the last token.
      count: [B] int32, tokens so far.
    """

    memory: Array
    count: Array


def empty_levels(batch_size: int, heads: int, levels: int, key_dim: int, value_dim: int) -> Levels:
    """Before the first token; so many levels of memory serve 2^levels tokens."""
    memory = jnp.zeros((batch_size, heads, levels, key_dim, value_dim), jnp.float32)
    return Levels(memory, jnp.zeros(batch_size, jnp.int32))


def log_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    level_scales: Array,
    *,
    log_decay: Array,
    writes: Array | None = None,
    starts: Array | None = None,
    initial_state: Levels | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Levels | None]:
    """o_i = sum_{j<=i} exp(log_decay_{j+1} + .. + log_decay_i) level_scales_{i, level(i, j)} (q_i . k_j) v_j.

    level(i, j) is the number of binary digits of i xor j: 0 for the token itself, and l for the 2^(l - 1) tokens that lie in
    front of where the last l - 1 digits of i are zeros (arXiv:2506.04761, sec. 3). The nearer, the finer.

    Args:
      q: [B, T, N, H], with its scale applied.
      k: [B, T, N, H].
      v: [B, T, N, E].
      level_scales: [B, T, N, L], of levels 0 to L - 1; they serve 2^(L - 1) tokens.
      log_decay: [B, T, N], in nats per token, <= 0.
      writes: [B or 1, T] bool, which tokens are remembered; None for all. A token that is not reads what is, and does not count.
      starts: [B or 1, T] bool, the tokens with which another sequence begins; None for none.
      initial_state: what came before; None is nothing.
      chunk_size: the length over which the fast form works quadratically, a power of two; None chooses.
      implementation: a key of FORMS; None takes the fast one. Pieces behind others go token by token, whole sequences
        with writes or starts pair by pair.

    Returns:
      o [B, T, N, E] in v's dtype, and what came so far; None without a state before.

    Raises:
      ValueError: shapes that do not fit one another, too few levels, or a chunk size that is no power of two.

    Cost: O(B T N H E (C + log T)) FLOPs in chunks of C, and O(B N H E log T) for one more token.
    """
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} should be [B, T, N, H], [B, T, N, H], [B, T, N, E]")
    if log_decay.shape != q.shape[:3] or level_scales.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"log_decay {log_decay.shape} and level_scales {level_scales.shape} should be [B, T, N] and [B, T, N, L], "
            f"where q is [B, T, N, H] = {q.shape}"
        )
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size {chunk_size} should be a power of two")
    length, levels = q.shape[1], level_scales.shape[3]
    if (length - 1).bit_length() >= levels:
        raise ValueError(f"level_scales have {levels} levels, which serve {2 ** (levels - 1)} tokens, not {length}")
    form = choose_form("log_linear_attention", FORMS, implementation, "xla")
    fed = tuple(x.astype(jnp.float32) for x in (q, k, v, level_scales, log_decay))
    if writes is not None:
        fed = (*fed[:4], jnp.where(writes[..., None], fed[4], 0))
    regular = writes is None and starts is None
    after: Levels | None = None
    if initial_state is None:
        out = _chunks(fed, chunk_size)[0] if regular and form is not _pairs else _pairs(fed, writes, starts)
    elif length == 1 or not regular or form is _pairs:
        out, after = _tokens(fed, writes, starts, initial_state)
    else:  # a prompt, or what comes behind one

        def from_nothing(fed: tuple[Array, ...], state: Levels) -> tuple[Array, Levels]:
            out, memory = _chunks(fed, chunk_size)
            kept = state.memory.shape[2]
            memory = jnp.pad(memory, [(0, 0)] * 2 + [(0, max(kept - memory.shape[2], 0))] + [(0, 0)] * 2)[:, :, :kept]
            return out, Levels(memory, state.count + length)

        def go_on(fed: tuple[Array, ...], state: Levels) -> tuple[Array, Levels]:
            return _tokens(fed, None, None, state)

        out, after = jax.lax.cond((initial_state.count == 0).all(), from_nothing, go_on, fed, initial_state)
    return out.astype(v.dtype), after


def _digits(x: Array) -> Array:
    """How many binary digits an int32 >= 0 has; none for 0."""
    return 32 - jax.lax.clz(x)


def _sums_between(log_decay: Array) -> Array:
    """[..., T] to [..., T, T]: the sum over j < i <= t, -inf where j > t."""
    size = log_decay.shape[-1]
    after = jnp.tril(jnp.ones((size, size), bool), -1)
    terms = jnp.where(after, log_decay[..., :, None], 0.0)
    return jnp.where(jnp.tril(jnp.ones((size, size), bool)), jnp.cumsum(terms, axis=-2), -jnp.inf)


def _pairs(fed: tuple[Array, ...], writes: Array | None, starts: Array | None) -> Array:
    """The equation: every pair of tokens."""
    q, k, v, level_scales, log_decay = fed
    length = q.shape[1]
    written = jnp.ones((1, length), bool) if writes is None else writes
    segment = jnp.zeros((1, length), jnp.int32) if starts is None else jnp.cumsum(starts.astype(jnp.int32), axis=1)
    before = jnp.cumsum(written.astype(jnp.int32), axis=1) - written
    first = 0 if starts is None else jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    index = before - first
    level = _digits(index[:, :, None] ^ index[:, None, :])  # [B or 1, T, T]
    own = jnp.eye(length, dtype=bool)[None]
    readable = written[:, None, :] & (segment[:, :, None] == segment[:, None, :])
    readable &= own | (index[:, None, :] < index[:, :, None])
    scales = jnp.moveaxis(level_scales, 2, 1)  # [B, N, T, L]
    shape = (*scales.shape[:3], length)
    level = jnp.broadcast_to(jnp.minimum(level, scales.shape[3] - 1)[:, None], shape)
    weight = jnp.exp(_sums_between(jnp.moveaxis(log_decay, 2, 1))) * jnp.take_along_axis(scales, level, axis=3)
    weight = jnp.where(readable[:, None], weight, 0) * jnp.einsum("btnh,bsnh->bnts", q, k)
    return jnp.einsum("bnts,bsne->btne", weight, v)


def _added(memory: Array, new: Array, count: Array) -> Array:
    """Levels [B, N, M, H, E] when number `count` [B] (tokens, or chunks) has come, [B, N, H, E]: as one is added to a number.

    The lowest levels that are all full become one with what is new, a level above them.
    """
    carried = _digits((count + 1) & -(count + 1))[:, None, None, None, None] - 1  # how many levels that are
    level = jnp.arange(1, memory.shape[2] + 1).reshape(1, 1, -1, 1, 1)
    merged = new + jnp.where(level <= carried, memory, 0).sum(axis=2)
    return jnp.where(level > carried + 1, memory, jnp.where(level == carried + 1, merged[:, :, None], 0))


def _tokens(fed: tuple[Array, ...], writes: Array | None, starts: Array | None, state: Levels) -> tuple[Array, Levels]:
    """Token by token, from the tree."""
    batch, length = fed[0].shape[:2]
    levels = min(state.memory.shape[2], fed[3].shape[3] - 1)
    writing = jnp.broadcast_to(True if writes is None else writes, (batch, length))
    starting = jnp.broadcast_to(False if starts is None else starts, (batch, length))

    def token(state: Levels, now: tuple[Array, ...]) -> tuple[Levels, Array]:
        q, k, v, scales, log_decay, writes, starts = now  # [B, N, ...], [B, N, L], [B, N], [B]
        wide = writes[:, None, None, None, None]
        memory = jnp.where(starts[:, None, None, None, None], 0, state.memory)
        memory = jnp.exp(log_decay)[..., None, None, None] * memory
        count = jnp.where(starts, 0, state.count)
        out = jnp.einsum("bnm,bnmhe,bnh->bne", scales[..., 1 : 1 + levels], memory[:, :, :levels], q)
        own = jnp.where(writes[:, None], scales[..., 0] * (q * k).sum(axis=-1), 0)
        new = _added(memory, k[..., :, None] * v[..., None, :], count)
        return Levels(jnp.where(wide, new, memory), count + writes), out + own[..., None] * v

    now = tuple(jnp.moveaxis(a, 1, 0) for a in (*fed, writing, starting))
    state, out = jax.lax.scan(token, state, now)
    return jnp.moveaxis(out, 0, 1), state


def _chunks(fed: tuple[Array, ...], chunk_size: int | None) -> tuple[Array, Array]:
    """A sequence from its start, in chunks, which are the leaves of a smaller tree; and the levels of all tokens after it."""
    batch, length, heads, _ = fed[0].shape
    size = chunk_size or min(CHUNK, 1 << (length - 1).bit_length())
    low, whole = size.bit_length() - 1, length // size
    count = -(-length // size)
    levels = max((count - 1).bit_length(), whole.bit_length())
    scales = jnp.pad(
        fed[3], [(0, 0)] * 3 + [(0, max(0, low + levels + 1 - fed[3].shape[3]))]
    )  # for levels nobody reads yet
    fed = (*fed[:3], scales, fed[4])

    def split(a: Array) -> Array:
        """[B, T, N, ...] to [T / C, B, N, C, ...]; padding neither writes nor fades."""
        a = jnp.pad(a, [(0, 0), (0, -length % size)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0), 3, 2)

    place = jnp.arange(size)
    level = _digits(place[:, None] ^ place[None, :])[None, None]

    def chunk(memory: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, scales, log_decay, number = now  # [B, N, C, ...]
        weight = jnp.exp(_sums_between(log_decay)) * jnp.einsum("bnth,bnsh->bnts", q, k)
        weight *= jnp.take_along_axis(scales, jnp.broadcast_to(level, weight.shape), axis=3)
        total = jnp.cumsum(log_decay, axis=-1)[..., None]
        far = scales[..., low + 1 : low + 1 + levels] * jnp.exp(total)
        out = jnp.einsum("bnts,bnse->bnte", weight, v) + jnp.einsum("bntm,bnth,bnmhe->bnte", far, q, memory)
        new = jnp.einsum("bnsh,bnse->bnhe", jnp.exp(_to_end(log_decay))[..., None] * k, v)
        memory = jnp.exp(total[..., -1, :])[..., None, None] * memory
        return _added(memory, new, jnp.broadcast_to(number, (batch,))), out

    memory = jnp.zeros((batch, heads, levels, fed[0].shape[3], fed[2].shape[3]), jnp.float32)
    now = (*map(split, fed), jnp.arange(count, dtype=jnp.int32))
    step, last = jax.checkpoint(chunk, prevent_cse=False), tuple(a[-1] for a in now)
    memory, out = jax.lax.scan(step, memory, tuple(a[:whole] for a in now))
    below = jnp.zeros((batch, heads, low, *memory.shape[3:]), jnp.float32)
    if whole < count:
        _, rest = step(memory, last)
        out = jnp.concatenate([out, rest[None]])
        filled = length % size
        held = (
            jnp.where(place < filled, _digits(place ^ filled), 0)[None] == jnp.arange(1, low + 1)[:, None]
        )  # [levels, C]
        _, k, v, _, log_decay, _ = last
        faded = jnp.exp(_to_end(log_decay))[..., None] * k
        below = jnp.einsum("ls,bnsh,bnse->bnlhe", held.astype(jnp.float32), faded, v)
        memory = jnp.exp(log_decay.sum(axis=-1))[..., None, None, None] * memory
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1).reshape(batch, -1, heads, fed[2].shape[3])
    return out[:, :length], jnp.concatenate([below, memory], axis=2)


def _to_end(log_decay: Array) -> Array:
    """[..., C] to [..., C]: the sum of what comes after each."""
    later = jnp.pad(log_decay[..., 1:], [(0, 0)] * (log_decay.ndim - 1) + [(0, 1)])
    return jnp.cumsum(later[..., ::-1], axis=-1)[..., ::-1]


FORMS = {"reference": _pairs, "xla": _chunks}
