"""Text by a linear model that is trained while it reads (TTT-linear, arXiv:2407.04620)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Mini-batches of 16 bytes, whose gradients are all taken at once.

    `python train.py --config=configs/mixers/ttt.py:smoke --workdir=DIR`: 40 steps to 5.03 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="ttt", num_heads=4, mini_batch=16)
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
