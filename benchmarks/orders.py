"""One backbone, one budget, every order, on the digits: python benchmarks/orders.py [--steps 200] [--out docs].

Trains the same small decoder with each order (same parameters up to a few embeddings, same training images), and writes
orders_measured.md, a table of held-out bits, network evaluations and seconds per image, and orders_measured.png, a row of
samples and one growing sample per order. Likelihoods of orders that keep the image's tokens are exact; a shuffled
order's is the mean over one drawn permutation per image; the pyramid's is an upper bound. Times are medians of five
rounds, taken in turn at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from ar_jax import run  # noqa: E402
from ar_jax.evaluation import pictures, report  # noqa: E402
from ar_jax.run import Run  # noqa: E402
from configs import digits  # noqa: E402

PYRAMID = {"tokenizer": {"kind": "pixel_pyramid", "sides": (1, 2, 4, 8)}}
SETTINGS: dict[str, dict[str, Any]] = {
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
    "next scale": {"order": {"kind": "next_scale"}} | PYRAMID,
    "random in 8 sets, masked": {"order": {"kind": "random", "num_steps": 8}, "objective": {"kind": "masked"}},
}
EXACT = {"random": "mean over orders", "random in 8 sets, masked": "mean over orders", "next scale": "upper bound"}


def config_for(changes: dict[str, Any], num_steps: int) -> ConfigDict:
    """The digits config at half its width, with the order's changes."""
    config = digits.get_config()
    config.model.update({"embed_dim": 64, "num_layers": 3})
    config.train.update({"num_steps": num_steps, "log_every_steps": num_steps})
    for section, values in changes.items():
        config[section] = ConfigDict(values)
    return config


def train(changes: dict[str, Any], num_steps: int) -> tuple[Run, float]:
    """A run with one order, and its held-out bits per dimension."""
    config = config_for(changes, num_steps)
    trained = run.train(config)
    return trained, report.held_out(trained, run.load_data(config))["bits_per_dim"]


def seconds_per_image(runs: dict[str, Run], rounds: int = 5) -> dict[str, float]:
    """Medians over rounds in which every run samples once, so that a slow moment of the machine is everybody's."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, trained in runs.items():
            start = time.perf_counter()
            _, tokens = report.draw_samples(trained)
            times[name].append((time.perf_counter() - start) / len(tokens))
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}  # the first round compiles


def pictures_of(trained: Run) -> list[np.ndarray]:
    """A sample of each class, and how one of them grew."""
    rows, tokens = report.draw_samples(trained)
    grown = report.growing(trained, tokens, index=3 * report.PER_CLASS, frames=10)
    return [np.stack([images[0] for _, images in rows]), np.stack([image for _, image in grown])]


def main() -> None:
    """Writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    lines = [
        f"<!-- written by: python benchmarks/orders.py --steps {arguments.steps} -->",
        "",
        "| order | held-out bits per dimension | likelihood | network evaluations per image | ms per image | times raster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    runs, bits = {}, {}
    for name, changes in SETTINGS.items():
        runs[name], bits[name] = train(changes, arguments.steps)
        print(f"{name}: {bits[name]:.3f} bits per dimension", flush=True)
    seconds = seconds_per_image(runs)
    for name, trained in runs.items():
        speed = f"{1e3 * seconds[name]:.2f} | {seconds[name] / seconds['raster']:.2f}"
        steps = trained.system.model.order.num_steps
        lines.append(f"| {name} | {bits[name]:.3f} | {EXACT.get(name, 'exact')} | {steps} | {speed} |")
    rows = [row for name, trained in runs.items() for row in zip((name, ""), pictures_of(trained), strict=True)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "orders_measured.md").write_text("\n".join(lines) + "\n")
    Image.fromarray(pictures.grid(rows, label_inches=2.2)).save(arguments.out / "orders_measured.png")


if __name__ == "__main__":
    main()
