"""Routing: clusters that follow the tokens without gradients, causality, and the claimed cost."""

from __future__ import annotations

import functools
import math
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.kernels.cluster_rings import read_many
from ar_jax.kernels.routed_attention import balanced_clusters, cluster_sums, unit
from ar_jax.mixers import MIXERS
from ar_jax.mixers.protocol import Tokens
from ar_jax.training.paths import named_leaves
from ar_jax.training.state import create_state
from ar_jax.training.step import make_train_step

LENGTH = 13

tiny = cases.tiny.__wrapped__  # what is not hashable cannot be kept


def tokens(length: int) -> Tokens:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(index, index[..., None], length)


def test_a_token_reads_the_latest_keys_of_its_own_cluster() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, 1, 4)) for i in range(3))
    asking, cluster = (np.random.default_rng(i).integers(0, 3, LENGTH) for i in range(2))
    run = jax.jit(functools.partial(read_many, None, clusters=3, window=2))
    out, _ = run(q, k, v, asking[None, :, None], cluster[None, :, None], None)
    for t in range(LENGTH):
        read = [j for j in range(t + 1) if cluster[j] == asking[t]][-2:]
        weight = np.exp(np.asarray(k)[0, read, 0] @ np.asarray(q)[0, t, 0] / 2)
        expected = weight / weight.sum() @ np.asarray(v)[0, read, 0] if read else np.zeros(4)
        np.testing.assert_allclose(out[0, t, 0], expected, atol=1e-5)  # float32


def test_the_published_choice_depends_on_the_future_and_ours_does_not() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, 1, 4)) for i in range(3))
    means = unit(jax.random.normal(jax.random.key(3), (1, 3, 4)))
    later = (jnp.arange(LENGTH) == LENGTH - 1)[None, :, None, None]
    chosen = jax.jit(functools.partial(balanced_clusters, window=4, causal=True))
    published = [chosen(q, k + shift * later, v, means) for shift in (0.0, 9.0)]
    queries = [chosen(q + shift * later, k, v, means) for shift in (0.0, 9.0)]
    assert max(np.abs(a[0] - a[1])[:, :-1].max() for a in (published, queries)) > 1e-3
    mixer = MIXERS["routing"](embed_dim=8, num_heads=2, local_heads=1, num_clusters=3, window=3, local_window=2)
    x = jax.random.normal(jax.random.key(4), (1, LENGTH, 8))
    run = jax.jit(lambda p, x: mixer.apply(p, x, tokens(LENGTH))[0])
    params = jax.jit(lambda x: mixer.init(jax.random.key(5), x, tokens(LENGTH)))(x)
    moved = run(params, x.at[:, -1].add(3.0)) - run(params, x)
    assert np.abs(moved[:, :-1]).max() == 0 < np.abs(moved[:, -1]).max()


def test_means_follow_the_tokens_by_their_moving_average_and_have_no_gradient() -> None:
    """One step of training: what is no statistic moves by the optimiser, the means by k-means, whatever the loss."""
    mixer = dict(kind="routing", num_heads=2, local_heads=0, num_clusters=2, window=3, decay=0.5)
    system = tiny("softmax", model__mixer=mixer, model__num_layers=1)
    state = jax.jit(lambda: create_state(system, optax.sgd(0.0), 0, False))()
    step = make_train_step(system, optax.sgd(0.0), lambda _: 0.0, seed=0, num_steps=1)
    batch = {
        "image": jax.random.uniform(jax.random.key(0), (4, 3, 3, 1), minval=-1.0),
        "label": jnp.zeros(4, jnp.int32),
    }
    after, _ = jax.jit(step)(state, batch)
    old, new = named_leaves(state.params), named_leaves(after.params)
    changed = [name for name in old if np.abs(old[name] - new[name]).max() > 1e-6]
    assert changed == [name for name in old if name.endswith("statistics/means")]
    means = new[changed[0]]
    np.testing.assert_allclose(np.linalg.norm(means, axis=-1), 1, atol=1e-5)  # float32
    apart = jnp.arccos(jnp.clip((means * old[changed[0]]).sum(-1), -1, 1))
    assert (np.asarray(apart) < math.pi / 2).all()


def test_a_step_of_k_means_sums_the_tokens_nearest_to_each_mean() -> None:
    x, means = (unit(jax.random.normal(jax.random.key(i), shape)) for i, shape in enumerate([(2, 5, 1, 3), (1, 2, 3)]))
    sums, counts = cluster_sums(x, means)
    flat = np.asarray(x).reshape(-1, 3)
    nearest = np.argmax(flat @ np.asarray(means)[0].T, axis=1)
    for c in range(2):
        np.testing.assert_allclose(sums[0, c], flat[nearest == c].sum(axis=0), atol=1e-6)  # float32
        assert counts[0, c] == (nearest == c).sum()


@pytest.mark.parametrize("causal", [True, False])
def test_with_roots_of_the_length_the_flops_have_slope_three_halves(causal: bool) -> None:
    @functools.cache
    def count(length: int) -> int:
        root = math.isqrt(length)
        sizes: dict[str, Any] = dict(num_clusters=root, window=root, local_heads=0, causal=causal)
        mixer = MIXERS["routing"](embed_dim=4, num_heads=1, **sizes)
        x = jax.ShapeDtypeStruct((1, length, 4), jnp.float32)
        params = jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(length)), x)
        return flops(lambda params, x: mixer.apply(params, x, tokens(length))[0], params, x)

    assert np.log2(count(16384) / count(4096)) / 2 == pytest.approx(1.5, abs=0.06)


def test_the_state_does_not_grow_with_the_context() -> None:
    mixer = MIXERS["routing"](embed_dim=8, num_heads=2, local_heads=1, num_clusters=3, window=3, local_window=2)
    small, large = (jax.eval_shape(lambda n=n: mixer.init_state(1, n, 1)) for n in (100, 10000))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(local_heads=2), "local_heads=2 must be fewer than num_heads=2"),
        (dict(decay=1.0), r"decay=1.0 in \[0, 1\)"),
        (dict(num_memory=1), "num_memory=1 belongs to the form for both ways"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MIXERS["routing"](embed_dim=8, num_heads=2, **{"local_heads": 1} | fields).init(
            jax.random.key(0), jnp.zeros((1, 3, 8)), tokens(3)
        )
