"""Digits from masks by neighbourhood attention, a window around each place (NAT, S193, arXiv:2204.07143)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Windows of 3 x 3 places with relative biases; the class is read by all.

    `python train.py --config=configs/mixers/neighborhood.py:smoke --workdir=DIR`: 40 steps to 2.39 bits per dimension held out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="neighborhood", num_heads=4, kernel_size=3, relative_bias=True)
    return config
