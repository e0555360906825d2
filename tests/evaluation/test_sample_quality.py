"""The evaluation of samples as a user turns it on: what it reports, by which protocol, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

import ar_jax
from ar_jax import run as runs
from ar_jax.config import UsageError, get_config
from ar_jax.evaluation import classifier, compare, reconstruction, report, samples, write_reference
from ar_jax.evaluation.features import read_features
from ar_jax.evaluation.neighbors import neighbors_of
from ar_jax.evaluation.reference import to_values
from ar_jax.evaluation.small import Small, read_small, write_small
from ar_jax.run import Run, load_data
from ar_jax.system import compiled

ROOT = Path(__file__).parents[2]
COUNT = 42
DIGITS = {"seed": 0, "data": {"kind": "digits"}} | dict.fromkeys(runs.NEEDED[2:], {})


def with_samples(run: Run, **options: Any) -> Run:
    """The same run, evaluated otherwise."""
    config = run.config.copy_and_resolve_references()
    config.eval.samples = dict(run.config.eval.samples) | options
    return dataclasses.replace(run, config=config)


@pytest.fixture(scope="module")
def data():
    return load_data(DIGITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A classifier of random weights: its features tell images apart as well as any for what is tested here."""
    made = tmp_path_factory.mktemp("classifier")
    small = Small((8, 8, 1), 10, (8, 8))
    write_small(made, small, jax.jit(small.init)(jax.random.key(0)))
    return made


@pytest.fixture(scope="module")
def run(folder) -> Run:
    """A run with fresh parameters that draws eight rows."""
    config = get_config(ROOT / "configs/digits.py:smoke")
    config.order = dict(kind="blocks")
    config.model.update(embed_dim=16, num_layers=1, mixer=dict(kind="softmax", num_heads=2))
    config.eval.samples = dict(
        num_samples=COUNT, classifier=str(folder), batch_size=15, neighbors=10, reference="test", save=True
    )
    built = ar_jax.build_run(config)
    assert isinstance(built, Run)
    return built


