"""Text by factorised polynomial attention (FAST, S091, arXiv:2402.07901)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """1 + s + s^2 / 2 of normalised queries and keys in place of exp(s); feature_map="line" is the first order.

    `python train.py --config=configs/mixers/fast.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).
    """
    config = text.language_model(variant, dict(kind="linear", num_heads=4, feature_map="taylor", qk_norm="plain"))
    config.model.mixer.update(head_dim=8, value_dim=config.model.embed_dim // 4)
    return config
