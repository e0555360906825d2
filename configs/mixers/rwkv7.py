"""Text by RWKV-7's generalised delta rule (Goose, arXiv:2503.14456)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Time mixing of RWKV-7 in blocks with a gated MLP; its channel mixing is left out.

    `python train.py --config=configs/mixers/rwkv7.py:smoke --workdir=DIR`: 40 steps to 4.85 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="rwkv7", num_heads=4, value_residual=True)
    return text.language_model(variant, mixer, norm="layer", learned_positions=False, target_positions=False)
