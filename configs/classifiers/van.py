"""The Visual Attention Network (arXiv:2202.09741), a classifier of images by large depthwise kernels."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.models.vision.large_kernel import SIZES
from configs.recipes.classifiers import recipe

SMALL = dict(embed_dims=(16, 32), depths=(1, 1), mlp_ratios=(4.0, 4.0))
VARIANTS = {"base": SIZES["b2"], "b0": SIZES["b0"], "b1": SIZES["b1"], "b3": SIZES["b3"]}
VARIANTS |= {"mnist": SMALL | dict(depths=(2, 2)), "smoke": SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """VAN-B2 on ImageNet, and the other sizes; "mnist"; "smoke" of the digits.

    `python train.py --config=configs/classifiers/van.py:smoke --workdir=DIR`: 200 steps to 92 % of the held-out digits.
    """
    return recipe(variant, dict(kind="van") | choose_variant(VARIANTS, variant))
