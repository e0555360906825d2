"""Text by the gated delta rule (gated DeltaNet, arXiv:2412.06464)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A memory of constant size that replaces what it holds under a key; `model.mixer.decay` and `num_writes` are its kin.

    `python train.py --config=configs/mixers/delta.py:smoke --workdir=DIR`: 40 steps to 5.08 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="delta", num_heads=4)
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
