"""The smallest thing that can be trained: two layers on noisy sums. `python toy_training.py WORKDIR` runs it."""

from __future__ import annotations

import argparse
import sys
import time

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ar_jax.config import UsageError
from ar_jax.training import fit


class Toy:
    """Regression with noise from the step's key, so that a wrong key shows; batches with a NaN give a NaN loss.

    What no gradient trains: a running mean of the inputs, and a count of what was seen.
    """

    def __init__(self, width: int = 8, noise: float = 0.1):
        self.width, self.noise = width, noise

    def init(self, key):
        hidden, head = jnp.split(jax.random.uniform(key, (5, self.width), minval=-1.0), [4])
        network = {"hidden": {"kernel": hidden}, "head": {"kernel": head.T, "bias": jnp.zeros(1)}}
        return network | {"seen": {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}}

    def frozen(self, name):
        return name.startswith("seen/")

    def measured(self, name):
        return False

    def replaced(self, params, batch):
        mean, count = params["seen"]["mean"], params["seen"]["count"]
        return {"seen/mean": 0.9 * mean + 0.1 * batch["x"].mean(axis=0), "seen/count": count + len(batch["x"])}

    def loss(self, params, batch, key, progress):
        noise = self.noise * jax.random.uniform(key, batch["y"].shape)
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"])
        error = (hidden @ params["head"]["kernel"])[:, 0] + params["head"]["bias"] - batch["y"] - noise
        return (
            jnp.mean(error**2),
            {"absolute_error": jnp.mean(jnp.abs(error)), "progress": progress},
            self.replaced(params, batch),
        )


def batches(batch_size: int = 8, seconds: float = 0.0, bad: tuple[int, ...] = ()):
    """An endless shuffled grain iterator; row numbers in `bad` hold NaN."""
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    x[list(bad)] = np.nan

    def row(i):
        time.sleep(seconds / batch_size)
        return {"x": x[i], "y": np.float32(x[i].sum()), "row": np.int32(i)}

    return iter(grain.MapDataset.range(64).seed(3).shuffle().repeat().map(row).batch(batch_size).to_iter_dataset())


def make_config(**train):
    return ml_collections.ConfigDict(
        dict(
            seed=5,
            optimizer=dict(kind="adamw", learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_steps=3),
            train=dict(num_steps=12, batch_size=8, log_every_steps=1, ema_decay=0.9) | train,
            checkpoint=dict(every_steps=4, keep=3),
            eval=dict(every_steps=0),
            mesh=dict(data=-1, rules=[["seen/", []]]),
        )
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.02)
    options = parser.parse_args(arguments)
    config = make_config(num_steps=options.num_steps)
    try:
        fit(Toy(), batches(seconds=options.seconds), config, options.workdir)
    except UsageError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
