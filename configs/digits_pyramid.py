"""Digits by next-scale prediction, 1x1 to 8x8 (VAR, arXiv:2404.02905, on pixels instead of codes)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Four steps an image, each scale at once. The bits are a bound: they pay for the coarse scales, too.

    `python train.py --config=configs/digits_pyramid.py:smoke --workdir=DIR`: 40 steps to 2.99 bits per dimension held out.
    """
    config = digits.get_config(variant)
    config.tokenizer = dict(kind="pixel_pyramid", sides=(1, 2, 4, 8))
    config.order = dict(kind="next_scale")
    return config
