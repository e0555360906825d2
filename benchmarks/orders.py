"""One backbone, one tokenizer, one budget, every order: python benchmarks/orders.py [--data mnist cifar10] [--seeds 3].

On each data set a VQ tokenizer of 8 x 8 codes is trained, and one of scales of 1, 2, 4 and 8 with the same encoder and decoder
for "next scale"; and a classifier, whose features compare samples. Then the same decoder is trained with each order (same
parameters up to a few embeddings, same images, same number of steps), by each seed. Writes orders_DATA.md, a table of means
and spreads, and orders_DATA.png, a row of samples and one growing sample per order.

Likelihoods of orders that keep the image's tokens are exact; a shuffled order's is the mean over one drawn permutation per
image. "digits" needs no tokenizer: a token is a pixel, and next scale's likelihood a bound. A row is kept in .cache/orders as
soon as it is measured: a run that was interrupted goes on there. --fresh measures all anew. Hours on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from ar_jax import run  # noqa: E402
from ar_jax.evaluation import pictures, reference, report, samples  # noqa: E402
from ar_jax.evaluation.classifier import train_classifier  # noqa: E402
from ar_jax.evaluation.features import read_features  # noqa: E402
from ar_jax.evaluation.statistics import Moments, frechet_distance  # noqa: E402
from ar_jax.run import Run  # noqa: E402
from ar_jax.system import compiled  # noqa: E402
from configs import digits  # noqa: E402
from configs.tokenizers import vqgan  # noqa: E402

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "orders"
SHARED = Path(os.environ.get("AR_JAX_DATA", ROOT.parent / "shared" / "data"))
SCALES = "next scale"
ORDERS: dict[str, dict[str, Any]] = {
    "raster": {},
    "column": {"order": {"kind": "column"}},
    "right to left": {"order": {"kind": "right_to_left"}},
    "diagonal": {"order": {"kind": "diagonal"}},
    "spiral": {"order": {"kind": "spiral"}},
    "spiral, outward": {"order": {"kind": "spiral", "outward": True}},
    "random": {"order": {"kind": "random"}},
    "raster after permuted training": {"objective": {"kind": "permuted"}},
    "nearest": {"order": {"kind": "nearest"}},
    "diagonal, parallel": {"order": {"kind": "diagonal", "parallel": True}},
    "subsample": {"order": {"kind": "subsample"}},
    "parallel groups": {"order": {"kind": "parallel_groups"}},
    "blocks (rows)": {"order": {"kind": "blocks"}},
    "patches of 4 x 4, spiral": {"order": {"kind": "patches", "over": {"kind": "spiral"}}},
    "locality, 16 steps": {"order": {"kind": "locality", "num_steps": 16}},
    SCALES: {"order": {"kind": "next_scale"}},
    "random in 8 sets, masked": {"order": {"kind": "random", "num_steps": 8}, "objective": {"kind": "masked"}},
}
BATCH = 180
NUM_HELD_OUT = 2000  # of MNIST's 10,000
BACKBONE = dict(embed_dim=64, num_layers=3)
SHUFFLED = ("random", "locality, 16 steps", "random in 8 sets, masked")
COLUMNS = {  # metric: heading, digits behind the point
    "bits": ("held-out bits", 3),
    "FID": ("FID", 2),
    "spatial_FID": ("spatial FID", 2),
    "class_accuracy": ("accuracy of samples", 3),
    "evaluations": ("network evaluations", 0),
    "images_per_second": ("images a second", 0),
    "cache": ("cache, KiB", 0),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each order gets."""

    num_steps: int
    num_samples: int
    tokenizer_steps: int
    classifier_steps: int


def data_of(name: str) -> dict[str, Any]:
    """`config.data`; MNIST's images get a margin of two pixels, so that their sides can be halved twice more."""
    if name == "digits":
        return dict(kind="digits")
    if name == "cifar10":
        return dict(kind="npz", path=str(SHARED / "cifar10" / "cifar10_first4000_first1000.npz"))
    file = KEPT / "mnist_32.npz"
    if not file.exists():
        from ar_jax.data.idx import load_idx

        data = load_idx(str(SHARED / "mnist"))
        arrays = {}
        for split, source in (("train", data.train), ("test", data.test)):
            batch = source.take(np.arange(len(source) if split == "train" else NUM_HELD_OUT))
            images = np.round((np.asarray(batch["image"]) + 1) * 127.5).astype(np.uint8)
            arrays[f"{split}_images"] = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
            arrays[f"{split}_labels"] = np.asarray(batch["label"])
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **arrays)
    return dict(kind="npz", path=str(file))


