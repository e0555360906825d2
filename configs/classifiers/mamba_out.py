"""MambaOut (arXiv:2405.07992), a classifier of images by gated convolutions."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.models.vision.gated_cnn import SIZES
from configs.recipes.classifiers import recipe

SMALL = dict(dims=(16, 32), depths=(1, 1), kernel_size=3)
VARIANTS = {"base": SIZES["base"]} | {name: SIZES[name] for name in ("femto", "kobe", "tiny", "small")}
VARIANTS |= {"mnist": SMALL | dict(depths=(2, 2)), "smoke": SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """The paper's sizes on ImageNet; "mnist"; "smoke" of the digits.

    `python train.py --config=configs/classifiers/mamba_out.py:smoke --workdir=DIR`: 200 steps to 91 % of the held-out digits.
    """
    return recipe(variant, dict(kind="mamba_out") | choose_variant(VARIANTS, variant))
