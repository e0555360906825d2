"""Text by attention to the bytes of the largest scores in a few components of their keys (Loki, S198, arXiv:2406.02542)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """The bytes' decoder that Loki reads: it is trained in full, then `python -m ar_jax.calibrate` measures and ranks.

    `python train.py --config=configs/mixers/loki.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="softmax", num_heads=4))
