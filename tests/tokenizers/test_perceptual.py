import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ar_jax.config import UsageError
from ar_jax.tokenizers.perceptual import random_network, read_network

RNG = np.random.default_rng(0)


def classifier(widths=((3, 4), (4, 4), None, (4, 6)), **more):
    """A classifier of VGG's kind under torchvision's names: None is a pooling."""
    tensors, number = {}, 0
    for layer in widths:
        if layer is None:
            number += 1
            continue
        tensors[f"features.{number}.weight"] = RNG.normal(size=(layer[1], layer[0], 3, 3)).astype(np.float32) / 3
        tensors[f"features.{number}.bias"] = RNG.normal(size=layer[1]).astype(np.float32)
        number += 2  # a ReLU follows
    return tensors | {"classifier.0.weight": np.zeros((2, 2), np.float32)} | more


def images(seed, channels=3):
    return jax.random.uniform(jax.random.key(seed), (2, 8, 6, channels), minval=-1, maxval=1)


def convolved(x, kernel, bias):
    """A 3x3 convolution [B, H, W, C] with ReLU, written out; kernel [out, in, 3, 3]."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    rows = [padded[:, i : i + height, j : j + width] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)]
    return np.maximum(sum(rows) + bias, 0)


def test_the_distance_is_the_papers_on_the_features_of_a_file(tmp_path):
    """At the end of each stage: unit channels, squared differences, channel weights, mean over places, sum over stages."""
    tensors = classifier()
    linear = {f"lin{k}.model.1.weight": RNG.uniform(size=(1, n, 1, 1)).astype(np.float32) for k, n in enumerate((4, 6))}
    save_file(tensors, tmp_path / "net.safetensors")
    save_file(linear, tmp_path / "linear.safetensors")
    network = read_network(str(tmp_path / "net.safetensors"), str(tmp_path / "linear.safetensors"))
    assert [len(stage) for stage in network.stages] == [2, 1]

    expected, found = 0.0, []
    for x in (np.asarray(images(0)), np.asarray(images(1))):
        x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        first = convolved(x, tensors["features.0.weight"], tensors["features.0.bias"])
        first = convolved(first, tensors["features.2.weight"], tensors["features.2.bias"])
        pooled = first.reshape(2, 4, 2, 3, 2, 4).max(axis=(2, 4))
        found.append([first, convolved(pooled, tensors["features.5.weight"], tensors["features.5.bias"])])
    for f, g, weights in zip(*found, linear.values(), strict=True):
        f, g = (a / (np.linalg.norm(a, axis=-1, keepdims=True) + 1e-10) for a in (f, g))
        expected += (np.square(f - g) * weights.reshape(-1)).sum(axis=-1).mean(axis=(1, 2))
    np.testing.assert_allclose(jax.jit(network.distance)(images(0), images(1)), expected, rtol=1e-4)  # float32 sums


def test_random_features_are_always_the_same_and_grow_with_the_difference():
    network, again = random_network(), random_network()
    distance = jax.jit(network.distance)
    x, noise = images(0, channels=1), images(1, channels=1)
    near, far = distance(x, x + 0.1 * noise), distance(x, x + 0.5 * noise)
    assert (0 < near).all() and (near < far).all() and not distance(x, x).any()
    np.testing.assert_array_equal(network.stages[1][0][0], again.stages[1][0][0])


def test_gradients_are_finite_where_all_features_are_dead(tmp_path):
    tensors = {name: np.full_like(value, -1) for name, value in classifier().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    network = read_network(str(tmp_path / "net.safetensors"))
    gradient = jax.jit(jax.grad(lambda x: network.distance(x, images(1)).sum()))(jnp.ones((2, 8, 6, 3)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "content", "linear", "words"),
    [
        ("no.safetensors", None, "", "does not exist; set config.objective.perceptual_features"),
        ("net.safetensors", b"hello", "", "is not a complete safetensors file"),
        ("net.safetensors", {"conv.weight": np.zeros(3)}, "", "has no convolutions features.N.weight"),
        (
            "net.safetensors",
            classifier(),
            "net.safetensors",
            r"lin0.model.1.weight, ... for stages of \[4, 6\] channels",
        ),
    ],
)
def test_files_that_do_not_fit_are_told(tmp_path, name, content, linear, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        save_file(content, tmp_path / name)
    with pytest.raises(UsageError, match=words):
        read_network(str(tmp_path / name), str(tmp_path / linear) if linear else "")
