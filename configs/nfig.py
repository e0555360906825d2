"""NFIG (S034, arXiv:2503.07076): an image from low to high frequencies, all codes of a band at once."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs import var
from configs.recipes import images
from configs.tokenizers import fr_vae

SIZES = {"d16": "d16", "d20": "d20"}  # VAR's networks, of 310M and 600M parameters (their tables 2 and 3)
SMALL = ("fashion", "smoke")
VARIANTS = {"base": "d16", **SIZES, **{name: name for name in SMALL}}


def get_config(variant: str = "base") -> ConfigDict:
    """NFIG-d16 (base) and d20 on ImageNet at 256 x 256: ten bands of 1 to 16 x 16 codes in 10 network evaluations.

    The paper's code was not at hand. From the paper: the tokenizer's bands, the networks, Adam at 8e-5, 350 epochs in batches
    of 768, guidance (4.5) and the best 990 codes. Our choice: the guidance grows with the bands, as VAR's does; what
    is fed for a band is VAR's, the sum of all bands before, shrunk to its grid.

    `python train.py --config=configs/nfig.py:smoke --workdir=DIR`: 40 steps to 4.81 bits per dimension held out, a
    bound (scikit-learn's digits as a residual pyramid of the bands of 1, 2, 4 and 8 pixels a side).

    `python train.py --config=configs/nfig.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/fr_vae; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    config = var.get_config(name)
    if name in SMALL:
        plain = dict(kind="residual_pyramid", sides=(1, 2, 4, 8), frequency_bands=True)
        images.train_small(config, name, "fr_vae", plain)
        return config
    config.tokenizer = dict(kind="autoencoder") | fr_vae.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=8e-5, b2=0.95, weight_decay=0.05, clip_norm=2.0)
    config.train.num_steps = images.epochs(350, 768)
    config.train.batch_size = 768
    config.schedule.warmup_steps = config.train.num_steps // 50
    # Read as VAR's code, on which theirs is built, reads it: cfg=4.5 adds 4.5 (conditional - unconditional).
    config.sampling = dict(top_k=990, guidance_scale=5.5, guidance_schedule="linear_steps")
    return config
