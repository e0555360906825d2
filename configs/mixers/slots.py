"""Text by gated slot attention (GSA, arXiv:2409.07146)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Each head has 16 slots, which fade as much as is written to them.

    `python train.py --config=configs/mixers/slots.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="slots", num_heads=4, num_slots=16))
