"""Terminator (S043, arXiv:2401.17948), a classifier of images by hyper-kernels as large as they are."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.recipes.classifiers import recipe

VARIANTS = {
    "base": dict(factors=(4, 2, 2, 1, 1)),
    "mnist": dict(factors=(4, 2), groups=4),
    "smoke": dict(factors=(8, 2), groups=4),
}


def get_config(variant: str = "base") -> ConfigDict:
    """The paper's five blocks on CIFAR-10's 32 x 32; "mnist"; "smoke" of the digits.

    `python train.py --config=configs/classifiers/terminator.py:smoke --workdir=DIR`: 200 steps to 88 % of the held-out digits.
    """
    data = dict(kind="tfds", builder="cifar10", test_split="test") if variant == "base" else None
    training = (50_000 * 200 // 64, 1000, 64, 1e-3) if variant == "base" else None
    return recipe(variant, dict(kind="terminator") | choose_variant(VARIANTS, variant), data, training)
