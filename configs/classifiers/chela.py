"""CHELA (S078, arXiv:2406.08128) on tasks of the Long Range Arena (arXiv:2011.04006): nested lists, and images as pixels."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.classifiers.encoder import BLOCK
from configs.recipes.classifiers import recipe

LISTOPS = dict(kind="listops")
SHORT = dict(kind="listops", min_length=4, max_length=32, max_depth=3, max_arguments=4)
VARIANTS = {  # data, sizes; None takes the recipe's
    "base": (LISTOPS, dict(embed_dim=80, num_layers=6), (60_000, 3_000, 64, 3e-3)),
    "pixels": (
        dict(kind="npz", path="cifar10/cifar10_first4000_first1000.npz"),
        dict(embed_dim=160, num_layers=8),
        (4_000, 200, 64, 3e-3),
    ),
    "smoke": (SHORT, dict(embed_dim=64, num_layers=2), (300, 30, 64, 3e-3)),
}


def get_config(variant: str = "base") -> ConfigDict:
    """ListOps at 500 to 2,000 words; "pixels": CIFAR-10, a token a pixel; "smoke": lists of at most 32 words.

    `python train.py --config=configs/classifiers/chela.py:smoke --workdir=DIR`: 300 steps to 54 % of the
    held-out lists.
    """
    data, size, training = choose_variant(VARIANTS, variant)
    mixer = dict(kind="chela", num_heads=4, z_dim=size["embed_dim"] // 2)
    return recipe(variant, BLOCK | size | dict(mixer=mixer), data, training)
