"""PAR (S021, arXiv:2412.15119): the first token of each region one by one, then a token of every region at once."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.par import groups
from configs import llamagen

# LlamaGen's networks; regions along each axis; the guidance scale of their samples, or of the nearest size's.
SIZES = {
    "l_4x": ("l", 2, 1.5),
    "xl_4x": ("xl", 2, 1.5),
    "xxl_4x": ("xxl", 2, 1.435),
    "3b_4x": ("3b", 2, 1.345),
    "3b_16x": ("3b", 4, 1.5),
}
SMALL = {"fashion": ("fashion", (1, 7), 1.5), "smoke": ("smoke", 2, 1.5)}
VARIANTS = {"base": "xl_4x", **{name: name for name in (*SIZES, *SMALL)}}


def get_config(variant: str = "base") -> ConfigDict:
    """PAR-XL-4x (base), L, XXL and 3B, and 3B-16x, on ImageNet at 384 x 384: 147 and 51 evaluations for 24 x 24 codes.

    `python train.py --config=configs/par.py:smoke --workdir=DIR`: 40 steps to 2.94 bits per dimension held out
    (scikit-learn's digits, a token for each pixel; 19 steps an image).

    `python train.py --config=configs/par.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan, 7 x 7 of them in 7 columns; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    network, regions, scale = (SIZES | SMALL)[name]
    config = llamagen.get_config(name if name in SMALL else f"{network}_384")
    config.update(groups(regions))
    config.sampling.guidance_scale = scale
    return config
