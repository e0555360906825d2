"""Token-Shuffle (S035, arXiv:2504.17789): a window of codes is one token of the network, which draws all of them at once."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.llamagen import model_config
from configs.recipes import images
from configs.tokenizers import vqgan

# Their network, of 2.7B parameters with the text's vocabulary; image size and window of each stage of their training.
SIZE = dict(num_layers=20, num_heads=24, dim=3072)
STAGES = {"512": (512, 1), "1024": (1024, 2), "2048": (2048, 2)}
SMALL = {
    "fashion": dict(num_layers=4, num_heads=4, dim=112),
    "smoke": dict(num_layers=2, num_heads=4, dim=64),
}
WINDOWS = {"fashion": (1, 7), "smoke": 2}
VARIANTS = {"base": "1024", **{name: name for name in (*STAGES, *SMALL)}}


def get_config(variant: str = "base") -> ConfigDict:
    """Windows of 2 x 2 codes: 1024 network evaluations for 64 x 64 codes (base, 1024 pixels a side), 4096 for 2048 pixels.

    "512" is the stage before, where each code is a token. Not as published: the authors train Llama on captions and images
    in one stream of tokens; here a class stands in front of the image, or, with config.condition.kind='embedding', the
    vectors of a caption, and rotations have two axes; the training is one on ImageNet.

    `python train.py --config=configs/token_shuffle.py:smoke --workdir=DIR`: 40 steps to 2.24 bits per dimension held out
    (scikit-learn's digits, a token for each pixel; 16 steps an image).

    `python train.py --config=configs/token_shuffle.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan, rows of 7 as one; docs/landmarks.md tells how they are made.
    """
    name = choose_variant(VARIANTS, variant)
    small = name in SMALL
    image_size, window = (0, WINDOWS[name]) if small else STAGES[name]
    config = ConfigDict()
    config.seed = 0
    config.condition = dict(kind="class", guidance_dropout_rate=0.1)
    config.model = model_config(**(SMALL[name] if small else SIZE), multiple_of=32 if small else 256)
    if window == 1:
        config.order = dict(kind="raster")
    else:
        config.order, config.feed = dict(kind="blocks", block=window), dict(kind="merge")
        config.model.update(merge="shuffle", shuffle_blocks=2)
    config.head = dict(kind="categorical", use_bias=False)
    config.objective = dict(kind="next_token")
    if small:
        images.train_small(config, variant, "vqgan", dict(kind="pixels"))
        config.sampling = dict(temperature=1.0, guidance_scale=1.5)
        return config
    if name == "2048":
        config.objective.z_loss = 1e-5
    config.tokenizer = dict(kind="autoencoder") | vqgan.VARIANTS["base"]
    config.optimizer = dict(kind="adamw", learning_rate=2e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=2000)
    images.train_on_imagenet(config, image_size, images.epochs(100, 256), batch_size=256)
    config.sampling = dict(temperature=1.0, guidance_scale=7.5, guidance_schedule="half_linear")
    return config
