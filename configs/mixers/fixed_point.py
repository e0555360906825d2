"""Digits from masks by attention that is refined to a fixed point (SELF-Transformer, S076, arXiv:2507.13569)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Each layer iterates its attention, an image as often as it needs, at most 16 times.

    `python train.py --config=configs/mixers/fixed_point.py:smoke --workdir=DIR`: 40 steps to 2.54 bits per dimension held out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="fixed_point", num_heads=4, tolerance=1e-3, max_iterations=16)
    return config
