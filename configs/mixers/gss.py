"""Text by gated state spaces, every fourth layer with attention in blocks (GSS hybrid, S145, arXiv:2206.13947)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS | {"longer": text.VARIANTS["smoke"] | dict(num_steps=400)}


def get_config(variant: str = "base") -> ConfigDict:
    """A state of constant size beside attention in blocks of 32 bytes: sequences may be longer than those of training.

    `python train.py --config=configs/mixers/gss.py:smoke --workdir=DIR`: 40 steps to 4.68 bits per byte held out
    (of tiny_shakespeare).

    `config.eval.data` has `eval.py` read windows of four times the length that was trained on, as well. By
    `python train.py --config=configs/mixers/gss.py:longer --workdir=DIR`, 400 steps: 3.08 bits per byte held out in windows
    of 64 bytes, and 3.05 in windows of 256, which have more bytes behind them on average.
    """
    small = variant in ("smoke", "longer")
    mixer = dict(kind="gss : transformer_xl" if small else "3 gss : transformer_xl")
    config = text.language_model(
        "smoke" if variant == "longer" else variant, mixer, learned_positions=False, target_positions=False
    )
    config.model.mixer.gss = dict(state_dim=32)
    config.model.mixer.transformer_xl = dict(num_heads=4, segment_length=32, memory_length=0)
    config.train.num_steps = VARIANTS[variant]["num_steps"]
    config.eval = dict(data=dict(length=4 * config.data.length))
    return config
