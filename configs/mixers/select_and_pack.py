"""Digits from masks by attention among chosen places, those of some images in one row (SPA, S026, arXiv:2410.23608)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A gate chooses about 70 % of the places; there is room for all.

    `python train.py --config=configs/mixers/select_and_pack.py:smoke --workdir=DIR`: 40 steps to 2.52 bits per dimension held
    out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="select_and_pack", num_heads=4, rate=0.7)
    return config
