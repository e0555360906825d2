"""Vision backbones: their published sizes, what their parts read, and what training changes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.models.vision import gated_cnn, large_kernel, nat
from ar_jax.models.vision.halo import HaloAttention
from ar_jax.models.vision.large_kernel import LargeKernel
from ar_jax.models.vision.subspace import SubspaceAttention

# Parameters in millions, of the papers' tables.
PUBLISHED = [
    (large_kernel.van, large_kernel.SIZES["b0"], 4.1),
    (large_kernel.van, large_kernel.SIZES["b2"], 26.6),
    (gated_cnn.mamba_out, gated_cnn.SIZES["femto"], 7.3),
    (gated_cnn.mamba_out, gated_cnn.SIZES["tiny"], 26.5),
    (nat.nat, nat.SIZES["mini"], 20.0),
    (nat.nat, nat.SIZES["tiny"], 28.0),
]


@pytest.mark.parametrize(("make", "size", "millions"), PUBLISHED)
def test_classifiers_have_the_published_number_of_parameters(make: Any, size: dict[str, Any], millions: float) -> None:
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = make(**size)
    shapes = jax.eval_shape(lambda image: model.init(jax.random.key(0), image), image)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    "model",
    [
        large_kernel.van((4, 6), (1, 1), (2, 2), num_classes=3),
        gated_cnn.mamba_out((4, 6), (1, 1), num_classes=3),
        nat.nat(4, (1, 1), (1, 2), kernel_size=3, layer_scale=0.1, num_classes=3),
    ],
    ids=["van", "mambaout", "nat"],
)
def test_every_parameter_of_a_classifier_has_a_gradient(model: Any) -> None:
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4) % 3].mean()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(variables["params"])):
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), jax.tree_util.keystr(path)


def test_training_keeps_the_moments_that_evaluation_reads() -> None:
    module, x = SubspaceAttention(2), 3 + jax.random.normal(jax.random.key(0), (8, 4, 4, 4))
    variables = module.init(jax.random.key(1), x)
    _, kept = module.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(kept["batch_stats"]["channel_norm"]["mean"], 0.1 * x.mean(axis=(0, 1, 2)), rtol=1e-4)


def test_a_large_kernel_reaches_eleven_places_and_no_further() -> None:
    """5 x 5 reaches 2, and 7 x 7 with dilation 3 another 9."""
    module, x = LargeKernel(), jnp.ones((1, 31, 31, 2))
    params = module.init(jax.random.key(0), x)
    reads = jax.grad(lambda x: module.apply(params, x)[0, 15, 15].sum())(x)
    rows, columns = np.nonzero(np.abs(reads[0]).sum(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 26, 4, 26)


@pytest.mark.parametrize("padding", ["masked", "read", "inverted"])
def test_halo_attention_is_softmax_over_a_block_and_its_halo(padding: str) -> None:
    module = HaloAttention(2, 1, num_heads=1, head_dim=4, padding=padding)
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 4))
    params = module.init(jax.random.key(1), x)["params"]
    found = module.apply({"params": params}, x)
    q, k, v = (np.pad(x[0] @ params[n]["kernel"], ((1, 1), (1, 1), (0, 0))) for n in ("query", "key", "value"))
    real = np.pad(np.ones((6, 6), bool), 1)
    for row, column in ((0, 0), (2, 3), (5, 1)):
        top, left = row // 2 * 2, column // 2 * 2  # of the window, in padded coordinates
        asked, logits, values = q[row + 1, column + 1] / 2, [], []
        inner = real[top : top + 4, left : left + 4].all()
        for i in range(4):
            for j in range(4):
                at = (top + i, left + j)
                away = params["rows"][3 + i - (row - top)] + params["columns"][3 + j - (column - left)]
                reads = {"masked": real[at], "read": True, "inverted": inner or not real[at]}[padding]
                logits.append((0 if padding == "inverted" and inner else asked @ (k[at] + away)) if reads else -np.inf)
                values.append(v[at])
        weights = np.exp(logits - np.max(logits))
        expected = (weights / weights.sum()) @ np.asarray(values) @ params["out"]["kernel"] + params["out"]["bias"]
        np.testing.assert_allclose(found[0, row, column], expected, atol=1e-5)  # float32, sums of 16 terms


@pytest.mark.parametrize("pool", [False, True])
def test_halo_attention_with_a_stride_gives_a_coarser_grid(pool: bool) -> None:
    module, x = HaloAttention(4, 1, 2, 4, 6, stride=2, pool=pool, project=False), jnp.ones((1, 8, 12, 4))
    assert jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))[0].shape == (1, 4, 6, 6)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SubspaceAttention(3), "num_groups=3 does not divide the 4 channels"),
        (HaloAttention(4, 1), "block_size=4 does not divide the grid of 6 x 6"),
        (HaloAttention(2, 1, padding="mask"), "padding='mask' is unknown"),
    ],
)
def test_what_does_not_fit_is_told(module: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module.init(jax.random.key(0), jnp.zeros((1, 6, 6, 4)))
