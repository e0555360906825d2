"""The Neighborhood Attention Transformer (NAT, S193, arXiv:2204.07143), a classifier of images."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.models.vision.nat import SIZES
from configs.recipes.classifiers import recipe

SMALL = dict(dim=16, depths=(1, 2), num_heads=(1, 2), kernel_size=3)
VARIANTS = {"base": SIZES["base"], "mini": SIZES["mini"], "tiny": SIZES["tiny"], "small": SIZES["small"]}
VARIANTS |= {"mnist": SMALL | dict(dim=32), "smoke": SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """The paper's sizes on ImageNet; "mnist"; "smoke" of the digits, whose grid is 2 x 2 in the first of two stages.

    `python train.py --config=configs/classifiers/nat.py:smoke --workdir=DIR`: 200 steps to 92 % of the held-out digits.
    """
    return recipe(variant, dict(kind="nat") | choose_variant(VARIANTS, variant))
