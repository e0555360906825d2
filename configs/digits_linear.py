"""Digits by linear attention, elu + 1 feature map, a state of constant size (arXiv:2006.16236)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The digits' decoder with the mixer changed.

    `python train.py --config=configs/digits_linear.py:smoke --workdir=DIR`: 40 steps to 2.53 bits per dimension held out.
    """
    config = digits.get_config(variant)
    config.model.mixer = dict(kind="linear", num_heads=4, feature_map="elu", normalize=True)
    return config
