"""A classifier of patches: ViT (arXiv:2010.11929), its class token replaced by the mean of all tokens."""

from typing import Any

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs.recipes.classifiers import recipe

BLOCK: dict[str, Any] = dict(kind="encoder", norm="layer", activation="gelu_exact", gated=False, mlp_bias=True)
VARIANTS = {
    "base": dict(embed_dim=768, num_layers=12, patch=16, num_heads=12),
    "small": dict(embed_dim=384, num_layers=12, patch=16, num_heads=6),
    "mnist": dict(embed_dim=64, num_layers=4, patch=4, num_heads=4),
    "smoke": dict(embed_dim=64, num_layers=2, patch=2, num_heads=4),
}


def get_config(variant: str = "base") -> ConfigDict:
    """ViT-B/16 of ImageNet, "small" ViT-S/16; "mnist"; "smoke" of the digits.

    `python train.py --config=configs/classifiers/encoder.py:smoke --workdir=DIR`: 200 steps to 86 % of the held-out digits.
    """
    size = dict(choose_variant(VARIANTS, variant))
    mixer = dict(kind="softmax", num_heads=size.pop("num_heads"))
    return recipe(variant, BLOCK | size | dict(mixer=mixer))
