"""Inception v3 against the PyTorch port that published FIDs are made with."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ar_jax.config import UsageError
from ar_jax.evaluation import features, inception

# Shapes and outputs of the official code, its network built with a sixteenth of all widths and the weights below.
RECORDED = Path(__file__).with_name("inception.npz")


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights of their name alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith(("conv.weight", "fc.weight")):
        values = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    elif name.endswith("running_var"):
        values = random.uniform(0.5, 1.5, shape)
    elif name.endswith("bn.weight"):
        values = random.uniform(0.8, 1.2, shape)
    else:
        values = random.normal(0, 0.1, shape)
    return values.astype(np.float32)


def narrow_weights() -> dict[str, np.ndarray]:
    recorded = np.load(RECORDED)
    shapes = {"fc.weight": (int(recorded["classes"]), recorded["pool"].shape[1])}
    for name, shape in zip(inception._convolutions(), recorded["shapes"].tolist(), strict=True):
        shapes |= {f"{name}.{part}": tuple(shape) if part == "conv.weight" else shape[:1] for part in inception._PARTS}
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


def test_the_network_gives_the_numbers_of_the_official_code_on_any_device(monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 1)
    image = np.random.RandomState(0).randint(0, 256, (1, 299, 299, 3)).astype(np.float32)
    image = np.round((image + np.roll(image, 1, 1) + np.roll(image, 1, 2)) / 3)
    params = inception.from_official(narrow_weights())
    network = features.Features("inception", "", params, inception.inception)
    (found,) = network.of([image])  # filled up with blank images for the other devices
    assert network.sizes((32, 32, 1)) == {name: values.shape[1] for name, values in found.items()}
    recorded = np.load(RECORDED)
    # float32, 48 layers; the greatest values are 20 to 30
    np.testing.assert_allclose(found["pool"], recorded["pool"], atol=2e-5, rtol=1e-5)
    spatial = np.asarray(found["spatial"]).reshape(1, 17, 17, 7)[:, ::2, ::2]
    np.testing.assert_allclose(spatial, recorded["spatial"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(found["probabilities"], recorded["probabilities"], atol=2e-5)


def test_images_are_scaled_as_tensorflow_1_did():
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    found = np.asarray(inception.resize_as_tensorflow_1(image, 4))[0, :, :, 0]
    row = np.array([0, 0.75, 1.5, 2])  # places 0, 0.75, 1.5, 2.25 of the pixels 0, 1, 2; the last goes on
    np.testing.assert_allclose(found, np.array([0, 1.5, 3, 3])[:, None] + row, atol=1e-6)
    same = np.random.default_rng(0).uniform(0, 255, (1, 5, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(inception.resize_as_tensorflow_1(same, 5), same, atol=1e-4)


def test_files_of_other_networks_are_refused(tmp_path):
    weights, file = narrow_weights(), tmp_path / "weights.safetensors"
    others = {
        "lacks 'Mixed_6d": {k: v for k, v in weights.items() if k != "Mixed_6d.branch1x1.bn.bias"},
        "has 'AuxLogits": weights | {"AuxLogits.fc.weight": np.zeros(1, np.float32)},
        "has 63 classes, not 1008": weights,
    }
    for message, arrays in others.items():
        save_file(arrays, file)
        with pytest.raises(UsageError, match=message):
            inception.read_inception(str(file))
    save_file(weights | {"fc.weight": np.zeros((1008, 128), np.float32), "fc.bias": np.zeros(1008, np.float32)}, file)
    params, sha256 = inception.read_inception(str(file))
    assert params["fc"]["kernel"].shape == (128, 1008) and len(sha256) == 64
    with pytest.raises(UsageError, match="missing.pth does not exist; set config.eval.samples.inception"):
        inception.read_inception(str(tmp_path / "missing.pth"))
