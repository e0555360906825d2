"""Digits row by row, what past rows tell computed once a row (Axial Transformer, S020, arXiv:1912.12180)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Half of the layers are outer pairs along rows and columns, half are inner ones along the row.

    `python train.py --config=configs/mixers/axial_transformer.py:smoke --workdir=DIR`: 40 steps to 2.54 bits per dimension
    held out.
    """
    config = digits.get_config(variant)
    config.model.kind = "axial_transformer"
    config.model.outer_layers = config.model.num_layers = config.model.num_layers // 2
    return config
