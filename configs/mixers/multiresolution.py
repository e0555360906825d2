"""Digits from masks by attention at two resolutions (MRA-2, S092, arXiv:2207.10284)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 8 places, a row of the image; 24 of 81 pairs of blocks are exact.

    `python train.py --config=configs/mixers/multiresolution.py:smoke --workdir=DIR`: 40 steps to 2.62 bits per dimension held
    out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="multiresolution", num_heads=4, num_blocks=24, block_size=8)
    return config
