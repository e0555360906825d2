"""Trains a config: python train.py --config=configs/digits.py[:variant] --workdir=DIR [--config.section.key=value ...].

The same command goes on where a run in DIR was stopped. --profile=10 traces so many steps into DIR/profile, for XProf and
TensorBoard, and prints the operations that took the longest.
"""

from typing import Any

from ar_jax import command


def main(config: Any, workdir: str) -> None:
    """Trains."""
    from ar_jax import run

    trained = run.train(config, workdir)
    print(f"done: {workdir} holds step {trained.step}; evaluate it with: python eval.py --workdir={workdir}")


if __name__ == "__main__":
    command.run(main)
