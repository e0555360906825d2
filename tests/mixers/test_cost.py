"""The claimed cost is a fact: FLOPs, temporary memory and state of each mixer over the length of the sequence."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.kernels.step_attention import step_attention
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens

DIM, HEADS, WINDOW, NEAR = 32, 2, 16, 0.02
CASES: dict[str, Any] = {
    "softmax": MIXERS["softmax"](embed_dim=DIM, num_heads=HEADS),
    "softmax window": MIXERS["softmax"](embed_dim=DIM, num_heads=HEADS, window=WINDOW),
    "transformer_xl": MIXERS["transformer_xl"](embed_dim=DIM, num_heads=HEADS, segment_length=8, memory_length=8),
    "select_and_pack": MIXERS["select_and_pack"](embed_dim=DIM, num_heads=HEADS),
    "combiner": MIXERS["combiner"](embed_dim=DIM, num_heads=HEADS),
    "subsampled": MIXERS["subsampled"](embed_dim=DIM, num_heads=HEADS, window=WINDOW),
    "seer_attention": MIXERS["seer_attention"](embed_dim=DIM, num_heads=HEADS, num_blocks=2, block_size=8),
    "routing": MIXERS["routing"](embed_dim=DIM, num_heads=HEADS, local_heads=1, num_clusters=4, window=WINDOW),
    "loki": MIXERS["loki"](embed_dim=DIM, num_heads=HEADS, num_keys=8, rank=4),
    "multiresolution": MIXERS["multiresolution"](embed_dim=DIM, num_heads=HEADS, num_blocks=16, block_size=16),
    "sparsek": MIXERS["sparsek"](embed_dim=DIM, num_heads=HEADS, num_keys=8, window=WINDOW),
    "softmax, forgetting": MIXERS["softmax"](embed_dim=DIM, num_heads=HEADS, forget_gate=True),
    "native_sparse": MIXERS["native_sparse"](embed_dim=DIM, num_heads=4, block_size=16, num_blocks=4, window=WINDOW),
    "linear": MIXERS["linear"](embed_dim=DIM, num_heads=HEADS),
    "linear, learned decay": MIXERS["linear"](embed_dim=DIM, num_heads=HEADS, decay="learned", normalize=False),
    "linear, gated": MIXERS["linear"](
        embed_dim=DIM, num_heads=HEADS, feature_map="identity", decay="channel", normalize=False
    ),
    "linear, FAST": MIXERS["linear"](embed_dim=DIM, num_heads=HEADS, head_dim=8, feature_map="taylor", qk_norm="plain"),
    "linear, both ways": MIXERS["linear"](embed_dim=DIM, num_heads=HEADS, causal=False),
    "convolution": MIXERS["convolution"](embed_dim=DIM, width=4),
    "fnet": MIXERS["fnet"](embed_dim=DIM, num_samples=4, stride=2),
    "aft": MIXERS["aft"](embed_dim=DIM),
    "aft, local": MIXERS["aft"](embed_dim=DIM, variant="local", window=5, num_rows=4096),
    "chela": MIXERS["chela"](embed_dim=DIM, num_heads=HEADS, z_dim=16, long_width=64),
    "gss": MIXERS["gss"](embed_dim=DIM, state_dim=4),
    "mega": MIXERS["mega"](embed_dim=DIM, z_dim=16, ema_dim=2, attention="laplace", chunk_size=16),
    "hrrformer": MIXERS["hrrformer"](embed_dim=DIM, num_heads=HEADS),
    "linformer": MIXERS["linformer"](embed_dim=DIM, num_heads=HEADS, rank=8, num_rows=4096),
    "lightweight_convolution": MIXERS["lightweight_convolution"](embed_dim=DIM, num_heads=HEADS),
    "lightweight_convolution, dynamic": MIXERS["lightweight_convolution"](embed_dim=DIM, num_heads=HEADS, dynamic=True),
    "neighborhood": MIXERS["neighborhood"](embed_dim=DIM, num_heads=HEADS, kernel_size=5, grid=(4096,)),
    "axial": MIXERS["axial"](embed_dim=DIM, num_heads=HEADS, grid=(64,)),
    "lightnet": MIXERS["lightnet"](embed_dim=DIM, num_heads=HEADS),
    "toeplitz": MIXERS["toeplitz"](embed_dim=DIM, num_heads=HEADS, grid=(64,)),
    "vision_retention": MIXERS["vision_retention"](embed_dim=DIM, num_heads=HEADS, line_length=8),
    "mamba": MIXERS["mamba"](embed_dim=DIM, state_dim=4),
    "mamba2": MIXERS["mamba2"](embed_dim=DIM, state_dim=4, head_dim=8),
    "delta": MIXERS["delta"](embed_dim=DIM, num_heads=HEADS),
    "delta, per channel": MIXERS["delta"](embed_dim=DIM, num_heads=HEADS, decay="channel"),
    "rwkv6": MIXERS["rwkv6"](embed_dim=DIM, num_heads=HEADS),
    "rwkv7": MIXERS["rwkv7"](embed_dim=DIM, num_heads=HEADS),
    "hgrn": MIXERS["hgrn"](embed_dim=DIM),
    "mesa": MIXERS["mesa"](embed_dim=DIM, num_heads=HEADS, num_iterations=4),
    "slots": MIXERS["slots"](embed_dim=DIM, num_heads=HEADS, num_slots=4),
    "agalite": MIXERS["agalite"](embed_dim=DIM, num_heads=HEADS),
    "ttt": MIXERS["ttt"](embed_dim=DIM, num_heads=HEADS),
    "hyper_zzw": MIXERS["hyper_zzw"](embed_dim=DIM, hidden_dim=4, local_widths=(3,), num_rows=4096),
    "conditioned_attention": MIXERS["conditioned_attention"](embed_dim=DIM, conditioning="none"),
    "fixed_point": MIXERS["fixed_point"](embed_dim=DIM, num_heads=HEADS),  # a while loop, whose turns nobody can count
}
LINEAR = ("linear", "linear, learned decay", "convolution", "neighborhood", "lightnet", "vision_retention")
LINEAR += ("aft", "aft, local", "fnet", "lightweight_convolution", "lightweight_convolution, dynamic")
LINEAR += ("sparsek", "linear, gated", "linear, FAST")
LINEAR += ("mamba", "mamba2")
LINEAR += ("hgrn", "conditioned_attention")
LINEAR += ("slots",)
# Linear, too, in chunks that are systems of equations.
MEMORIES = ("delta", "delta, per channel", "rwkv6", "rwkv7", "mesa", "ttt")
LINEAR += ("agalite",)
LINEAR_BOTH_WAYS = ("hrrformer", "linformer", "linear, both ways")
STARTS = {"vision_retention": 2048}  # what its lines share is small from there on
N_LOG_N = ("chela", "gss", "mega")  # convolutions over the whole past, by Fourier transforms


def tokens(length: int, first: int = 0) -> Tokens:
    step = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length)


def sequence(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)


@functools.cache
def params_of(name: str) -> Any:
    return jax.eval_shape(lambda x: CASES[name].init(jax.random.key(0), x, tokens(8)), sequence(8))


def mix(name: str, params: Any, x: jax.Array) -> jax.Array:
    return CASES[name].apply(params, x, tokens(x.shape[1]))[0]


def mix_and_differentiate(name: str, params: Any, x: jax.Array) -> Any:
    return jax.grad(lambda params, x: jnp.square(mix(name, params, x)).sum(), argnums=(0, 1))(params, x)


def slope(cost: Any, length: int) -> float:
    """The power with which cost(N) grows from N over 2N to 4N; a part that is the same for all N does not count."""
    one, two, four = (cost(n) for n in (length, 2 * length, 4 * length))
    return math.log2((four - two) / (two - one))


def test_every_mixer_has_a_row() -> None:
    assert {type(mixer) for mixer in CASES.values()} == set(MIXERS.values())


@pytest.mark.parametrize("function", [mix, mix_and_differentiate])
@pytest.mark.parametrize("name", [*LINEAR, *MEMORIES, *LINEAR_BOTH_WAYS])
def test_flops_of_linear_mixers_have_slope_one(name: str, function: Any) -> None:
    count = functools.cache(lambda n: flops(functools.partial(function, name), params_of(name), sequence(n)))
    assert slope(count, 256) == pytest.approx(1, abs=NEAR)
    assert count(512) < 2.02 * count(256)


@pytest.mark.parametrize("name", [*N_LOG_N, "hyper_zzw"])  # whose state grows
def test_flops_of_long_convolutions_grow_by_n_log_n(name: str) -> None:
    count = functools.cache(lambda n: flops(functools.partial(mix, name), params_of(name), sequence(n)))
    assert 1 < slope(count, 1024) < 1.13  # where all of it is N log N, 2 (13 / 11)^(1 / 2) a doubling


@pytest.mark.parametrize("differentiated", [False, True])
def test_flops_of_the_core_of_softmax_attention_have_slope_two(differentiated: bool) -> None:
    def core(q: jax.Array) -> jax.Array:
        step = jnp.arange(q.shape[1])[None]
        return step_attention(q, q, q, step, step).sum()

    function = jax.grad(core) if differentiated else core
    heads = functools.cache(lambda n: jax.ShapeDtypeStruct((1, n, HEADS, DIM // HEADS), jnp.float32))
    assert slope(lambda n: flops(function, heads(n)), 256) == pytest.approx(2, abs=NEAR)
    whole = functools.cache(lambda n: flops(functools.partial(mix, "softmax"), params_of("softmax"), sequence(n)))
    assert whole(1024) > 3 * whole(512)  # with its projections: between slope one and two


@pytest.mark.parametrize("name", ["softmax", *LINEAR, *LINEAR_BOTH_WAYS])
def test_temporary_memory_grows_with_the_length(name: str) -> None:
    """Of the compiled program; what the compiler lays over one another differs a little from length to length."""

    def temporary_bytes(length: int) -> int:
        lowered = jax.jit(functools.partial(mix, name)).lower(params_of(name), sequence(length))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert slope(functools.cache(temporary_bytes), STARTS.get(name, 512)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", ["delta", "rwkv7", "mesa"])
def test_temporary_memory_of_chunks_at_most_doubles_with_the_length(name: str) -> None:
    """What the compiler lays over one another varies too much here for a slope; quadratic memory would grow fourfold."""

    def temporary_bytes(length: int) -> int:
        lowered = jax.jit(functools.partial(mix, name)).lower(params_of(name), sequence(length))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 2.1 * temporary_bytes(1024)


def step_flops(name: str, context: int) -> int:
    """FLOPs of one more token behind a context of this length."""
    mixer = CASES[name]
    state = jax.eval_shape(lambda: mixer.init_state(1, context, 1))
    return flops(lambda params, x, state: mixer.apply(params, x, tokens(1), state), params_of(name), sequence(1), state)


def state_bytes(name: str, context: int) -> int:
    state = jax.eval_shape(lambda: CASES[name].init_state(1, context, 1))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


@pytest.mark.parametrize("cost", [step_flops, state_bytes])
@pytest.mark.parametrize("name", [*LINEAR, *MEMORIES, *N_LOG_N, "softmax window", "transformer_xl"])
def test_a_step_costs_the_same_behind_any_context(name: str, cost: Any) -> None:
    assert cost(name, 64) == cost(name, 256) == cost(name, 4096) > 0


def test_a_window_is_all_that_its_state_keeps_and_a_short_context_needs_less() -> None:
    per_token = 2 * DIM * 4 + 4  # keys and values of float32, and the step
    for context, kept in ((4, 4), (WINDOW, WINDOW), (1000, WINDOW)):
        assert state_bytes("softmax window", context) == kept * per_token + 4  # and the count


@pytest.mark.parametrize("cost", [step_flops, state_bytes])
def test_a_step_of_softmax_attention_costs_more_the_longer_the_context(cost: Any) -> None:
    assert slope(functools.partial(cost, "softmax"), 1024) == pytest.approx(1, abs=NEAR)


def test_grouped_heads_shrink_the_state_by_their_ratio() -> None:
    def entries(shared: int) -> int:
        mixer = MIXERS["softmax"](embed_dim=DIM, num_heads=8, num_kv_heads=shared)
        return jax.eval_shape(lambda: mixer.init_state(1, 100, 1)).k.size

    assert entries(8) == 4 * entries(2) == 8 * entries(1) == np.prod((100, DIM))
