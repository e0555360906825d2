"""Digits from masks by strided windows, between sliding and blocked attention (GNA, S199, arXiv:2504.16922)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 2 x 2 places share a window of 4 x 4.

    `python train.py --config=configs/mixers/generalized_neighborhood.py:smoke --workdir=DIR`: 40 steps to 2.47 bits per
    dimension held out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="neighborhood", num_heads=4, kernel_size=4, stride=2)
    return config
