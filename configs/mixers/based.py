"""Text by linear attention of Taylor features beside attention in a window (Based, arXiv:2402.18668)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """exp to the second order, of keys in 8 channels, looks far back; every other layer looks at the last 16 bytes exactly.

    `python train.py --config=configs/mixers/based.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    linear = dict(num_heads=4, head_dim=8, feature_map="taylor", epsilon=1e-12)
    mixer = dict(kind="linear : softmax", linear=linear, softmax=dict(num_heads=4, window=16))
    config = text.language_model(variant, mixer)
    config.model.mixer.linear.value_dim = config.model.embed_dim // 4
    return config
