"""NPP (S025, arXiv:2412.15321): LlamaGen trained on patches of codes at first, and on single codes at last."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs import llamagen
from configs.recipes import images

# The guidance scale of their samples.
GUIDANCE = {"b": 2.0, "l": 1.75, "xl": 1.7, "xxl": 1.65}
SMALL = tuple(llamagen.SMALL)
VARIANTS = {"base": "b", **{name: name for name in (*GUIDANCE, *SMALL)}}
STAGES = dict(sides=(2, 1), rate=0.5)


def get_config(variant: str = "base") -> ConfigDict:
    """LlamaGen-B (base), L, XL and XXL on ImageNet at 256 x 256: half of the training on patches of 2 x 2 codes.

    The learning rate warms up and falls anew in each stage.

    `python train.py --config=configs/npp.py:smoke --workdir=DIR`: 40 steps to 2.54 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/npp.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan, of which there are 7 x 7: a patch is the whole image, for a tenth of the steps. docs/landmarks.md
    tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    small = name in SMALL
    config = llamagen.get_config(name if small else f"{name}_256")
    stages = dict(sides=(7, 1), rate=0.1) if name == "fashion" else STAGES
    config.objective = dict(kind="next_patch") | stages
    schedule = dict(kind="warmup_stable_decay", decay_fraction=0.2, final_scale=0.1, stage_ends=(stages["rate"], 1.0))
    config.schedule = schedule | dict(warmup_steps=config.schedule.warmup_steps if small else images.epochs(1, 256))
    if not small:
        config.sampling.guidance_scale = GUIDANCE[name]
    return config
