"""What the configs of image generators have in common: ImageNet, and how the small variants are trained."""

import importlib
from typing import Any

from ml_collections import ConfigDict

IMAGENET_SIZE = 1_281_167
TOKENIZERS, SHARDS = "runs/tokenizers", "runs/shards"  # where the "fashion" variants look for what comes before them
SMALL = {"fashion": (800, 60, 64, 2e-3), "smoke": (40, 5, 64, 5e-3)}  # steps, warm-up, batch size, peak learning rate


def imagenet(image_size: int) -> dict[str, Any]:
    """ImageNet's images, their centre squares at this size, as tensorflow_datasets prepares them."""
    return dict(kind="tfds", builder="imagenet2012", test_split="validation", image_size=image_size, flip=True)


def trained(name: str) -> dict[str, Any]:
    """The tokenizer that the "fashion" variant of configs/tokenizers/`name`.py has trained."""
    config = importlib.import_module(f"configs.tokenizers.{name}").get_config("fashion")
    return config.tokenizer.to_dict() | dict(workdir=f"{TOKENIZERS}/{name}")


def shards(name: str) -> dict[str, Any]:
    """The tokens that `python -m ar_jax.tokenize` has written with a tokenizer of this name."""
    return dict(kind="token_shards", path=f"{SHARDS}/{name}")


def clustered(name: str, workdir: str, num_clusters: int) -> dict[str, Any]:
    """The tokenizer that `python -m ar_jax.cluster` has made of that one."""
    tokenizer = trained(name)
    tokenizer["quantizer"] |= dict(num_clusters=num_clusters, ema_decay=0.0, revive_below=0.0)
    return tokenizer | dict(workdir=f"{TOKENIZERS}/{workdir}")


def epochs(count: float, batch_size: int) -> int:
    """Steps of so many epochs of ImageNet."""
    return round(count * IMAGENET_SIZE / batch_size)


def train_on_imagenet(
    config: ConfigDict, image_size: int, num_steps: int, batch_size: int, ema_decay: float = 0.0
) -> None:
    """Fills in what all published trainings share; optimizer and schedule are each paper's own."""
    config.data = imagenet(image_size)
    config.train = dict(num_steps=num_steps, batch_size=batch_size, log_every_steps=100, ema_decay=ema_decay)
    config.checkpoint = dict(every_steps=5000)
    config.eval = dict(batch_size=50)
    config.mesh = dict(fsdp=-1)
    config.model.update(dtype="bfloat16", remat="full")


def train_small(config: ConfigDict, variant: str, tokenizer: str, plain: dict[str, Any]) -> None:
    """Fills in data, tokenizer and training: "fashion" takes the tokens of a trained tokenizer, "smoke" a plain one."""
    num_steps, warmup_steps, batch_size, learning_rate = SMALL[variant]
    if variant == "fashion":
        config.data, config.tokenizer = shards(tokenizer), trained(tokenizer)
    else:
        config.data, config.tokenizer = dict(kind="digits"), plain
    config.optimizer = dict(kind="adamw", learning_rate=learning_rate, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=warmup_steps)
    config.train = dict(num_steps=num_steps, batch_size=batch_size, log_every_steps=20)
    config.checkpoint = dict(every_steps=500)
    config.eval = dict(batch_size=180)
