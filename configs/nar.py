"""NAR (S016, arXiv:2503.10696): from one corner outwards, a diagonal of codes a step, each from its neighbours."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.nar import model_config
from configs.llamagen import SIZES as LLAMA_SIZES
from configs.llamagen import SMALL
from configs.recipes import images
from configs.tokenizers import vqgan

# LlamaGen's networks with a layer, a norm and a head more; "m" is in their code.
SIZES = {name: LLAMA_SIZES[name] for name in ("b", "l", "xl", "xxl")} | {
    "m": dict(num_layers=18, num_heads=16, dim=1024)
}
VARIANTS = {"base": "b", **{name: name for name in SIZES}, "t2i_xl": "xl", "fashion": "fashion", "smoke": "smoke"}


def get_config(variant: str = "base") -> ConfigDict:
    """NAR-B (base), M, L, XL and XXL on ImageNet at 256 x 256: 31 steps an image of 16 x 16 codes.

    The variant "t2i_xl" reads 120 vectors of 2048 numbers of a caption in place of a class. It is for the official weights:
    no data set here has such vectors. Videos are configs/nar_video.py.

    `python train.py --config=configs/nar.py:smoke --workdir=DIR`: 40 steps to 2.34 bits per dimension held out
    (scikit-learn's digits, a token for each pixel; 15 steps an image).

    `python train.py --config=configs/nar.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    small = variant in SMALL
    config = ConfigDict()
    config.seed = 0
    config.order = dict(kind="nearest")
    config.feed = dict(kind="neighbors")
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**(SIZES | SMALL)[name], multiple_of=32 if small else 256)
    config.model.dropout_rate = 0.1
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    config.sampling = dict(temperature=1.0, guidance_scale=1.5 if small else 2.0)
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        return config
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    config.schedule = dict(kind="constant")
    images.train_on_imagenet(config, 256, images.epochs(300, 256), batch_size=256)
    if variant == "t2i_xl":
        caption = dict(num_tokens=120, channels=2048, projection="mlp")
        config.condition = dict(kind="embedding", guidance_dropout_rate=0.1) | caption
        config.sampling = dict(temperature=1.0, guidance_scale=7.5, top_k=1000)
    return config
