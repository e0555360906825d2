"""How good samples are: many are drawn and compared with real images, by a protocol that the result names in full.

Numbers compare only where the protocol is the same, so a result carries it, with a fingerprint, and
`python -m ar_jax.evaluation.compare` refuses others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ar_jax.config import UsageError, build, choose
from ar_jax.data.protocol import Dataset
from ar_jax.evaluation.features import Features, read_features
from ar_jax.evaluation.manifolds import DENSITY_K, manifold_metrics
from ar_jax.evaluation.neighbors import Neighbors, neighbors_of
from ar_jax.evaluation.reference import Reference, open_reference, to_values
from ar_jax.evaluation.statistics import InceptionScore, Moments, frechet_distance
from ar_jax.generator_run import Run
from ar_jax.system import System, compiled
from ar_jax.training.mesh import make_mesh
from ar_jax.training.sharding import batch_sharding, replicated
from ar_jax.training.workdir import plain_values

VERSION = 1  # of the protocol: rises when the same fingerprint would mean another number
BALANCES = ("even", "data")
PIXELS = ("png", "raw")


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """`config.eval.samples`.

    Attributes:
      num_samples: how many are drawn; 0 leaves all of this out.
      features: "small" or "inception"; see `ar_jax.evaluation.features`.
      classifier: folder of the small classifier: for features "small", and for the accuracy of samples.
      inception: file of Inception's weights, for features "inception".
      reference: "train", "test", or an .npz file as ADM's evaluator has them.
      balance: "even" draws as many samples of every class, "data" as the training images have them.
      pixels: "png" rounds samples to whole values 0 to 255, as a file would; "raw" leaves them.
      batch_size: samples that are drawn at once; it is rounded up to a multiple of the devices.
      neighbors: samples whose nearest training image is looked for.
      save: writes eval/samples.npz, which ADM's evaluator reads: arr_0 uint8 [N, H, W, 3] and labels arr_1 [N].
    """

    num_samples: int = 0
    features: str = "small"
    classifier: str = ""
    inception: str = ""
    reference: str = "train"
    balance: str = "even"
    pixels: str = "png"
    batch_size: int = 64
    neighbors: int = 100
    save: bool = False

    def __post_init__(self) -> None:
        """Refuses what means nothing."""
        for name, least in (("num_samples", 0), ("batch_size", 1), ("neighbors", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"config.eval.samples.{name}={getattr(self, name)} must be at least {least}.")
        choose(dict.fromkeys(BALANCES), self.balance, "eval.samples.balance")
        choose(dict.fromkeys(PIXELS), self.pixels, "eval.samples.pixels")


def sample_options(config: Mapping[str, Any]) -> SampleOptions:
    """`config.eval.samples`, checked; nothing is drawn where it is left out."""
    section = dict(config.get("eval") or {}).get("samples") or {}
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        raise UsageError(
            f"config.eval.samples={section!r} must be a section; write config.eval.samples.num_samples=1000."
        )
    options: SampleOptions = build({"samples": SampleOptions}, {"kind": "samples", **dict(section)}, "eval.samples")
    return options


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What is at hand, and fits, before the first sample is drawn.

    Attributes:
      run: what is sampled from.
      data: its data set.
      options: `config.eval.samples`.
      features: what describes images.
      classifier: what tells the class of a sample, or None.
      reference: computes what samples are compared with.
      labels: [N] classes to draw, or None where the model has no condition.
    """

    run: Run
    data: Dataset
    options: SampleOptions
    features: Features
    classifier: Features | None
    reference: Callable[[], Reference]
    labels: np.ndarray | None

    @property
    def rounded(self) -> bool:
        """Whether samples are rounded as a PNG file would."""
        return self.options.pixels == "png"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of it.

    Attributes:
      metrics: by name; `protocol`, `fingerprint`, `sampling` and `notes` among them.
      neighbors: samples beside their nearest training images, or None.
      images: [N, H, W, C] uint8 where they are to be saved, or None.
    """

    metrics: dict[str, Any]
    neighbors: Neighbors | None
    images: np.ndarray | None


def prepare(run: Run, data: Dataset) -> Prepared | None:
    """Reads what the evaluation of samples needs, or returns None where `config.eval.samples` asks for none.

    Raises:
      UsageError: an option is wrong, a file is missing or does not fit, or samples of this run are no images of classes.
    """
    options = sample_options(run.config)
    if not options.num_samples:
        return None
    if data.modality != "image":
        raise UsageError("config.eval.samples is for images; set config.eval.samples.num_samples=0.")
    if hasattr(run.system.model.generator.condition, "channels"):
        raise UsageError(
            "config.eval.samples draws samples of classes or without a condition, but this model needs embeddings; set "
            "config.eval.samples.num_samples=0."
        )
    path = options.classifier if options.features == "small" else options.inception
    features = read_features(options.features, path, data)
    classifier = features if options.features == "small" else None
    if classifier is None and options.classifier:
        classifier = read_features("small", options.classifier, data)
    reference = open_reference(options.reference, data, features, options.pixels == "png")
    return Prepared(run, data, options, features, classifier, reference, _labels(run, data, options))


def measure(prepared: Prepared) -> Result:
    """Draws the samples and compares them with the reference."""
    options, features, classifier = prepared.options, prepared.features, prepared.classifier
    reference = prepared.reference()
    pool, spatial = Moments(len(reference.pool.mean)), None
    score, right, points, kept, examined, first = None, 0, [], [], [], 0
    draw = Sampler(prepared)
    for images in draw:
        values = to_values(images, prepared.rounded)
        if options.save:
            kept.append(np.clip(values, 0, 255).round().astype(np.uint8))
        if first < options.neighbors:
            examined.append(values[: options.neighbors - first])
        for found in features.of([values]):
            score = score or InceptionScore(found["probabilities"].shape[1])
            spatial = spatial or Moments(found["spatial"].shape[1])
            pool.add(found["pool"])
            spatial.add(found["spatial"])
            score.add(found["probabilities"])
            points.append(found["pool"])
        if classifier is not None and prepared.labels is not None:
            told = np.concatenate([found["probabilities"].argmax(axis=1) for found in classifier.of([values])])
            right += int((told == prepared.labels[first : first + len(values)]).sum())
        first += len(values)
    assert score is not None and spatial is not None  # at least one sample is drawn
    made, notes = np.concatenate(points), _notes(prepared, reference)
    metrics: dict[str, Any] = {"FID": frechet_distance(pool.gaussian(), reference.pool)}
    if reference.spatial is not None:
        metrics["spatial_FID"] = frechet_distance(spatial.gaussian(), reference.spatial)
    metrics["inception_score"] = score.result()
    if reference.manifold is not None and min(len(made), len(reference.manifold)) > DENSITY_K:
        metrics |= manifold_metrics(reference.manifold, made)
    if classifier is not None and prepared.labels is not None:
        metrics["class_accuracy"] = right / first
    neighbors = None
    if examined and "image" in prepared.data.train[0]:
        neighbors = neighbors_of(np.concatenate(examined), prepared.data, prepared.rounded)
        metrics |= neighbors.metrics()
    metrics |= draw.speed() | {"cache_bytes_per_image": cache_bytes(prepared.run.system)}
    measured_by = protocol(prepared, reference)
    metrics["sampling"] = plain_values(prepared.run.config).get("sampling", {})
    metrics |= {"protocol": measured_by, "fingerprint": fingerprint(measured_by), "notes": notes}
    return Result(metrics, neighbors, np.concatenate(kept) if kept else None)


def protocol(prepared: Prepared, reference: Reference) -> dict[str, Any]:
    """All that decides what the numbers mean, besides the samples themselves."""
    options, system = prepared.options, prepared.run.system
    guidance = {k.removeprefix("guidance_"): v for k, v in system.sampling.items() if k.startswith("guidance_")}
    return {
        "version": VERSION,
        "features": prepared.features.kind,
        "features_sha256": prepared.features.sha256,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "num_samples": options.num_samples,
        "class_balance": "none" if prepared.labels is None else options.balance,
        "guidance": dict(sorted(guidance.items())) if guidance.get("scale", 1.0) != 1.0 else "none",
        "ema": dict(prepared.run.config["train"]).get("ema_decay", 0.0) or "none",
        "pixels": options.pixels,
    }


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that two protocols share only if they are the same."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def cache_bytes(system: System) -> int:
    """What the network remembers of one image while it is drawn, guidance included, in bytes."""
    feed = system.sampler.feed
    if not feed.remembers:
        return 0
    rows = 1 + (system.drawing().guidance_scales is not None)
    decoder = system.sampler.generator.decoder
    state = jax.eval_shape(lambda: decoder.init_state(rows, feed.max_len, feed.max_step_len))
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Sampler:
    """Batches of samples [B, H, W, C] in [-1, 1], drawn on all devices at once, and how long they took."""

    def __init__(self, prepared: Prepared):
        self._run, self._labels, self._count = prepared.run, prepared.labels, prepared.options.num_samples
        self._mesh = make_mesh({"data": -1})
        devices = self._mesh.devices.size
        self._size = -(-min(prepared.options.batch_size, self._count) // devices) * devices
        self._params = jax.device_put(self._run.params, replicated(self._mesh))
        self._seconds: list[float] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        """All samples, in the order of their labels."""
        for index, first in enumerate(range(0, self._count, self._size)):
            yield self._draw(index)[: self._count - first]

    def speed(self) -> dict[str, float]:
        """`images_per_second`, of batches after the first, which compiles, and `network_evaluations_per_image`."""
        if len(self._seconds) == 1:
            self._draw(0)
        mean = float(np.mean(self._seconds[1:]))
        steps = len(self._run.system.sampler.feed.chunks)
        return {"images_per_second": self._size / mean, "network_evaluations_per_image": steps}

    def _draw(self, index: int) -> np.ndarray:
        start, system, sharding = (
            time.perf_counter(),
            self._run.system,
            batch_sharding(self._mesh),
        )
        key = jax.random.fold_in(jax.random.key(self._run.config["seed"]), index)
        drop, condition = np.full(self._size, self._labels is None), None
        if self._labels is not None:
            rows = index * self._size + np.arange(self._size)
            condition = jax.device_put(self._labels[np.minimum(rows, self._count - 1)], sharding)
        placed = jax.device_put(drop, sharding)
        tokens = compiled(system.sample)(self._params, key, condition, placed, system.drawing(), None)
        tokens = jax.device_put(tokens, sharding)
        images = np.asarray(compiled(system.tokenizer.decode)(self._params["tokenizer"], tokens))
        self._seconds.append(time.perf_counter() - start)
        return images


def _labels(run: Run, data: Dataset, options: SampleOptions) -> np.ndarray | None:
    """[N] classes, or None where the model has no condition."""
    if not hasattr(run.system.model.generator.condition, "num_classes"):
        return None
    if options.balance == "even":
        return (np.arange(options.num_samples) % run.system.facts.num_classes).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(data.train))
    chosen = np.resize(order, options.num_samples)
    parts = [data.train.take(chosen[i : i + 512])["label"] for i in range(0, len(chosen), 512)]
    return np.concatenate(parts).astype(np.int32)


def _notes(prepared: Prepared, reference: Reference) -> list[str]:
    """What a reader should know of the numbers."""
    notes, size = [], len(reference.pool.mean)
    for count, what in ((prepared.options.num_samples, "samples"), (reference.pool.count, "images of the reference")):
        if 0 < count <= size:
            notes.append(
                f"{count} {what} give a singular covariance of {size} features: FID is far above that of many; use {size + 1} at "
                "the very least."
            )
    if prepared.options.neighbors and "image" not in prepared.data.train[0]:
        notes.append("The training data are tokens, so the training images nearest to samples were not looked for.")
    if reference.manifold is None:
        notes.append(f"{reference.name} holds no images, so there is no precision, recall, density or coverage.")
    elif min(prepared.options.num_samples, len(reference.manifold)) <= DENSITY_K:
        notes.append(f"Precision, recall, density and coverage need more than {DENSITY_K} samples and images.")
    return notes
