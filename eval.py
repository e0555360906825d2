"""Evaluates a run: python eval.py --workdir=DIR [--config.sampling.temperature=0.9 ...].

Everything is rebuilt from what train.py left in DIR. The last line of standard output is the metrics as JSON.
"""

import json
from typing import Any

from absl import flags

from ar_jax import command
from ar_jax.training.workdir import read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of the run", required=True)


def main(config: Any) -> None:
    """Evaluates."""
    from ar_jax import run

    metrics = run.evaluate(run.load(_WORKDIR.value, config), _WORKDIR.value)
    print(f"eval: metrics and pictures are in {_WORKDIR.value}/eval")
    print(json.dumps(metrics))


if __name__ == "__main__":
    command.run(main, config=lambda: read_config(_WORKDIR.value))
