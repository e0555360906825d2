"""Text by RWKV-6: linear attention with a decay per channel that follows the token (Finch, arXiv:2404.05892)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Time mixing of RWKV-6 in blocks with a gated MLP in place of its channel mixing.

    `python train.py --config=configs/mixers/rwkv6.py:smoke --workdir=DIR`: 40 steps to 4.98 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="rwkv6", num_heads=4)
    return text.language_model(variant, mixer, norm="layer", learned_positions=False, target_positions=False)
