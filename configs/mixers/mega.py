"""Text by moving averages and a single head in chunks (Mega, S108, arXiv:2209.10655)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """Mega-chunk: attention reads chunks of 32 bytes, the moving average goes across; post-norm blocks as published.

    `python train.py --config=configs/mixers/mega.py:smoke --workdir=DIR`: 40 steps to 5.08 bits per byte held out
    (of scikit-learn's texts).
    """
    mixer = dict(kind="mega", z_dim=32, ema_dim=8, attention="laplace", chunk_size=32, bias="rotary")
    return text.language_model(variant, mixer, norm="layer", norm_first=False)
