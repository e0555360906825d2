"""Digits in permuted orders at first, in raster order at the end (RAR, arXiv:2411.00776, on pixels instead of codes)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Random orders until half of the training, then ever fewer, raster order from three quarters on.

    `python train.py --config=configs/digits_permuted.py:smoke --workdir=DIR`: 40 steps to 2.88 bits per dimension held out.
    """
    config = digits.get_config(variant)
    config.objective = dict(kind="permuted")
    return config
