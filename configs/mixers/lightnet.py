"""Text by an additive recurrence, keys that are a running softmax over time (LightNet, S192, arXiv:2405.21022)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A decoder of LightNet layers with rotated keys (MD-LRPE, on the one axis that text has).

    `python train.py --config=configs/mixers/lightnet.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="lightnet", num_heads=4, rotation="cosine"))
