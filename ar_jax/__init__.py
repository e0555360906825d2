"""ar_jax: autoregressive modelling in JAX, as parts that combine.

    run = ar_jax.train(config, "runs/digits")     # or ar_jax.load("runs/digits")
    images = run.sample(labels=[0, 1, 2])         # [3, H, W, C] in [-1, 1]
    nats = run.log_prob(images, labels=[0, 1, 2])
"""

from ar_jax.run import Run, build_run, load, train

__all__ = ["Run", "build_run", "load", "train"]
