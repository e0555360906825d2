"""Evaluates a run: python eval.py --workdir=DIR [--config.sampling.temperature=0.9 ...].

Everything is rebuilt from what train.py left in DIR. The last line of standard output is the metrics as JSON.

--config.eval.samples.num_samples=10000 draws so many samples of an image generator and compares them with real images: FID,
spatial FID, Inception score, precision, recall, density, coverage, nearest training images. See docs/evaluation.md.
"""

import json
from typing import Any

import jax

from ar_jax import command
from ar_jax.training.workdir import read_config


def main(config: Any, workdir: str) -> None:
    """Evaluates."""
    from ar_jax import run

    metrics = run.evaluate(run.load(workdir, config), workdir)
    if jax.process_index() == 0:
        print(f"eval: metrics and pictures are in {workdir}/eval")
        print(json.dumps(metrics))


if __name__ == "__main__":
    command.run(main, read_config)
