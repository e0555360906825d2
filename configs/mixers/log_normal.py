"""Text by linear attention whose weights spread as softmax attention's do (Linear Log-Normal, S018, arXiv:2311.13541)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """exp(alpha q) and exp(beta k), as spread as softmax makes them, averaged with softmax inside blocks (LLN+Diag).

    `python train.py --config=configs/mixers/log_normal.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(
        variant, dict(kind="linear", num_heads=4, feature_map="exp", epsilon=1e-8, block_size=32)
    )
