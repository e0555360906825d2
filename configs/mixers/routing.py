"""Text by routed and local attention (Routing Transformer, S024, arXiv:2003.05997)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Two heads read 16 bytes of their cluster, two the latest 16; the clusters' means follow the bytes.

    `python train.py --config=configs/mixers/routing.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(
        variant, dict(kind="routing", num_heads=4, local_heads=2, num_clusters=4, window=16, decay=0.99)
    )
