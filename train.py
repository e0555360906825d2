"""Trains a config: python train.py --config=configs/digits.py[:variant] --workdir=DIR [--config.section.key=value ...].

The same command goes on where a run in DIR was stopped.
"""

from typing import Any

from absl import flags

from ar_jax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "the directory of the run: config, checkpoints, metrics, pictures", required=True)


def main(config: Any) -> None:
    """Trains."""
    from ar_jax import run

    trained = run.train(config, _WORKDIR.value)
    print(f"done: {_WORKDIR.value} holds step {trained.step}; evaluate it with: python eval.py --workdir={_WORKDIR.value}")


if __name__ == "__main__":
    command.run(main)
