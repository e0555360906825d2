"""OAR (S175, arXiv:2504.17069): trained in any order, asked for its own, and trained on in that."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.llamagen import model_config
from configs.recipes import images
from configs.tokenizers import vqgan

SIZES = {
    "base": dict(num_layers=24, num_heads=16, dim=1024),
    "smoke": dict(num_layers=2, num_heads=4, dim=64),
}
# Before and after the orders are distilled.
VARIANTS = {"base": "base", "tuned": "base", "smoke": "smoke", "smoke_tuned": "smoke"}


def get_config(variant: str = "base") -> ConfigDict:
    """A decoder that is asked by a blank token at the place to fill; in each step all places that are left are asked.

    The place whose token it is surest of is filled next. "tuned" goes on where "base" ended, in the orders of the training
    images that were distilled from it:

    `python train.py --config=configs/oar.py:smoke --workdir=runs/oar`: 40 steps to 2.57 bits per dimension held out
    (scikit-learn's digits, in random orders), then
    `python -m ar_jax.distill_orders --workdir=runs/oar --out=runs/oar_orders` and
    `python train.py --config=configs/oar.py:smoke_tuned --workdir=runs/oar_tuned`.

    Not as published: the place to fill is told by a token of its own, by a learned embedding and by rotations, in place of a
    second embedding of the token before; an image's order is that of the likelihoods of its own tokens; no term keeps
    the next place near; sizes and training are LlamaGen's and ours.
    """
    name = choose_variant(VARIANTS, variant)
    small, tuned = name == "smoke", variant.endswith("tuned")
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random")
    config.feed = dict(kind="query")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**SIZES[name], multiple_of=32 if small else 256) | dict(learned_positions=True)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False, confidence="log_probability")
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, confidence_temperature=0.0, order=dict(kind="random", adaptive=True))
    if small:
        images.train_small(config, variant="smoke", tokenizer="", plain=dict(kind="pixels"))
    else:
        config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
        config.optimizer = dict(kind="adamw", learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
        config.schedule = dict(kind="constant")
        images.train_on_imagenet(config, 256, images.epochs(300, 256), batch_size=256)
    if tuned:
        config.data = dict(kind="token_shards", path="runs/oar_orders" if small else f"{images.SHARDS}/oar")
        config.train.update(init_from="runs/oar", num_steps=40 if small else images.epochs(30, 256))
        config.optimizer.learning_rate /= 2
    return config
