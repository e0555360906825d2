"""What the configs of classifiers have in common: ImageNet, MNIST or the digits, and how each is trained."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.recipes.images import epochs, imagenet

DATA: dict[str, dict[str, Any]] = {
    "mnist": dict(kind="idx"),
    "smoke": dict(kind="digits"),
}
TRAINING = {
    "mnist": (1000, 50, 64, 2e-3),
    "smoke": (200, 20, 64, 3e-3),
}  # steps, warm-up, batch size, peak learning rate


def recipe(
    variant: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    training: tuple[Any, ...] | None = None,
) -> ConfigDict:
    """The training of any classifier: 300 epochs of ImageNet at 224 x 224 (DeiT's, arXiv:2012.12877, without its mixing of
    images and its augmentations other than shifts and mirrors), or less of `data`.

    Args:
      variant: a key of DATA, or another for ImageNet.
      model: `config.model`.
      data: `config.data`; None takes what DATA has for the variant, or else ImageNet.
      training: steps, warm-up, batch size and peak learning rate; None takes TRAINING's.
    """
    published = variant not in DATA and data is None
    config = ConfigDict()
    config.seed = 0
    config.data = dict(data or DATA.get(variant) or imagenet(224))
    config.model = dict(model)
    config.objective = dict(kind="classification", label_smoothing=0.1)
    if published or variant == "mnist":
        config.objective.shift = 0.125
    batch_size, learning_rate = 1024, 1e-3
    num_steps, warmup_steps = epochs(300, batch_size), epochs(20, batch_size)
    if not published:
        num_steps, warmup_steps, batch_size, learning_rate = training or TRAINING[variant]
    config.optimizer = dict(kind="adamw", learning_rate=learning_rate, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=warmup_steps)
    config.train = dict(num_steps=num_steps, batch_size=batch_size, log_every_steps=20)
    config.checkpoint = dict(every_steps=5000 if published else 500)
    config.eval = dict(batch_size=50 if published else 180, every_steps=0)
    config.mesh = dict(data=-1)
    return config
