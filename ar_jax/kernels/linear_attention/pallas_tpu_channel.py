"""Linear attention on TPUs with a decay per channel.

As in xla.py, blocks of 1, 2, 4, ... tokens are joined in pairs, and where the later block reads the earlier one, the decay is
split at the border. At each such level a row is either a reader or a writer, so one matrix holds both,

    X_t = d_t (q_t if t lies in a later block else k_t),   d_t the decay between t and the border,

and X X^T holds what the level adds to the scores, once as it is and once turned. Decays of a level are products of those of
the level before: no exponent is positive, and no sum is the difference of two. Memories are turned here, [E, H], so that
channels lie in lanes as they do in q and k.

Tokens are dealt out on their way in: a chunk is eight blocks, and row b of tile r holds token r of block b. Levels inside of
blocks then pair whole tiles, and levels between blocks pair the rows of every tile alike, with decays of one tile. No order of
tokens matters to products of matrices, so they are put back into their own only on their way out.

Backward, what was read through a decay is its gradient, by its logarithm: q dq summed over those who read through it, or k dk
over those who wrote. Inside of blocks levels are undone from the longest to the shortest: dq and dk then hold what crossed the
borders further up, and no level's own part has to be kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ar_jax.kernels.dispatch import interpreted
from ar_jax.kernels.linear_attention.pallas_tpu_blocks import (
    COMPILER,
    LANES,
    dot,
    memories,
    memory,
    places,
    slices,
    tokens,
)
from ar_jax.kernels.linear_attention.pallas_tpu_decay import Sizes

SUBLANES = 8
TOGETHER = 4  # heads whose steps alternate


def forward(
    sizes: Sizes, q: Array, k: Array, v: Array, decay: Array, bonus: Array | None, state: Array, *, keep: bool
) -> tuple[Array, Array, Array | None]:
    """See `differentiable`: q, k and decay [B, T, N H], v [B, T, N E], bonus [1, N H], state [B, N, E, H]."""
    batch, length, _ = q.shape
    group, chunk, dim, width, *_ = sizes
    chunks, heads = length // chunk, state.shape[1]
    same = lambda t: t  # noqa: E731
    keys, values = tokens(chunk, group * dim, same), tokens(chunk, group * width, same)
    states = memory(group, width, dim)
    kept = memories(group, width, dim, place=same), jax.ShapeDtypeStruct((batch, chunks, heads, width, dim), q.dtype)
    bonuses = [] if bonus is None else [bonus]
    out, final, *before = pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, keys, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses],
        out_specs=[values, states] + [kept[0]] * keep,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
        + [kept[1]] * keep,
        scratch_shapes=[pltpu.VMEM((group, 5, chunk + SUBLANES, max(LANES, dim, width)), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_channel_forward",
    )(q, k, v, decay, state, *bonuses)
    return out, final, before[0] if keep else None


def _forward_kernel(q, k, v, decay, start, *rest, sizes):
    """A chunk of a few heads. `rest`: the bonus if there is one, outputs, and room to deal; memories are carried in `after`.

    Heads take each step in turns: the matrix units wait for their operands, and those of another head are ready.
    """
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    out, after, *before, room = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        after[...] = start[...]

    dtype, heads = q.dtype, range(sizes.group)
    of_key, of_value = (slices(sizes.group, size) for size in (sizes.dim, sizes.width))
    for some in [heads[n : n + TOGETHER] for n in range(0, sizes.group, TOGETHER)]:
        query, key, value, log_decay = (
            {n: _dealt(x[0, :, of[n]], room.at[n, i]) for n in some}
            for i, (x, of) in enumerate([(q, of_key), (k, of_key), (v, of_value), (decay, of_key)])
        )
        inside = {n: _decays_inside(log_decay[n], sizes.strict) for n in some}
        between = {n: _decays_between(inside[n][3]) for n in some}
        scores = {n: jnp.zeros((len(key[n]), SUBLANES, sizes.chunk), jnp.float32) for n in some}
        for i in range(len(inside[some[0]][0])):
            for n in some:
                scores[n] = _with_level_inside(scores[n], inside[n][0][i] * _paired(key[n], query[n], i), i, dtype)
        reader = {n: inside[n][1] * query[n] for n in some}
        writer = {n: inside[n][2] * key[n] for n in some}
        block, column = places((SUBLANES, sizes.chunk))
        column %= SUBLANES  # the writer's block: every tile of scores is masked alike
        scores = {n: jnp.where((block == column)[None], scores[n], 0.0) for n in some}
        for i in range(SUBLANES.bit_length() - 1):
            meet = (block ^ column) >> i == 1
            for n in some:
                late = _of_tile(block[:, :1] >> i & 1 == 1, reader[n].shape)
                both = between[n][0][i][None] * jnp.where(late, reader[n], writer[n])
                found = _product(both, both, dtype)
                scores[n] = jnp.where(_of_tile(meet & (block > column), found.shape), found, scores[n])
        for n in some:
            from_start, to_end, whole = (x[None] for x in between[n][1:])
            state = after[0, n]
            for ref in before:
                ref[0, 0, n] = state.astype(dtype)
            own = query[n] * key[n] if bonus is None else query[n] * key[n] * bonus[:, of_key[n]][None]
            read = dot(_flat(scores[n]), _flat(value[n]), dtype)
            read += dot(_flat(from_start * reader[n]), state, dtype, (1, 1))
            read += _flat(own.sum(axis=2, keepdims=True) * value[n])
            out[0, :, of_value[n]] = _collected(read, room.at[n, 4]).astype(dtype)
            after[0, n] = whole[0] * state + dot(_flat(value[n]), _flat(to_end * writer[n]), dtype, (0, 0))


def _dealt(x: Array, room: Any) -> Array:
    """[C, H] -> [C / 8, 8, H] in float32: row b of tile r is token r of block b. `room` is [C + 8, H] at least.

    Blocks lie one row further apart than they are long, for rows 16 apart would have to be loaded one after another.
    """
    tiles, lanes = x.shape[0] // SUBLANES, x.shape[1]
    for b in range(SUBLANES):
        room[pl.ds(b * (tiles + 1), tiles), :lanes] = x[b * tiles : (b + 1) * tiles].astype(jnp.float32)
    return jnp.stack([room[pl.ds(r, SUBLANES, stride=tiles + 1), :][:, :lanes] for r in range(tiles)])


def _collected(x: Array, room: Any) -> Array:
    """[C, H], the rows of dealt tiles -> [C, H], tokens in their order."""
    tiles, lanes = x.shape[0] // SUBLANES, x.shape[1]
    for r in range(tiles):
        room[pl.ds(r, SUBLANES, stride=tiles + 1), :lanes] = x[r * SUBLANES : (r + 1) * SUBLANES]
    return jnp.concatenate([room[pl.ds(b * (tiles + 1), tiles), :lanes] for b in range(SUBLANES)])


def _flat(tiles: Array) -> Array:
    return tiles.reshape(-1, tiles.shape[-1])


def _tiles(flat: Array) -> Array:
    return flat.reshape(-1, SUBLANES, flat.shape[-1])


def _of_tile(mask: Array, shape: tuple[int, ...]) -> Array:
    """The mask of one tile for all."""
    return jnp.broadcast_to(mask[None], shape)


def _product(x: Array, y: Array, dtype: Any) -> Array:
    """Scores [., 8, C] between dealt tokens [., 8, H] and [C / 8, 8, H]."""
    return _tiles(dot(_flat(x), _flat(y), dtype, (1, 1)))


def _runs(x: Array, i: int) -> tuple[Array, Array]:
    """Tiles of the earlier and of the later of each pair of runs of 2^i tokens: [pairs, 2^i, 8, .] each."""
    pairs = x.reshape(-1, 2, 1 << i, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _paired(early: Array, late: Array, i: int) -> Array:
    """Tiles of earlier runs from one array, and of later runs from the other."""
    return _joined_runs(_runs(early, i)[0], _runs(late, i)[1])


def _joined_runs(early: Array, late: Array) -> Array:
    """What `_runs` took apart."""
    return jnp.stack([early, late], axis=1).reshape(-1, *early.shape[2:])


def _with_level_inside(scores: Array, both: Array, i: int, dtype: Any, *, turned: bool = False) -> Array:
    """Scores, and what later runs read of earlier ones at level i, where X is `both`; of any two blocks.

    Rows are readers or, turned, writers, and only the rows of those that have a part in this level are in the product.
    """
    rows, before = (_runs(x, i) for x in (both, scores))
    found = _product(rows[not turned].reshape(-1, *both.shape[1:]), both, dtype).reshape(before[0].shape)
    pair, column = (jax.lax.broadcasted_iota(jnp.int32, found.shape, axis) for axis in (0, 3))
    met = column // (SUBLANES << i) == (2 * pair + 1 if turned else 2 * pair)
    found = jnp.where(met, found, before[not turned])
    return _joined_runs(found, before[1]) if turned else _joined_runs(before[0], found)


def _decays_inside(log_decay: Array, strict: bool) -> tuple[list[Array], Array, Array, Array]:
    """Decays of dealt tokens inside of their blocks.

    Returns: of each level; from a block's start to where tokens read; from after tokens to its end; over each block, [8, H].
    """
    total, after = jnp.exp(log_decay), jnp.ones_like(log_decay)
    before = after if strict else total
    decays = []
    for i in range(len(log_decay).bit_length() - 1):
        early, late = _runs(total, 0)  # one tile for each run
        decays.append(_paired(after, before, i))
        before = _joined_runs(_runs(before, i)[0], early * _runs(before, i)[1])
        after = _joined_runs(late * _runs(after, i)[0], _runs(after, i)[1])
        total = (early * late)[:, 0]
    return decays, before, after, total[0]


def backward(
    sizes: Sizes,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    bonus: Array | None,
    before: Array,
    dout: Array,
    dfinal: Array,
    *,
    with_decay: bool,
) -> tuple[Any, ...]:
    """See `differentiable`; arrays as in the forward pass, and before [B, T / C, N, E, H]."""
    batch, chunks, heads, *_ = before.shape
    group, chunk, dim, width, *_ = sizes
    back = lambda t: chunks - 1 - t  # noqa: E731
    keys, values = tokens(chunk, group * dim, back), tokens(chunk, group * width, back)
    states = memory(group, width, dim)
    outs: dict[str, tuple[pl.BlockSpec, Any]] = {
        "q": (keys, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        "k": (keys, jax.ShapeDtypeStruct(k.shape, k.dtype)),
        "v": (values, jax.ShapeDtypeStruct(v.shape, v.dtype)),
        "state": (states, jax.ShapeDtypeStruct(dfinal.shape, jnp.float32)),
    }
    if with_decay:
        outs["decay"] = keys, jax.ShapeDtypeStruct(decay.shape, jnp.float32)
    if bonus is not None:
        spec = pl.BlockSpec((1, 1, group * dim), lambda b, n, t: (b, 0, n))
        outs["bonus"] = spec, jax.ShapeDtypeStruct((batch, *bonus.shape), jnp.float32)
    bonuses = [] if bonus is None else [bonus]
    results = pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, names=tuple(outs)),
        grid=(batch, heads // group, chunks),
        in_specs=[keys, keys, values, keys, memories(group, width, dim, place=back), values, states]
        + [pl.BlockSpec((1, group * dim), lambda b, n, t: (0, n)) for _ in bonuses],
        out_specs=[spec for spec, _ in outs.values()],
        out_shape=[shape for _, shape in outs.values()],
        scratch_shapes=[pltpu.VMEM((9, chunk + SUBLANES, max(LANES, dim, width)), jnp.float32)],
        compiler_params=COMPILER,
        interpret=interpreted(),
        name="linear_attention_channel_backward",
    )(q, k, v, decay, before, dout, dfinal, *bonuses)
    found = dict(zip(outs, results, strict=True))
    dbonus = None if bonus is None else found["bonus"].sum(axis=0)
    return found["q"], found["k"], found["v"], found.get("decay"), dbonus, found["state"]


def _backward_kernel(q, k, v, decay, before, dout, dfinal, *rest, sizes, names):
    """A chunk of a few heads. `rest`: the bonus if there is one, outputs by name, and room to deal.

    The gradient of the memory is carried in the output "state".
    """
    bonus, rest = (rest[0], rest[1:]) if sizes.strict else (None, rest)
    outs, room = dict(zip(names, rest[:-1], strict=True)), rest[-1]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        outs["state"][...] = dfinal[...]
        if bonus is not None:
            outs["bonus"][...] = jnp.zeros_like(outs["bonus"])

    dtype = q.dtype
    block, column = places((SUBLANES, sizes.chunk))
    tile, other = column // SUBLANES, column % SUBLANES  # of writers
    of_key, of_value = (slices(sizes.group, size) for size in (sizes.dim, sizes.width))
    for n in range(sizes.group):
        query, key, value, dread, log_decay = (
            _dealt(x[0, :, of[n]], room.at[i])
            for i, (x, of) in enumerate([(q, of_key), (k, of_key), (v, of_value), (dout, of_value), (decay, of_key)])
        )
        inside, to_read, to_border, total = _decays_inside(log_decay, sizes.strict)
        between, from_start, to_end, whole = _decays_between(total)
        reader, writer = to_read * query, to_border * key

        down, turned = _product(dread, value, dtype), _product(value, dread, dtype)
        number = jax.lax.broadcasted_iota(jnp.int32, down.shape, 0)
        same, later = (_of_tile(mask, down.shape) for mask in (block == other, block > other))
        # Both halves: rows are readers of earlier tokens, and writers for later ones.
        dscores = jnp.where(later | same & (number > tile[None]), down, turned)

        # The memory before the chunk, and the one after it.
        state, dafter = before[0, 0, n], outs["state"][0, n]
        dreader = from_start[None] * _tiles(dot(_flat(dread), state, dtype))
        dwriter = to_end[None] * _tiles(dot(_flat(value), dafter, dtype))
        dends = (reader * dreader).sum(axis=0), (writer * dwriter).sum(axis=0)
        outs["state"][0, n] = whole * dafter + dot(_flat(dread), _flat(from_start[None] * reader), dtype, (0, 0))
        dvalue = dot(_flat(to_end[None] * writer), dafter, dtype, (1, 1))

        # Levels between blocks. Rows of scores are writers.
        scores, dbetween = jnp.zeros_like(down), []
        for i, of_level in enumerate(between):
            late, meet = block[:, :1] >> i & 1 == 1, (block ^ other) >> i == 1
            both = of_level[None] * jnp.where(_of_tile(late, reader.shape), reader, writer)
            found = _product(both, both, dtype)
            scores = jnp.where(_of_tile(meet & (block < other), found.shape), found, scores)
            dboth = _tiles(dot(_flat(jnp.where(_of_tile(meet, down.shape), dscores, 0.0)), _flat(both), dtype))
            dbetween.append((both * dboth).sum(axis=0))
            dreader += jnp.where(late, of_level, 0.0)[None] * dboth
            dwriter += jnp.where(late, 0.0, of_level)[None] * dboth
        if "decay" in outs:
            dwhole = whole * (state.astype(jnp.float32) * dafter).sum(axis=0, keepdims=True)
            dtotal = _dlog_between(dbetween, *dends, dwhole)[None]  # by the log decay over each run of tokens

        # Levels inside of blocks.
        dquery, dkey = to_read * dreader, to_border * dwriter
        dscores, within = jnp.where(same, dscores, 0.0), jnp.zeros_like(scores)
        for i in reversed(range(len(inside))):
            if "decay" in outs:
                by_readers = _runs(query * dquery, i)[1].sum(axis=1, keepdims=True)
                by_writers = _runs(key * dkey, i)[0].sum(axis=1, keepdims=True)
                dtotal = _joined_runs(dtotal[:, None] + by_readers, dtotal[:, None] + by_writers)
            both = inside[i] * _paired(key, query, i)
            within = _with_level_inside(within, both, i, dtype, turned=True)
            dboth = jnp.where((number ^ tile[None]) >> i == 1, dscores, 0.0)
            early, late = _runs(inside[i] * _tiles(dot(_flat(dboth), _flat(both), dtype)), i)
            (key_early, key_late), (query_early, query_late) = _runs(dkey, i), _runs(dquery, i)
            dkey, dquery = _joined_runs(key_early + early, key_late), _joined_runs(query_early, query_late + late)
        if "decay" in outs:
            dlog_decay = dtotal if sizes.strict else dtotal + query * dquery
            outs["decay"][0, :, of_key[n]] = _collected(_flat(dlog_decay), room.at[5])

        # What a token reads of its own.
        down = (dread * value).sum(axis=2, keepdims=True)
        by_query, by_key = (x if bonus is None else x * bonus[:, of_key[n]][None] for x in (key, query))
        dquery, dkey = dquery + down * by_query, dkey + down * by_key
        if bonus is not None:
            outs["bonus"][0, :, of_key[n]] += _flat(down * query * key).sum(axis=0, keepdims=True)
        dvalue += _flat((query * by_query).sum(axis=2, keepdims=True) * dread)
        dvalue += dot(_flat(jnp.where(same, within, scores)), _flat(dread), dtype)
        outs["q"][0, :, of_key[n]] = _collected(_flat(dquery), room.at[6]).astype(dtype)
        outs["k"][0, :, of_key[n]] = _collected(_flat(dkey), room.at[7]).astype(dtype)
        outs["v"][0, :, of_value[n]] = _collected(dvalue, room.at[8]).astype(dtype)


def _decays_between(total: Array) -> tuple[list[Array], Array, Array, Array]:
    """From the decay over each block those [8, H] of each level, from the start to it, and from after it to the end.

    The last of what is returned is the decay over all, [1, H].
    """
    before = after = jnp.ones_like(total)
    decays = []
    for i in range(SUBLANES.bit_length() - 1):
        of_level, other = _chosen(after, before, i), _exchanged(total, i)
        decays.append(of_level)
        further = of_level * other
        before, after = _chosen(before, further, i), _chosen(further, after, i)
        total *= other
    return decays, before, after, total[:1]


def _dlog_between(dsums: list[Array], dbefore: Array, dafter: Array, dwhole: Array) -> Array:
    """The gradient of the logarithm of `total` from those of the logarithms of what `_decays_between` returns."""
    first = jax.lax.broadcasted_iota(jnp.int32, dbefore.shape, 0) == 0
    dtotal = jnp.where(first, dwhole, 0.0)
    for i, dsum in reversed(list(enumerate(dsums))):
        dtotal += _exchanged(_chosen(dafter, dbefore, i) + dtotal, i)
        dbefore, dafter = _chosen(dbefore, dbefore + dsum, i), _chosen(dafter + dsum, dafter, i)
    return dtotal


def _chosen(early: Array, late: Array, i: int) -> Array:
    """Rows of the earlier of each pair of 2^i rows of a tile from one array, and of the later from the other."""
    row = jax.lax.broadcasted_iota(jnp.int32, early.shape, 0)
    return jnp.where((row >> i) & 1 == 1, late, early)


def _exchanged(x: Array, i: int) -> Array:
    """Rows of each pair of 2^i rows of a tile, the later ones first."""
    forth, back = (pltpu.roll(x, shift, 0) for shift in (1 << i, SUBLANES - (1 << i)))
    return _chosen(back, forth, i) if 2 << i < SUBLANES else forth
