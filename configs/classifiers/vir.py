"""ViR, vision retention networks (S080, arXiv:2310.19731), as a classifier: patches that retention reads in raster order."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.classifiers.encoder import BLOCK
from configs.recipes.classifiers import recipe

VARIANTS = {
    "base": dict(embed_dim=768, num_layers=12, patch=16, num_heads=12),
    "small": dict(embed_dim=384, num_layers=12, patch=16, num_heads=6),
    "one_dimension": dict(embed_dim=768, num_layers=12, patch=16, num_heads=12, dimensions=1),
    "mnist": dict(embed_dim=64, num_layers=4, patch=4, num_heads=4),
    "smoke": dict(embed_dim=64, num_layers=2, patch=2, num_heads=4),
}


def get_config(variant: str = "base") -> ConfigDict:
    """ViR-B/16 of ImageNet, retention over rows and columns, and along the patches ("one_dimension"); "mnist"; "smoke".

    `python train.py --config=configs/classifiers/vir.py:smoke --workdir=DIR`: 200 steps to 80 % of the held-out digits.
    """
    size = dict(choose_variant(VARIANTS, variant))
    mixer = {"kind": "vision_retention"} | {key: size.pop(key) for key in ("num_heads", "dimensions") if key in size}
    return recipe(variant, BLOCK | size | dict(mixer=mixer))
