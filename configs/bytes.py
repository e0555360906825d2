"""Text, one token a byte: tiny_shakespeare where $AR_JAX_DATA has it, else the texts that ship with scikit-learn.

Those are scikit-learn's descriptions of its own data sets: small, English, and present wherever this library is.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.data.files import resolve

SHAKESPEARE = "tiny_shakespeare/input.txt"
VARIANTS = {
    "base": dict(length=256, embed_dim=128, num_layers=4, num_steps=2000, warmup_steps=100, learning_rate=1e-3),
    "smoke": dict(length=64, embed_dim=32, num_layers=2, num_steps=40, warmup_steps=5, learning_rate=5e-3),
}


def text_files() -> str | list[str]:
    """Where the text is."""
    if resolve(SHAKESPEARE).is_file():
        return SHAKESPEARE
    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "descr"
    return sorted(str(file) for file in folder.glob("*.rst"))


def get_config(variant: str = "base") -> ConfigDict:
    """A decoder of depth 4 and width 128 on windows of 256 bytes; the smoke variant: depth 2, width 32, 64 bytes.

    `python train.py --config=configs/bytes.py:smoke --workdir=DIR`: 40 steps to 5.12 bits per byte held out
    (of scikit-learn's texts).
    """
    size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="text", path=text_files(), length=size["length"])
    config.tokenizer = dict(kind="bytes")
    config.order = dict(kind="raster")
    config.model = dict(kind="decoder", embed_dim=size["embed_dim"], num_layers=size["num_layers"], dropout_rate=0.1)
    config.model.mixer = dict(kind="softmax", num_heads=4)
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    config.optimizer = dict(kind="adamw", learning_rate=size["learning_rate"], weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=size["warmup_steps"])
    config.train = dict(num_steps=size["num_steps"], batch_size=32, log_every_steps=20)
    config.checkpoint = dict(every_steps=500)
    config.sampling = dict(temperature=1.0)
    return config
