"""Text by SparseK attention: the same 16 bytes of the past for all, chosen by their scores (S003, arXiv:2406.16747)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The bytes' decoder with the mixer changed; 16 bytes of the past besides the latest 16.

    `python train.py --config=configs/mixers/sparsek.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="sparsek", num_heads=4, num_keys=16, window=16))
