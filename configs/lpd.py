"""LPD (S116, arXiv:2507.01957): groups of codes of any size in parallel, each beside what is known and far from one another."""

import numpy as np
from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.lpd import model_config
from ar_jax.orders.random import rounded_cosine_sizes
from configs.recipes import images
from configs.tokenizers import vqgan

# Their released models: layers, heads, width. Then image size, steps, repulsion and guidance scale of their samples.
SIZES = {
    "l": dict(num_layers=24, num_heads=16, dim=1024),
    "xl": dict(num_layers=36, num_heads=20, dim=1280),
    "xxl": dict(num_layers=48, num_heads=24, dim=1536),
}
SMALL = {
    "fashion": dict(num_layers=4, num_heads=4, dim=128),
    "smoke": dict(num_layers=2, num_heads=4, dim=64),
}
RELEASED = {
    "l": (256, 20, 2.0, 4.8),
    "xl": (256, 20, 2.0, 4.9),
    "xxl": (256, 20, 3.0, 5.9),
    "l_512": (512, 48, 4.0, 7.3),
    "xl_512": (512, 48, 4.0, 6.0),
}
VARIANTS = {"base": "l", **{name: name for name in RELEASED}, **{name: name for name in SMALL}}
# The sizes of the groups that an example may be cut into in training, from the authors' code: 2x46 is 46 groups of 2.
GROUPS = {
    256: (
        "1x256",
        "1x41 2x46 3x41",
        "1x10 2x7 3x7 4x9 5x11 6x20",
        "1x2 2x2 3x2 4 5x2 6x2 7x2 8x2 9x2 10x3 11x4 12x8",
        "1 2 3 4 5 6 7 8 9 10 11x2 12 13 14x3 15x2 16x3 17x2",
        "1 2 4 5 7 8 10 11 12 14 15 16 17 18x2 19x2 20x3",
        "1 4 6 8 11 13 15 17 19 20 22 23 24x3 25",
        "1 7 11 15 19 22 25 28 30 32 33x2",
        "1 15 24 32 40 45 49 50",
    ),
    512: (
        "1x1024",
        "1x162 2x188 3x162",
        "1x39 2x28 3x31 4x34 5x44 6x80",
        "1x32 2x21 3x21 4x24 5x27 6x37 7x62",
        "1x22 2x15 3x16 4x16 5x19 6x21 7x27 8x55 10",
        "1x15 2x11 3x10 4x12 5x12 6x13 7x14 8x17 9x23 10x33",
        "1x10 2x6 3x7 4x7 5x7 6x7 7x8 8x9 9x9 10x11 11x14 12x26 13x7",
        "1x5 2x4 3x4 4x4 5x3 6x4 7x4 8x5 9x4 10x4 11x6 12x5 13x6 14x7 15x8 16x13 17x10",
        "1x4 2x2 3x3 4x2 5x3 6x3 7x2 8x3 9x3 10x3 11x3 12x3 13x3 14x4 15x4 16x4 17x6 18x6 19x7 20x12",
        "1x2 2x2 3x2 4 5x2 6x2 7 8x2 9x2 10x2 11 12x2 13x2 14x2 15x2 16x2 17x2 18x3 19x2 20x3 21x3 22x3 23x5 24x6 25x8",
        "1x2 2 3 4x2 5 6 7 8x2 9 10 11x2 12 13 14x2 15 16x2 17 18x2 19x2 20 21x2 22x2 23x2 24x2 25x3 26x3 27x5 28x6 29x3",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23x2 24 25 26x2 27 28x2 29x2 30x2 31x2 32x3 33x7 34",
        "1 2 4 6 7 9 10 12 13 15 16 18 19 20 22 23 24 26 27 28 29 30 31 32 33 34 35x2 36 37x2 38x2 39x3 40x4",
        "1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48x2 49x2 50x3",
    ),
}


def sizes_of(groups: str) -> tuple[int, ...]:
    """The sizes that a row of GROUPS tells."""
    pairs = [(*(int(n) for n in group.split("x")), 1)[:2] for group in groups.split()]
    return tuple(np.repeat([size for size, _ in pairs], [count for _, count in pairs]).tolist())


def get_config(variant: str = "base") -> ConfigDict:
    """LPD-L (base), XL and XXL on ImageNet at 256 x 256, sampled in 20 steps; L and XL at 512 x 512, in 48.

    Each example draws the sizes of its groups; the authors draw them for a whole batch on each device.

    `python train.py --config=configs/lpd.py:smoke --workdir=DIR`: 40 steps to 2.51 bits per dimension held out
    (scikit-learn's digits, a token for each pixel, one at a time; sampled in 12 steps).

    `python train.py --config=configs/lpd.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="random")
    config.feed = dict(kind="query")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**(SIZES | SMALL)[name.removesuffix("_512")])
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    if name in SMALL:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        length, num_steps = (49, 10) if name == "fashion" else (64, 12)
        counts = (length, length // 2, length // 4, num_steps, 8)
        rows = tuple(tuple(rounded_cosine_sizes(length, count).tolist()) for count in counts)
        config.objective = dict(kind="random_groups", sizes=rows)
        config.sampling = dict(temperature=1.0, guidance_scale=1.5, guidance_schedule="linear_tokens")
        config.sampling.order = dict(kind="locality", num_steps=num_steps)
        return config
    image_size, num_steps, repulsion, scale = RELEASED[name]
    config.objective = dict(kind="random_groups", sizes=tuple(sizes_of(row) for row in GROUPS[image_size]))
    config.sampling = dict(temperature=1.0, guidance_scale=scale, guidance_schedule="linear_tokens")
    config.sampling.order = dict(kind="locality", num_steps=num_steps, repulsion=repulsion)
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=8e-4, b1=0.9, b2=0.95, weight_decay=0.02, clip_norm=3.0)
    if image_size == 256:
        config.schedule = dict(kind="warmup_stable_decay", decay_fraction=50 / 450, cosine_decay=True)
        config.schedule.update(warmup_steps=images.epochs(50, 2048), final_scale=0.0125)
        images.train_on_imagenet(config, image_size, images.epochs(450, 2048), batch_size=2048)
    else:
        config.schedule = dict(kind="cosine", warmup_steps=images.epochs(1, 2048), final_scale=0.0125)
        images.train_on_imagenet(config, image_size, images.epochs(50, 2048), batch_size=2048)
    return config
