"""ar_jax: autoregressive modelling in JAX, as parts that combine.

config = ar_jax.get_config("configs/digits.py:smoke")
run = ar_jax.train(config, "runs/digits")     # or ar_jax.load("runs/digits")
images = run.sample(labels=[0, 1, 2])         # [3, H, W, C] in [-1, 1]
nats = run.log_prob(images, labels=[0, 1, 2])
"""

from ar_jax.config import UsageError, get_config
from ar_jax.run import Run, build_run, load, train

__all__ = ["Run", "UsageError", "build_run", "get_config", "load", "train"]
