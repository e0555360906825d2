"""A decoder of the smallest size on digits, whose weights pretend to be official."""

from pathlib import Path

import ar_jax

VARIANTS = {"base": 16, "smoke": 8}
DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"


def get_config(variant="base"):
    config = ar_jax.get_config(f"{DIGITS}:smoke")
    config.model.embed_dim = VARIANTS[variant]
    config.model.mixer.num_heads = 2
    config.train.ema_decay = 0.9
    config.train.num_steps = 1
    config.optimizer = dict(kind="adamw", learning_rate=1e-3)
    config.schedule = dict(kind="constant")
    return config
