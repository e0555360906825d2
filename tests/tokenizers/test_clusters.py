"""k-means on a codebook, and the command that gives a trained tokenizer coarse labels."""

from __future__ import annotations

from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax import cluster
from ar_jax.config import UsageError, get_config
from ar_jax.data.digits import load_digits
from ar_jax.data.protocol import Facts
from ar_jax.tokenizer_system import TokenizerRun, tokenizer_from_config
from ar_jax.tokenizers.clusters import kmeans, nearest_centroid


def test_heaps_are_found_and_each_centre_is_their_mean() -> None:
    """Four heaps on the corners of a square, far from one another: no vector has a label of another heap."""
    corners = 10 * np.asarray([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    heaps = corners[:, None] + np.random.default_rng(0).normal(size=(4, 30, 2)).astype(np.float32)
    centroids = kmeans(jnp.asarray(heaps.reshape(-1, 2)), jax.random.key(0), 4, num_steps=20)
    labels = np.asarray(nearest_centroid(jnp.asarray(heaps), centroids))
    assert [len(set(heap)) for heap in labels.tolist()] == [1] * 4 and len(set(labels[:, 0].tolist())) == 4
    np.testing.assert_allclose(
        centroids[labels[:, 0]], heaps.mean(axis=1), atol=1e-4
    )  # means of 30 float32 of about 10


def test_clusters_leave_less_than_chance_does_and_another_step_changes_nothing() -> None:
    """512 clusters of 16384 vectors, shrunk: the error is far below that of centres drawn from the vectors."""
    vectors = jax.random.normal(jax.random.key(1), (512, 3))
    error = lambda c: jnp.square(vectors - c[nearest_centroid(vectors, c)]).sum(axis=-1).mean()  # noqa: E731
    found = kmeans(vectors, jax.random.key(0), 16)
    assert error(found) < 0.75 * error(vectors[:16])
    np.testing.assert_allclose(kmeans(vectors, jax.random.key(0), 16, num_steps=101), found, atol=1e-5)


def vqgan() -> TokenizerRun:
    """Small, of two latents along each axis, with parameters that are drawn without a compiler."""
    config = get_config("configs/tokenizers/vqgan.py:smoke")
    config.objective = dict(kind="reconstruction", l2_weight=1.0)
    config.tokenizer.update(hidden_channels=8, num_groups=4, attention=(), channel_multipliers=(1, 1, 1))
    system = tokenizer_from_config(config, Facts("image", (8, 8, 1), 17))
    return TokenizerRun(system, cases.away_from_zero(jax.eval_shape(system.init, jax.random.key(0))), config)


def test_a_tokenizer_with_labels_makes_the_same_images_and_labels_say_which_codes_are_alike() -> None:
    run, images = vqgan(), load_digits().test.take(np.arange(8))["image"]
    made, before = cluster.clustered(run, 5), run.encode(images)
    tokens = made.encode(images)
    np.testing.assert_array_equal(tokens[:, 1::2], before)
    np.testing.assert_array_equal(made.decode(tokens), run.decode(before))
    pairs = set(zip(tokens[:, 1::2].reshape(-1).tolist(), tokens[:, ::2].reshape(-1).tolist(), strict=True))
    assert len(pairs) == len({code for code, _ in pairs})  # a code has one label
    assert tokens[:, ::2].max() < 5 and len(set(tokens[:, ::2].reshape(-1).tolist())) > 1
    with pytest.raises(UsageError, match="that has none yet"):
        cluster.clustered(made, 5)
    with pytest.raises(UsageError, match="num_clusters=65 must lie between 2 and the 64 codes"):
        cluster.clustered(run, 65)


@pytest.mark.slow
def test_the_command_makes_a_run_that_a_generator_takes(tmp_path: Path) -> None:
    """Trained tokenizer, clusters, and a generator on images by way of them: three commands behind one another."""
    config = get_config("configs/tokenizers/vqgan.py:smoke")
    config.train.num_steps, config.schedule.warmup_steps = 4, 0
    config.objective, config.mesh = dict(kind="reconstruction", l2_weight=1.0), dict(data=1)
    ar_jax.train(config, tmp_path / "vqgan")
    cluster.main(["cluster", f"--workdir={tmp_path / 'vqgan'}", f"--out={tmp_path / 'clusters'}", "--num_clusters=6"])
    with pytest.raises(UsageError, match="exists; choose another --out"):
        cluster.main(["cluster", f"--workdir={tmp_path / 'vqgan'}", f"--out={tmp_path / 'clusters'}"])
    loaded = ar_jax.load(tmp_path / "clusters")
    assert loaded.system.tokenizer.vocab_sizes == (6, 64)
    generator = get_config("configs/ctf.py:smoke")
    generator.tokenizer, generator.train.num_steps = dict(workdir=str(tmp_path / "clusters")), 2
    generator.schedule.warmup_steps, generator.mesh = 0, dict(data=1)
    run = ar_jax.train(generator, tmp_path / "ctf")
    np.testing.assert_array_equal(
        run.params["tokenizer"]["quantizer"]["centroids"], loaded.params["tokenizer"]["quantizer"]["centroids"]
    )
    tokens = run.sample_tokens(labels=[0, 1])
    assert tokens.shape == (2, 32) and tokens[:, ::2].max() < 6 and run.decode(tokens).shape == (2, 8, 8, 1)
