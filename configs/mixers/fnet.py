"""Text by attention and causal Fourier mixing in turns (FNetAR, S002, arXiv:2107.10932; FNet, arXiv:2105.03824)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Every other layer has no attention, but transforms 16 bytes of its past; attention has relative biases.

    `python train.py --config=configs/mixers/fnet.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(
        kind="softmax : fnet",
        softmax=dict(num_heads=4, rope_base=0.0, bias_distance=64),
        fnet=dict(num_samples=16, stride=2, unitary=True),
    )
    return text.language_model(variant, mixer)
