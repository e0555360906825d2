"""Text by gated state spaces, every other layer with attention in a window (GSS hybrid, S145, arXiv:2206.13947)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A state of constant size beside a window of 32 bytes: sequences may be longer than those of training.

    `python train.py --config=configs/mixers/gss.py:smoke --workdir=DIR`: 40 steps to 5.05 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="gss : softmax", gss=dict(state_dim=32), softmax=dict(num_heads=4, window=32))
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