def reference_of(name: str, classifier: Path) -> Path:
    """The statistics of all training images' features, computed once: samples are not compared with single images here."""
    file = classifier / "reference.npz"
    if not file.exists():
        data = run.load_data({"seed": 0, "data": data_of(name), "optimizer": {}, "schedule": {}, "train": {}})
        features = read_features("small", str(classifier), data)
        found = reference.open_reference("train", data, features, True)()
        assert found.spatial is not None
        pool, spatial = found.pool, found.spatial
        arrays = dict(mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
        arrays[reference.FEATURES_SHA256] = np.asarray(features.sha256)
        np.savez(file, **arrays)
    return file


def tokenizer_of(name: str, scales: bool, budget: Budget) -> dict[str, Any]:
    """`config.tokenizer`: pixels, or the directory of a tokenizer that is trained where it is missing."""
    if name == "digits":
        return dict(kind="pixel_pyramid", sides=(1, 2, 4, 8)) if scales else dict(kind="pixels")
    workdir = KEPT / f"{name}_{'scales' if scales else 'vq'}_{budget.tokenizer_steps}"
    quantizer = vqgan.CODES
    if scales:
        quantizer = dict(kind="multi_scale_vq", vocab_size=256, channels=8, patch_nums=(1, 2, 4, 8), num_phi=4)
        quantizer |= dict(ema_decay=0.95, revive_below=0.1)
    config = vqgan.recipe("fashion", dict(kind="autoencoder") | vqgan.SMALL | dict(quantizer=quantizer))
    config.data = data_of(name)
    config.train.update(num_steps=budget.tokenizer_steps)
    run.train(config, workdir)
    return dict(workdir=str(workdir))


def config_for(name: str, order: str, seed: int, budget: Budget, classifier: Path) -> ConfigDict:
    """The digits config, with the order's changes, on a data set."""
    config = digits.get_config()
    config.seed = seed
    config.data = data_of(name)
    config.tokenizer = tokenizer_of(name, order == SCALES, budget)
    config.model.update(BACKBONE)
    config.train.update(num_steps=budget.num_steps, log_every_steps=budget.num_steps)
    drawn = dict(num_samples=budget.num_samples, classifier=str(classifier), neighbors=0)
    config.eval = dict(batch_size=BATCH, samples=drawn | dict(reference=str(reference_of(name, classifier))))
    for section, values in ORDERS[order].items():
        config[section] = ConfigDict(values)
    return config


def measure(name: str, order: str, seed: int, budget: Budget, classifier: Path, folder: Path) -> dict[str, float]:
    """One row, and its pictures in the folder."""
    start = time.monotonic()
    trained = run.train(config_for(name, order, seed, budget, classifier))
    assert isinstance(trained, Run)
    data = run.load_data(trained.config)
    prepared = samples.prepare(trained, data)
    assert prepared is not None
    found = samples.measure(prepared).metrics
    bits = next(value for key, value in report.held_out(trained, data).items() if key.startswith("bits_per"))
    np.savez(folder / "pictures.npz", *pictures_of(trained))
    return {
        "bits": bits,
        **{key: found[key] for key in ("FID", "spatial_FID", "class_accuracy")},
        "evaluations": found["network_evaluations_per_image"],
        "cache": found["cache_bytes_per_image"] / 1024,
        "seconds": time.monotonic() - start,
    }


def reconstructed(name: str, budget: Budget, classifier: Path) -> dict[str, float]:
    """FID and accuracy of the held-out images through the tokenizer and back: what no order can be expected to beat."""
    data = run.load_data(config_for(name, "raster", 0, budget, classifier))
    tokenizer = run.load(tokenizer_of(name, False, budget)["workdir"])
    features = read_features("small", str(classifier), data)
    found: dict[str, Moments] = {}
    right = 0
    for first in range(0, len(data.test), BATCH):
        batch = data.test.take(np.arange(first, min(first + BATCH, len(data.test))))
        made = reference.to_values(tokenizer.reconstruct(batch["image"]), True)
        told = [*features.of([made])]
        for kind in ("pool", "spatial"):
            values = np.concatenate([one[kind] for one in told])
            found.setdefault(kind, Moments(values.shape[1])).add(values)
        classes = np.concatenate([one["probabilities"] for one in told]).argmax(axis=1)
        right += int((classes == batch["label"]).sum())
    real = reference.open_reference(str(reference_of(name, classifier)), data, features, True)()
    assert real.spatial is not None
    return {
        "FID": frechet_distance(found["pool"].gaussian(), real.pool),
        "spatial_FID": frechet_distance(found["spatial"].gaussian(), real.spatial),
        "class_accuracy": right / len(data.test),
    }


def speeds(name: str, orders: Sequence[str], budget: Budget, classifier: Path, rounds: int = 5) -> dict[str, float]:
    """Images a second by order: medians over rounds, in each of which every order has its turn, with fresh parameters."""
    labels = np.arange(BATCH) % 10
    runs = {order: run.build_run(config_for(name, order, 0, budget, classifier)) for order in orders}
    times: dict[str, list[float]] = {order: [] for order in orders}
    for turn in range(rounds + 1):  # the first one compiles
        for order, fresh in runs.items():
            assert isinstance(fresh, Run)
            began = time.perf_counter()
            fresh.sample(labels, seed=turn)
            times[order].append(time.perf_counter() - began)
    return {order: BATCH / statistics.median(times[order][1:]) for order in orders}


def pictures_of(trained: Run) -> list[np.ndarray]:
    """A sample of each class, and how one of them grew."""
    rows, tokens = report.draw_samples(trained)
    grown = report.growing(trained, tokens, index=3 * report.PER_CLASS, frames=10)
    return [np.stack([images[0] for _, images in rows]), np.stack([image for _, image in grown])]


def table(
    name: str,
    rows: dict[str, list[dict[str, float]]],
    budget: Budget,
    fast: Mapping[str, float],
    best: Mapping[str, float] | None,
) -> str:
    """The page."""
    lines = [
        f"<!-- written by: python benchmarks/orders.py --data {name} --steps {budget.num_steps} --samples "
        f"{budget.num_samples} --seeds {max(map(len, rows.values()))} -->",
        "",
        f"| order | {' | '.join(heading for heading, _ in COLUMNS.values())} |",
        f"| --- {'| ---: ' * len(COLUMNS)}|",
    ]
    for order, seeds in rows.items():
        cells = []
        for key, (_, places) in COLUMNS.items():
            values = [fast[order]] if key == "images_per_second" else [row[key] for row in seeds]
            spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 and places else ""
            cells.append(f"{statistics.mean(values):.{places}f}{spread}")
        note = " (mean over orders)" if order in SHUFFLED else ""
        note = " (a bound)" if name == "digits" and order == SCALES else note
        lines.append(f"| {order} | {cells[0]}{note} | {' | '.join(cells[1:])} |")
    if best is not None:
        cells = [f"{best[key]:.{places}f}" if key in best else "" for key, (_, places) in COLUMNS.items()]
        lines.append(f"| *held-out images, reconstructed* | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist", "cifar10"), default=["mnist", "cifar10"])
    parser.add_argument("--only", nargs="+", choices=ORDERS, default=list(ORDERS), metavar="ORDER")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--classifier-steps", type=int, default=500)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    budget = Budget(arguments.steps, arguments.samples, arguments.tokenizer_steps, arguments.classifier_steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.data:
        classifier = KEPT / f"{name}_classifier_{budget.classifier_steps}"
        if arguments.fresh or not classifier.exists():
            data = run.load_data({"seed": 0, "data": data_of(name), "optimizer": {}, "schedule": {}, "train": {}})
            print(name, train_classifier(data, classifier, num_steps=budget.classifier_steps), flush=True)
        rows: dict[str, list[dict[str, float]]] = {order: [] for order in arguments.only}
        for seed in range(arguments.seeds):
            for order in arguments.only:
                folder = KEPT / f"{name}, {order}, seed {seed}, {budget.num_steps} steps, {budget.num_samples} samples"
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / "row.json"
                if arguments.fresh or not file.exists():
                    row = measure(name, order, seed, budget, classifier, folder)
                    file.write_text(json.dumps(row))
                    compiled.cache_clear()  # what Linux lets a process map is soon full of programs
                    jax.clear_caches()
                    print(f"{name}, {order}, seed {seed}: {row}", flush=True)
                rows[order].append(json.loads(file.read_text()))
        fast = speeds(name, arguments.only, budget, classifier)
        best = None if name == "digits" else reconstructed(name, budget, classifier)
        (arguments.out / f"orders_{name}.md").write_text(table(name, rows, budget, fast, best))
        shown = []
        for order in arguments.only:
            folder = KEPT / f"{name}, {order}, seed 0, {budget.num_steps} steps, {budget.num_samples} samples"
            with np.load(folder / "pictures.npz") as kept:
                shown += zip((order, ""), (kept["arr_0"], kept["arr_1"]), strict=True)
        Image.fromarray(pictures.grid(shown, label_inches=2.2)).save(arguments.out / f"orders_{name}.png")


if __name__ == "__main__":
    main()