@pytest.fixture(scope="module")
def evaluated(run, data, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a result, and the result."""
    folder = tmp_path_factory.mktemp("run")
    result = report.judge_samples(samples.prepare(run, data), folder)
    (folder / "metrics.json").write_text(json.dumps({"samples": result}))
    return folder, result


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    cross = np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross)


def test_the_numbers_are_those_of_the_samples_that_were_saved(evaluated, data, folder):
    found, result = evaluated
    saved = np.load(found / "samples.npz")
    images, labels = saved["arr_0"], saved["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (COUNT, 8, 8, 3)
    np.testing.assert_array_equal(labels, np.arange(COUNT) % 10)
    features = read_features("small", str(folder), data)
    real = np.rint((data.test.take(np.arange(360))["image"] + 1) * 127.5).astype(np.float32)
    describe = jax.jit(features.describe)
    made, wanted = (describe(features.params, x) for x in (images[..., :1].astype(np.float32), real))
    # float32 features of a random network, through a matrix square root
    assert result["FID"] == pytest.approx(frechet(np.asarray(made["pool"]), np.asarray(wanted["pool"])), rel=1e-3)
    assert result["class_accuracy"] == pytest.approx((made["probabilities"].argmax(axis=1) == labels).mean())
    assert {"spatial_FID", "inception_score", "precision", "recall", "density", "coverage"} <= set(result)
    assert result["notes"] == [] and result["network_evaluations_per_image"] == 8
    assert np.asarray(Image.open(found / "nearest.png")).std() > 10


def test_samples_on_several_devices_are_those_of_one(evaluated, run):
    system, size = run.system, 16  # 15, rounded up to a multiple of four devices
    key, labels = jax.random.fold_in(jax.random.key(0), 1), (np.arange(size, 2 * size) % 10).astype(np.int32)
    tokens = compiled(system.sample)(run.params, key, labels, np.zeros(size, bool), system.drawing(), None)
    images = to_values(np.asarray(system.tokenizer.decode({}, tokens)), True)
    saved = np.load(evaluated[0] / "samples.npz")["arr_0"][size : 2 * size, ..., :1]
    np.testing.assert_array_equal(images, saved)


def test_results_of_one_protocol_compare_and_others_are_refused_by_the_fields_that_differ(evaluated, tmp_path):
    file, result = str(evaluated[0] / "metrics.json"), evaluated[1]
    told = result["protocol"]
    assert told["features"] == "small" and told["reference"] == "test" and told["num_samples"] == COUNT
    assert told["guidance"] == told["ema"] == "none" and told["class_balance"] == "even" and told["pixels"] == "png"
    changed = told | {"guidance": {"scale": 2.0}, "num_samples": 50}
    for name, protocol in {"same": told, "other": changed}.items():
        values = result | {"protocol": protocol, "fingerprint": samples.fingerprint(protocol), "FID": 1.0}
        (tmp_path / name).write_text(json.dumps({"samples": values}))
    results = compare.compare([file, str(tmp_path / "same")])
    assert [metrics["FID"] for metrics in results.values()] == [result["FID"], 1.0]
    assert "| FID | " in compare.table(results)
    with pytest.raises(
        UsageError, match=r"differ in guidance \(none and .*2.0.*\), num_samples \(42 and 50\); evaluate"
    ):
        compare.compare([file, str(tmp_path / "other")])
    (tmp_path / "forged").write_text(json.dumps({"samples": result | {"protocol": changed}}))
    with pytest.raises(UsageError, match="forged has a protocol that is not its fingerprint's"):
        compare.compare([file, str(tmp_path / "forged")])
    with pytest.raises(UsageError, match="has no metrics of samples; evaluate it"):
        compare.compare([file, str(tmp_path)])


def test_a_file_of_statistics_is_a_reference_and_tells_what_it_lacks(run, data, folder, tmp_path):
    features = read_features("small", str(folder), data)
    images = np.rint((data.test.take(np.arange(360))["image"] + 1) * 127.5).astype(np.uint8)
    found = jax.jit(features.describe)(features.params, images.astype(np.float32))
    pool, spatial = (np.asarray(found[name], np.float64) for name in ("pool", "spatial"))
    statistics = dict(mu=pool.mean(0), sigma=np.cov(pool.T), mu_s=spatial.mean(0), sigma_s=np.cov(spatial.T))
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "images.npz", arr_0=images)
    write_reference.write_reference(tmp_path / "written.npz", "test", data, features)
    by_data = samples.prepare(run, data).reference()
    for name in ("statistics", "images", "written"):
        prepared = samples.prepare(with_samples(run, reference=str(tmp_path / f"{name}.npz")), data)
        by_file = prepared.reference()
        np.testing.assert_allclose(by_file.pool.covariance, by_data.pool.covariance, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(by_file.spatial.mean, by_data.spatial.mean, rtol=1e-3, atol=1e-5)
        assert (by_file.manifold is None) == (name == "statistics")
        assert bool(samples._notes(prepared, by_file)) == (name == "statistics")
    np.savez(tmp_path / "older.npz", **dict(np.load(tmp_path / "written.npz")) | {"features_sha256": "0" * 64})
    with pytest.raises(UsageError, match="older.npz was made with features of sha256 0000"):
        samples.prepare(with_samples(run, reference=str(tmp_path / "older.npz")), data)
    with pytest.raises(UsageError, match="must be a new file whose name ends with .npz"):
        write_reference.write_reference(tmp_path / "written.npz", "test", data, features)


REFUSED = [
    (dict(features="smal"), "config.eval.samples.features='smal'.*Did you mean 'small'"),
    (dict(balance="evn"), "config.eval.samples.balance='evn'.*Did you mean 'even'"),
    (dict(pixels="jpg"), "config.eval.samples.pixels='jpg'.*png"),
    (dict(num_samples=-1), "config.eval.samples.num_samples=-1"),
    (dict(num_samples=1.5), "config.eval.samples.num_samples=1.5 has the wrong type"),
    (dict(batchsize=3), "config.eval.samples.batchsize.*Did you mean 'batch_size'"),
    (dict(classifier=""), "set config.eval.samples.classifier to a folder"),
    (dict(classifier="/no/such"), "/no/such does not exist; set config.eval.samples.classifier"),
    (dict(features="inception"), "set config.eval.samples.inception to a file"),
    (dict(reference="trian"), "trian does not exist; set config.eval.samples.reference to 'train'"),
    (dict(reference="FOLDER/pickled.npz"), "pickled.npz is not a complete .npz of plain arrays"),
    (dict(reference="FOLDER/nothing.npz"), "nothing.npz has neither arr_0 nor mu and sigma"),
    (dict(reference="FOLDER/other.npz"), "statistics of 2048 numbers, but .*'small' gives 8"),
    (dict(reference="FOLDER/larger.npz"), r"larger.npz has images \(16, 16, 3\), but the classifier reads \(8, 8, 1\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_measured_is_told_before_anything_is(options, message, run, data, tmp_path):
    np.savez(tmp_path / "pickled.npz", mu=np.asarray([{}], object))
    np.savez(tmp_path / "nothing.npz", x=np.zeros(3))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), bool))
    np.savez(tmp_path / "larger.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    options = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UsageError, match=message):
        samples.prepare(with_samples(run, **options), data)


def test_runs_that_draw_no_images_are_refused(run, data, tmp_path):
    with pytest.raises(UsageError, match="A tokenizer draws no samples; set config.eval.samples.num_samples=0"):
        reconstruction.evaluate(SimpleNamespace(config=run.config), data, tmp_path)
    with pytest.raises(UsageError, match="is for images"):
        samples.prepare(run, dataclasses.replace(data, modality="text"))
    assert samples.prepare(with_samples(run, num_samples=0), data) is None


COMMANDS = [
    (classifier, "--out=NEW --widths=8,x", "--widths=8,x must be whole numbers"),
    (classifier, "--out=NEW --config.data.knd=x", "config.data.knd is not a known key"),
    (classifier, "--out=NEW --config.data.kind=text --config.data.path=NEW", "does not exist"),
    (write_reference, "--out=NEW.npz", "set config.eval.samples.classifier to a folder"),
    (write_reference, "--out=NEW.npz --features=incpetion", "Did you mean 'inception'"),
    (compare, "NEW", "compare needs two results"),
    (compare, "--workdir=NEW NEW", "'--workdir=NEW' is not an option"),
]


@pytest.mark.parametrize(("module", "arguments", "message"), COMMANDS)
def test_a_command_says_in_a_sentence_what_is_wrong_with_it(module, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = [] if module is compare else [f"--config={ROOT}/configs/digits.py:smoke"]
    with pytest.raises(UsageError, match=message):
        module.main(["command", *config, *arguments.split()])
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_training_images_are_seen_to_be(data):
    own = to_values(np.asarray(data.train.take(np.arange(60, 80))["image"]), True)
    copied = neighbors_of(own, data, True)
    assert copied.metrics()["near_train_fraction"] == 1 and copied.rms.max() == 0
    np.testing.assert_array_equal(copied.found, copied.samples)
    new = neighbors_of(to_values(np.asarray(data.test.take(np.arange(20))["image"]), True), data, True)
    assert new.metrics()["near_train_fraction"] == pytest.approx(0.05) and new.rms.min() > 0.05
    np.testing.assert_array_equal(new.rms, new.held_out_rms)


def test_a_classifier_is_known_by_its_weights_and_its_images(data, folder, tmp_path):
    small, params, sha256 = read_small(str(folder), data)
    assert small.widths == (8, 8) and sha256 == json.loads((folder / "classifier.json").read_text())["sha256"]
    with pytest.raises(
        UsageError, match=r"classifies images \(8, 8, 1\) of 10 classes, but the data has \(28, 28, 1\)"
    ):
        read_small(str(folder), dataclasses.replace(data, shape=(28, 28, 1)))
    write_small(tmp_path, small, jax.tree.map(lambda leaf: leaf + 1, params))
    (tmp_path / "classifier.json").write_text((folder / "classifier.json").read_text())
    with pytest.raises(UsageError, match="is not what classifier.json beside it says"):
        read_small(str(tmp_path), data)
    with pytest.raises(UsageError, match="needs images of at least two classes"):
        classifier.check(dataclasses.replace(data, label_names=()))
    with pytest.raises(UsageError, match=r"--widths=\[8, 8, 8, 8, 8\] must be positive, and halve"):
        classifier.train_classifier(data, tmp_path / "none", widths=(8,) * 5)


@pytest.mark.slow
def test_the_classifier_learns_the_digits(data, tmp_path):
    found = classifier.train_classifier(data, tmp_path, num_steps=150)
    assert found["accuracy"] > 0.85  # chance is 0.1
    small, params, sha256 = read_small(str(tmp_path), data)
    test = data.test.take(np.arange(len(data.test)))
    right = np.asarray(small.logits(params, test["image"])).argmax(axis=-1) == test["label"]
    assert sha256 == found["sha256"] and right.mean() == found["accuracy"]
