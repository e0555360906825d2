"""Text by MesaNet: each token reads the least squares of all before it (arXiv:2506.05233)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Two matrices of constant size for each head, and fifteen turns of conjugate gradients a token.

    `python train.py --config=configs/mixers/mesa.py:smoke --workdir=DIR`: 40 steps to 5.09 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="mesa", num_heads=4, num_iterations=15)
    return text.language_model(variant, mixer, learned_positions=False, target_positions=False)
