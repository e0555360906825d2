"""Precision, recall, density and coverage against a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.evaluation import manifolds


def brute_force(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    def between(a, b):
        return np.sqrt(np.square(a[:, None].astype(np.float64) - b[None]).sum(axis=-1))

    def radii(a, k):
        return np.sort(between(a, a), axis=1)[:, k]  # the first is the distance to itself

    across = between(real, made)
    return {
        "precision": (across <= radii(real, 3)[:, None]).any(axis=0).mean(),
        "recall": (across <= radii(made, 3)[None]).any(axis=1).mean(),
        "density": (across < radii(real, 5)[:, None]).sum(axis=0).mean() / 5,
        "coverage": (across.min(axis=1) < radii(real, 5)).mean(),
    }


@pytest.mark.parametrize(("rows", "columns"), [(512, 2048), (5, 7)])
def test_manifolds_in_tiles_on_several_devices_are_those_of_all_distances(rows, columns, monkeypatch):
    monkeypatch.setattr(manifolds, "ROWS", rows)
    monkeypatch.setattr(manifolds, "COLUMNS", columns)
    random = np.random.default_rng(0)
    real = (50 + random.normal(size=(53, 3))).astype(np.float32)
    made = (51 + 0.7 * random.normal(size=(41, 3))).astype(np.float32)
    found, expected = manifolds.manifold_metrics(real, made), brute_force(real, made)
    assert found == pytest.approx(expected, abs=1e-9)
    assert all(0.1 < value < 0.95 for value in expected.values())


def test_the_same_images_are_all_inside_and_others_are_all_outside():
    points = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
    same, far = manifolds.manifold_metrics(points, points), manifolds.manifold_metrics(points, points + 100)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == pytest.approx(
        1
    )  # a point lies in its own ball and, on average, in k - 1 others' open ones
    assert set(far.values()) == {0.0}
