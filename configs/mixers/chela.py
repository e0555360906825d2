"""Text by linear attention over short and long convolutions (CHELA, S078, arXiv:2406.08128)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Filters of 4 and of 64 bytes, and a memory of constant size.

    `python train.py --config=configs/mixers/chela.py:smoke --workdir=DIR`: 40 steps to 5.13 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="chela", num_heads=4, z_dim=32, long_width=64))
