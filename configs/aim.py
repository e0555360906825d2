"""AiM (S082, arXiv:2408.12245): Mamba-2 predicts the next code of an image, row by row; the class modulates every layer."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.aim import model_config
from configs.recipes import images
from configs.tokenizers import vqgan

# Their models: width, layers, and how many projections of the class the layers share (adaLN-group; 0: each has its own).
SIZES = {
    "b": dict(dim=768, num_layers=24),
    "l": dict(dim=1024, num_layers=48, adaln_groups=4),
    "xl": dict(dim=1536, num_layers=48, adaln_groups=4),
    "1b": dict(dim=2048, num_layers=48, adaln_groups=4),  # in the paper alone: neither code nor weights are published
}
SMALL = {
    "fashion": dict(dim=128, num_layers=6, adaln_groups=2, state_dim=32, head_dim=32),
    "smoke": dict(dim=64, num_layers=2, adaln_groups=2, state_dim=16, head_dim=32),
}
VARIANTS = {"base": SIZES["b"], **SIZES, **SMALL}


def get_config(variant: str = "base") -> ConfigDict:
    """AiM-B (base), L, XL and 1B on ImageNet at 256 x 256. Memory and time of a step do not grow with the image.

    The official sampling gives a code the place behind its own, which it did not have in training. Here both have the same.
    `python -m ar_jax.interop.convert --system=aim_as_sampled` takes official weights with the places of their sampling.

    Not as published: outputs of mixers do not start smaller in deeper networks, and what each layer adds to a shared
    projection of the class starts at zero.

    `python train.py --config=configs/aim.py:smoke --workdir=DIR`: 40 steps to 2.12 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/aim.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="raster")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**choose_variant(VARIANTS, variant))
    config.head = dict(kind="categorical", use_bias=False, tied=True)
    config.objective = dict(kind="next_token")
    if variant in SMALL:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        config.sampling = dict(temperature=1.0, guidance_scale=1.5)
        return config
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    num_steps = images.epochs(350, 2048)
    config.optimizer = dict(kind="adamw", learning_rate=8e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="warmup_stable_decay", decay_fraction=1.0)  # a line down to 0
    images.train_on_imagenet(config, 256, num_steps, batch_size=2048)
    config.sampling = dict(temperature=1.0, top_k=600, top_p=0.98, guidance_scale=5.0)
    return config
