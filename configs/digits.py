"""Class-conditional 8x8 digits, one token a pixel: the model that `make demo` trains."""

from ml_collections import ConfigDict


def get_config(variant: str = "base") -> ConfigDict:
    """A decoder of depth 4 and width 128 on scikit-learn's digits."""
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="digits")
    config.tokenizer = dict(kind="pixels")
    config.order = dict(kind="raster")
    config.feed = dict(kind="auto")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = dict(kind="decoder", embed_dim=128, num_layers=4, dropout_rate=0.1, mixer=dict(kind="softmax", num_heads=4))
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    config.optimizer = dict(kind="adamw", learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=50)
    config.train = dict(num_steps=600, batch_size=64, log_every_steps=20)
    config.checkpoint = dict(every_steps=200)
    config.sampling = dict(temperature=1.0, guidance_scale=1.0)
    return config
