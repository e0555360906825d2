"""What the configs of language models have in common: text, one token a byte, and how the small variants are trained."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.data.files import resolve

SHAKESPEARE = "tiny_shakespeare/input.txt"
VARIANTS = {
    "base": dict(length=256, embed_dim=128, num_layers=4, num_steps=2000, warmup_steps=100, learning_rate=1e-3),
    "smoke": dict(length=64, embed_dim=32, num_layers=2, num_steps=40, warmup_steps=5, learning_rate=5e-3),
}


def text_files() -> str | list[str]:
    """tiny_shakespeare where $AR_JAX_DATA has it, else scikit-learn's descriptions of its own data sets.

    Those are small, English, and present wherever this library is.
    """
    return SHAKESPEARE if resolve(SHAKESPEARE).is_file() else descriptions()


def descriptions() -> list[str]:
    """The files of scikit-learn's descriptions of its own data sets."""
    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "descr"
    return sorted(str(file) for file in folder.glob("*.rst"))


def language_model(variant: str, mixer: Mapping[str, Any], **model: Any) -> ConfigDict:
    """A decoder of these mixers on windows of bytes; `model` are further keys of `config.model`."""
    size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="text", path=text_files(), length=size["length"])
    config.tokenizer = dict(kind="bytes")
    config.order = dict(kind="raster")
    config.model = dict(kind="decoder", embed_dim=size["embed_dim"], num_layers=size["num_layers"], dropout_rate=0.1)
    config.model.mixer = dict(mixer)
    config.model.update(model)
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    config.optimizer = dict(kind="adamw", learning_rate=size["learning_rate"], weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=size["warmup_steps"])
    config.train = dict(num_steps=size["num_steps"], batch_size=32, log_every_steps=20)
    config.checkpoint = dict(every_steps=500)
    config.sampling = dict(temperature=1.0)
    return config
