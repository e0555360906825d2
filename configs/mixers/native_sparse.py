"""Text by native sparse attention: means of blocks, chosen blocks and a window (arXiv:2502.11089)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The bytes' decoder with the mixer changed; blocks of 8 bytes, of which 4 are read.

    `python train.py --config=configs/mixers/native_sparse.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="native_sparse", num_heads=4, block_size=8, num_blocks=4, window=16))
