"""Clusters of a codebook: k-means on its vectors, so that similar codes share a coarse label (CTF, S065, arXiv:2503.16194)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array


def nearest_centroid(vectors: Array, centroids: Array) -> Array:
    """The coarse labels of vectors: [..., C] and [K, C] to [...] int32."""
    return jnp.argmin(_distances(vectors.reshape(-1, vectors.shape[-1]), centroids), axis=-1).reshape(
        vectors.shape[:-1]
    )


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_steps"))
def kmeans(vectors: Array, key: Array, num_clusters: int, num_steps: int = 100) -> Array:
    """Centres of clusters by Lloyd's algorithm, from starts that k-means++ draws (Arthur and Vassilvitskii, 2007).

    A centre that no vector is nearest to stays where it is.

    Args:
      vectors: [V, C] float32, at least num_clusters different ones.
      key: draws the starts.
      num_clusters: K.
      num_steps: of the algorithm; it may have come to rest before.

    Returns: [K, C] float32, each the mean of the vectors that it is nearest to, where the algorithm has come to rest.
    """
    size = len(vectors)
    first_key, key = jax.random.split(key)

    def spread(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """Draws centre i, a vector with a probability in proportion to its squared distance to the nearest centre."""
        centroids, distance = carry
        chosen = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(jnp.maximum(distance, 0)))
        centroids = centroids.at[i].set(vectors[chosen])
        return centroids, jnp.minimum(distance, jnp.square(vectors - vectors[chosen][None]).sum(axis=-1))

    def lloyd(_: Array, centroids: Array) -> Array:
        labels = nearest_centroid(vectors, centroids)
        count = jax.ops.segment_sum(jnp.ones(size), labels, num_clusters)
        total = jax.ops.segment_sum(vectors, labels, num_clusters)
        return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], centroids)

    start = vectors[jax.random.randint(first_key, (), 0, size)]
    centroids = jnp.zeros((num_clusters, vectors.shape[1])).at[0].set(start)
    distance = jnp.square(vectors - start[None]).sum(axis=-1)
    centroids, _ = jax.lax.fori_loop(1, num_clusters, spread, (centroids, distance))
    return jax.lax.fori_loop(0, num_steps, lloyd, centroids)


def _distances(vectors: Array, centroids: Array) -> Array:
    """[V, K] squared distances but for what depends on the vector alone; exact on TPUs too, as they choose labels."""
    products = jnp.einsum("vc,kc->vk", vectors, centroids, precision="highest")
    return jnp.square(centroids).sum(axis=-1)[None] - 2 * products
