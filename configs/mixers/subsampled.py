"""Text by attention that reads a random part of the bytes while it is trained (SSA, S128, arXiv:2306.01705)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Sixteen bytes from nearby are read in training, all at test.

    `python train.py --config=configs/mixers/subsampled.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="subsampled", num_heads=4, window=16, spread=1.0))
