"""Text by Mamba-2 (arXiv:2405.21060): a matrix of memory per head that decays at the token's own rate."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Decoder blocks whose mixer is Mamba-2's, with a state of 64 numbers for each channel.

    `python train.py --config=configs/mixers/mamba2.py:smoke --workdir=DIR`: 40 steps to 5.06 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="mamba2", state_dim=64, head_dim=32)
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
